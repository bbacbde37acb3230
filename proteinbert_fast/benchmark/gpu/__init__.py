"""The report of a GPU: every kernel checked on the device, then measured. What ``benchmarks/gpu_report.py`` runs.

`sections` lists its parts, each a module with ``rows(bench)``. `operations` lists the kernels, for the checks and for
the measurements alike. A `bench.Bench` is what all have in common: device, clock, models, what has failed so far.
"""
