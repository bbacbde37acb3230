"""The first minutes on a GPU: what ``benchmarks/gpu_first.py`` runs, a process for each probe."""
