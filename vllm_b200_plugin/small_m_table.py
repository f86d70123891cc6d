"""Where ops/small_m_gemm.py is faster than what vLLM has: written by `python -m benchmarks.tune`.

(compute capability, kind) -> (N, K) -> ((most tokens, config, quantise first), ...) with ascending numbers of tokens;
a config of None, and more tokens than the last, mean vLLM's kernel.
"""

Cut = tuple[int, ...]  # the fields of ops.small_m_gemm.Config, from the first on
Rows = tuple[tuple[int, Cut | None, bool], ...]

TABLE: dict[tuple[tuple[int, int], str], dict[tuple[int, int], Rows]] = {
    ((9, 0), "bf16"): {
        (128, 2048): (
            (4, (1, 8, 4, 0), False),
            (16, (1, 16, 1, 0), False),
        ),
        (2048, 4096): (
            (1, (1, 16, 1, 0), False),
            (8, (1, 16, 1, 2), False),
        ),
        (5120, 2048): (),
    },
    ((9, 0), "fp8"): {
        (1792, 12288): ((2, (1, 16, 1, 2), False),),
        (4096, 4096): (),
        (5120, 2048): (),
    },
    ((9, 0), "fp8_block"): {
        (2048, 4096): (
            (1, (1, 8, 1, 0), False),
            (4, (1, 16, 1, 0), False),
            (8, (1, 16, 1, 0), True),
        ),
        (2112, 7168): (
            (2, (1, 15, 1, 0), False),
            (4, (2, 15, 2, 0), False),
            (8, (1, 15, 1, 0), True),
        ),
        (3072, 1536): (
            (1, (2, 12, 1, 0), False),
            (2, (1, 12, 1, 0), False),
            (8, (2, 12, 1, 0), False),
        ),
        (5120, 2048): (
            (1, (2, 8, 1, 0), False),
            (2, (1, 8, 1, 0), False),
        ),
        (7168, 2048): ((2, (2, 8, 1, 0), False),),
    },
    ((9, 0), "int8"): {
        (4096, 4096): ((4, (1, 8, 1, 0), True),),
        (4096, 14336): (),
        (6144, 4096): ((4, (1, 8, 1, 0), True),),
        (28672, 4096): ((4, (1, 8, 1, 0), True),),
    },
    ((9, 0), "nvfp4"): {
        (2048, 4096): (
            (1, (1, 8, 1, 0), False),
            (4, (1, 8, 2, 0), False),
            (8, (1, 16, 1, 0), False),
            (16, (1, 8, 1, 0), False),
        ),
        (2112, 7168): (
            (4, (2, 14, 2, 0), False),
            (16, (1, 15, 1, 0), False),
        ),
        (3072, 1536): ((16, (1, 6, 1, 0), False),),
        (4096, 4096): ((8, (2, 16, 1, 0), False),),
        (4096, 14336): (),
        (5120, 2048): (
            (1, (2, 4, 2, 0), False),
            (8, (2, 8, 1, 0), False),
        ),
        (6144, 4096): ((1, (1, 8, 1, 0), False),),
        (7168, 2048): ((8, (2, 8, 1, 0), False),),
    },
}
