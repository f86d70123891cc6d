"""Kernel and serving benchmarks. benchmarks.cases is also what the tests run over."""
