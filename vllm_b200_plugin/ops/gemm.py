"""Matrix products of FP8 operands with block scales: the references.

The arithmetic is that of DeepGEMM's `fp8_gemm_nt` and of vLLM's CUTLASS and Triton kernels for 128x128 weight blocks:
both operands stay the quantised ones, products and sums are fp32.
"""

import torch


def fp8_block_scaled_mm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    block_shape: tuple[int, int] = (128, 128),
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """(a * a_scale) @ (b * b_scale).T with the scales spread over their blocks.

    Args:
        a: [num_tokens, K] float8_e4m3fn, the activation.
        a_scale: [num_tokens, ceil(K / block_shape[1])] float32, any strides: one scale per group of a row.
        b: [N, K] float8_e4m3fn, the weight.
        b_scale: [ceil(N / block_shape[0]), ceil(K / block_shape[1])] float32.
        block_shape: (rows, columns) of b that share a scale.
        out_dtype: dtype of the result.

    Returns:
        [num_tokens, N] in out_dtype.

    Raises:
        ValueError: an argument is not as above.
    """
    _check(a, a_scale, b, b_scale, block_shape)
    return (_spread(a, a_scale, (1, block_shape[1])) @ _spread(b, b_scale, block_shape).t()).to(out_dtype)


def _spread(q: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """q in fp32, times its scales. Partial blocks at the edges are as good as whole ones."""
    rows, columns = q.shape
    if block[0] > 1:
        scale = scale.repeat_interleave(block[0], 0)[:rows]
    return q.float() * scale.repeat_interleave(block[1], 1)[:, :columns]


def _check(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, block_shape: tuple[int, int]
) -> None:
    for name, tensor, dtype in (
        ("a", a, torch.float8_e4m3fn),
        ("a_scale", a_scale, torch.float32),
        ("b", b, torch.float8_e4m3fn),
        ("b_scale", b_scale, torch.float32),
    ):
        if tensor.dim() != 2 or tensor.dtype != dtype:
            raise ValueError(f"{name}: takes 2 dimensions of {dtype}, got {tuple(tensor.shape)} of {tensor.dtype}")
    block_n, block_k = block_shape
    if block_n < 1 or block_k < 1:
        raise ValueError(f"block_shape: takes two positive sizes, got {block_shape}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"b: takes [N, {a.shape[1]}] as a has {a.shape[1]} columns, got {tuple(b.shape)}")
    groups = -(-a.shape[1] // block_k)
    if a_scale.shape != (a.shape[0], groups):
        raise ValueError(f"a_scale: takes {(a.shape[0], groups)}, got {tuple(a_scale.shape)}")
    if b_scale.shape != (-(-b.shape[0] // block_n), groups):
        raise ValueError(f"b_scale: takes {(-(-b.shape[0] // block_n), groups)}, got {tuple(b_scale.shape)}")
