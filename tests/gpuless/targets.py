"""The GPUs that are stood in for."""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Gpu:
    """One GPU's limits, from NVIDIA's and AMD's documentation."""

    backend: str
    arch: int | str
    processors: int
    shared: int  # bytes that one program can have

    @property
    def name(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)

    @property
    def device(self) -> int:
        """A device number of its own: Triton keeps compiled kernels by device number, not by target."""
        return int(self.arch) if self.backend == "cuda" else int(str(self.arch).removeprefix("gfx"), 16)

    @property
    def target(self) -> GPUTarget:
        return GPUTarget(self.backend, self.arch, 32 if self.backend == "cuda" else 64)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("cuda", 80, 108, 166912),  # A100
        Gpu("cuda", 90, 132, 232448),  # H100
        Gpu("cuda", 100, 148, 232448),  # B200
        Gpu("cuda", 120, 170, 101376),  # RTX 5090
        Gpu("hip", "gfx942", 304, 65536),  # MI300X
    )
}
