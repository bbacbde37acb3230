"""The benchmark by instruction set: what ``benchmarks/instruction_sets.py`` runs, a process for each set."""
