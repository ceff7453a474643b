"""What a compiled kernel uses, read from its assembly and binary with the tools that come with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Facts:
    """Of one compiled kernel. `loop` is its innermost loop that holds matrix instructions."""

    registers: int
    spilled: int  # bytes that a thread spills (CUDA), registers (HIP)
    shared: int  # bytes
    warps: int
    matrix: str  # class of the matrix instructions: mma.sync, wgmma, tcgen05, mfma, or none
    copy: int  # bytes of the narrowest copy of a tile from global memory within the loop; 0: none in it
    buffers: int  # stages of the shallowest tile that the loop has in shared memory; 0: none there


def facts(asm: dict[str, Any], metadata: Any) -> Facts:
    """Facts of a kernel that Triton compiled."""
    if metadata.target.backend == "cuda":
        registers, spilled = _resources(asm, metadata.target.arch)
        text = asm["ptx"]
        matrix = _matrix(text, {"tcgen05": r"tcgen05\.mma", "wgmma": r"wgmma\.mma_async", "mma.sync": r"mma\.sync"})
        copy = _narrowest_copy(_loop(text, r"tcgen05\.mma|wgmma\.mma_async|mma\.sync|fma\.rn\.f32"))
    else:
        text = asm["amdgcn"]
        registers, spilled = _amd(text, "vgpr_count"), _amd(text, "vgpr_spill_count") + _amd(text, "sgpr_spill_count")
        matrix = _matrix(text, {"mfma": r"v_mfma"})
        copy = _narrowest_amd_load(_loop(text, r"v_mfma|v_(?:pk_)?fmac?_f32"))
    return Facts(registers, spilled, metadata.shared, metadata.num_warps, matrix, copy, _buffers(asm["ttgir"]))


def _resources(asm: dict[str, Any], arch: int) -> tuple[int, int]:
    """(registers, bytes spilled). Without a stack nothing is spilled; with one only ptxas tells what it holds."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(asm["cubin"])
        text = _output(TOOLS / "cuobjdump", "--dump-resource-usage", binary)
        found = re.search(r"REG:(\d+) STACK:(\d+)", text)
        assert found, text
        if found[2] == "0":
            return int(found[1]), 0
        source = Path(folder) / "kernel.ptx"
        source.write_text(asm["ptx"])
        ptxas, suffix = ("ptxas-blackwell" if arch >= 100 else "ptxas"), ("a" if arch >= 90 else "")
        text = _output(TOOLS / ptxas, "-v", f"--gpu-name=sm_{arch}{suffix}", source, "-o", binary)
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
        assert spilled, text
        return int(found[1]), int(spilled[1])


def _output(*command: Any) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _matrix(text: str, classes: dict[str, str]) -> str:
    return "+".join(name for name, pattern in classes.items() if re.search(pattern, text)) or "none"


def _loop(text: str, matrix: str) -> str:
    """The smallest piece of assembly between a label and a branch back to it that holds a matrix instruction."""
    labels = {m[1]: m.end() for m in re.finditer(r"^\s*([$.][\w$]+):", text, re.MULTILINE)}
    pieces = []
    for branch in re.finditer(r"\b(?:bra|bra\.uni|s_c?branch\w*)\s+([$.][\w$]+)", text):
        start = labels.get(branch[1])
        if start is not None and start < branch.start() and re.search(matrix, text[start : branch.start()]):
            pieces.append(text[start : branch.start()])
    return min(pieces, key=len, default="")


def _narrowest_copy(loop: str) -> int:
    """Of copies and loads in PTX. Indices are loaded 4 bytes at a time and count only where nothing else is loaded."""
    copies = r"cp\.async\.c[ag]\.shared\.global\b[^;]*?\],[^;]*?\],\s*(0x\w+|\d+)"
    widths = [int(size, 0) for size in re.findall(copies, loop)]
    loads = re.findall(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", loop)
    return _narrowest([int(vector or 1) * int(bits) // 8 for vector, bits in loads], widths)


def _narrowest_amd_load(loop: str) -> int:
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1}
    found = re.findall(r"(?:global|buffer)_load_([a-z]+\d?)", loop)
    return _narrowest([sizes[name] for name in found], [])


def _narrowest(loads: list[int], copies: list[int]) -> int:
    return min(copies + [size for size in loads if size != 4], default=min(loads, default=0))


def _amd(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s*(\d+)", text)
    return int(found[1]) if found else 0


def _buffers(ttgir: str) -> int:
    """Tiles of the pipeline are allocated before the loop, `[stages, rows, cols]`."""
    depths = re.findall(r"ttg\.local_alloc\s*:\s*\(\)\s*->\s*!ttg\.memdesc<(\d+)x\d+x\d+x", ttgir)
    return min(map(int, depths), default=0)
