"""Where ops/small_m_gemm.py is faster than what vLLM has: written by `python -m benchmarks.tune`, not by hand.

(compute capability, kind) -> (N, K) -> ((most tokens, config, quantise first), ...) with ascending numbers of tokens;
a config of None, and more tokens than the last, mean vLLM's kernel.
"""

Cut = tuple[int, int, int, int]
Rows = tuple[tuple[int, Cut | None, bool], ...]

TABLE: dict[tuple[tuple[int, int], str], dict[tuple[int, int], Rows]] = {}
