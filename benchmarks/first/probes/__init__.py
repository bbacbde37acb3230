"""What is asked of a GPU, a module per group. Each has ``run(context)``, which prints lines through its context."""
