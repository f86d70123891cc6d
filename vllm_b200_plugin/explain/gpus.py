"""What is published of the GPUs that explain can pretend."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """bandwidth: of its memory, in bytes per second, as NVIDIA publishes it. memory: in bytes. sms: multiprocessors."""

    name: str
    capability: tuple[int, int]
    bandwidth: float
    memory: int
    sms: int
    l2: int


GPUS = {
    gpu.capability: gpu
    for gpu in (
        Gpu("NVIDIA H200", (9, 0), 4.8e12, 141 * 10**9, 132, 50 << 20),
        Gpu("NVIDIA B200", (10, 0), 8.0e12, 180 * 10**9, 148, 126 << 20),
        Gpu("NVIDIA B300", (10, 3), 8.0e12, 288 * 10**9, 148, 126 << 20),
        Gpu("NVIDIA RTX PRO 6000 Blackwell", (12, 0), 1.792e12, 96 * 10**9, 188, 128 << 20),
    )
}


def gpu(capability: str) -> Gpu:
    """The GPU of a compute capability such as "10.0". Raises ValueError that names the known ones."""
    for known in GPUS.values():
        if capability == f"{known.capability[0]}.{known.capability[1]}":
            return known
    known_ones = ", ".join(f"{g.capability[0]}.{g.capability[1]} ({g.name})" for g in GPUS.values())
    raise ValueError(f"--capability {capability} is not one of {known_ones}")
