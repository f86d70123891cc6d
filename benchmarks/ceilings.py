"""What the GPU at hand can reach, measured in the same run as the kernels."""

import torch

from benchmarks import families
from benchmarks.timing import record_calls, time_recordings


def measure_ceilings() -> dict[str, float]:
    """copy_gbs: bytes read and written per second by an elementwise kernel over 1 GiB of fp32;
    mm_tflops: a large bf16 matrix product on random data."""
    on_gpu = families.device.type == "cuda"
    elements, size = (1 << 28, 8192) if on_gpu else (1 << 20, 256)
    source = torch.empty(elements, device=families.device).normal_()
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=families.device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    timings = time_recordings(
        {
            "copy": record_calls([lambda: torch.neg(source, out=target)] * 4),
            "mm": record_calls([lambda: torch.mm(a, b, out=product)] * 2),
        }
    )
    return {
        "copy_gbs": round(8 * elements / timings["copy"].us / 1e3, 1),
        "mm_tflops": round(2 * size**3 / timings["mm"].us / 1e6, 1),
    }
