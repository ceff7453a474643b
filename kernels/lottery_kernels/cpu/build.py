"""Compiles the C++ kernels when they are first needed and loads them.

The library lies in a folder of torch's extension directory (`TORCH_EXTENSIONS_DIR`), under a key of everything it
depends on: sources, flags, torch, compiler and CPU. `LOTTERY_KERNELS_NO_CPP=1` turns it off;
`LOTTERY_KERNELS_CXXFLAGS` holds flags to append, as `-march=haswell` for a library without AVX-512.

torch's own `cpp_extension.load` is not used: it needs ninja on PATH, and a lock file that a killed compile leaves
behind hangs every later run. Here the operating system holds the lock, and lets go of it when its holder dies.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

SOURCES = Path(__file__).parent
LIBRARY = "lottery_kernels_cpu.so"

_loading = threading.Lock()


def load() -> bool:
    """Registers the C++ kernels, compiling them if need be; whether they can be used. Warns once if not."""
    with _loading:
        return _load()


@functools.cache
def _load() -> bool:
    if os.environ.get("LOTTERY_KERNELS_NO_CPP", "0") not in ("", "0"):
        return False
    try:
        torch.ops.load_library(library(SOURCES))
    except (OSError, RuntimeError) as error:
        warnings.warn(f"the C++ kernels cannot be used, the slow reference serves: {error}", stacklevel=4)
        return False
    return True


def library(sources: Path) -> Path:
    """The shared library of the C++ files in a folder, compiled unless it was before.

    Raises:
        RuntimeError: there is no compiler, or it failed.
        OSError: the extension directory cannot be written.
    """
    compiler, files, built = compiler_command(), _files(sources), place(sources)
    if built.exists():
        return built
    built.parent.mkdir(parents=True, exist_ok=True)
    with _locked(built.parent / "lock"):
        if not built.exists():  # another process may have been quicker
            for leftover in built.parent.glob("compiling-*"):  # of a killed one
                shutil.rmtree(leftover, ignore_errors=True)
            _compile(compiler, files, built)
    return built


def place(sources: Path = SOURCES) -> Path:
    """Where the shared library of the C++ files in a folder is, or will be once it is compiled.

    Raises:
        RuntimeError: there is no compiler.
    """
    return _extensions_root() / "lottery_kernels" / _key(_files(sources), compiler_command()) / LIBRARY


def _files(sources: Path) -> list[Path]:
    return sorted(path for path in sources.iterdir() if path.suffix in (".cpp", ".h"))


def _compile(compiler: list[str], files: list[Path], to: Path) -> None:
    print("lottery_kernels: compiling the CPU kernels, once for this machine …", file=sys.stderr, flush=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="compiling-", dir=to.parent, ignore_cleanup_errors=True) as folder:
        objects = {path: str(Path(folder, f"{path.stem}.o")) for path in files if path.suffix == ".cpp"}
        _run_all([[*compiler, *_compile_flags(), "-c", str(path), "-o", made] for path, made in objects.items()])
        linked = Path(folder, LIBRARY)
        _run_all([[*compiler, "-shared", *objects.values(), "-o", str(linked), *_link_flags(compiler)]])
        os.replace(linked, to)
    print(f"lottery_kernels: compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def _run_all(commands: list[list[str]]) -> None:
    """Runs commands side by side; none outlives this call."""
    with tempfile.TemporaryFile() as output:
        running = [subprocess.Popen(command, stdout=output, stderr=output) for command in commands]
        try:
            codes = [process.wait() for process in running]
        finally:
            for process in running:
                process.kill()
                process.wait()
        if any(codes):
            output.seek(0)
            text = output.read().decode(errors="replace").strip()
            raise RuntimeError(f"{shlex.join(commands[0][:1])} failed:\n{text[-4000:]}")


def compiler_command() -> list[str]:
    """`$CXX` if set, else the system's C++ compiler.

    Raises:
        RuntimeError: there is none.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    if sys.platform == "win32":
        raise RuntimeError("they are written for GCC and Clang, which torch does not build with on Windows")
    for command in [chosen] if chosen else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    wanted = f"CXX names {chosen[0]}, which is not there" if chosen else "there is no C++ compiler"
    raise RuntimeError(f"{wanted}. Install one: `apt install g++`, `conda install gxx`, or `xcode-select --install`")


def _compile_flags() -> list[str]:
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's clang has none: one thread there
    includes = [part for path in _cpp_extension().include_paths() for part in ("-isystem", path)]
    # Not CXXFLAGS: conda's compilers set that to an old -march, which would cost the vectors.
    own = shlex.split(os.environ.get("LOTTERY_KERNELS_CXXFLAGS", ""))
    return ["-O3", native, *openmp, "-fPIC", "-std=c++20", *own, *includes]


def _link_flags(compiler: list[str]) -> list[str]:
    libraries = [f"-L{path}" for path in _cpp_extension().library_paths()]
    flags = [*libraries, "-lc10", "-ltorch_cpu", "-ltorch"]
    if sys.platform == "darwin":
        return [*flags, "-undefined", "dynamic_lookup"]
    # No -fopenmp for GCC: its symbols are found in the runtime that libtorch_cpu brings. A second runtime in the
    # process would have its own threads, which fight with torch's for the cores.
    return [*flags, "-fopenmp"] if "clang" in _version(tuple(compiler)) else flags


def _key(files: list[Path], compiler: list[str]) -> str:
    parts = [torch.__version__, _version(tuple(compiler)), _cpu(), *_compile_flags(), *_link_flags(compiler)]
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    run = subprocess.run([*compiler, "--version"], capture_output=True, text=True, errors="replace")
    if run.returncode:
        raise RuntimeError(f"{shlex.join(compiler)} --version failed: {run.stderr.strip()}")
    return run.stdout


def _cpu() -> str:
    """Model and features of this CPU: a home directory may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        lines = [platform.processor()]
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *(line for line in lines if line.startswith(wanted))])


@functools.cache
def _cpp_extension() -> ModuleType:
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)  # importing it with a CUDA build and no CUDA device logs a warning about CUDA_HOME
    try:
        import torch.utils.cpp_extension
    finally:
        logger.setLevel(level)
    return torch.utils.cpp_extension


def _extensions_root() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or _cpp_extension().get_default_build_root())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an operating-system lock, which ends with the process however that ends."""
    import fcntl

    with open(path, "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: the rename keeps the result whole
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
