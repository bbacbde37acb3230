"""Pretraining: losses, optimisers, corruption of inputs."""
