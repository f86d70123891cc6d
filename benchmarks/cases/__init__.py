"""Parameter lists, one module per op family, shared by the tests and the benchmarks."""
