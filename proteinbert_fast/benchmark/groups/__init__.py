"""One module per group of benchmarks; `proteinbert_fast.benchmark.registry` names them all."""
