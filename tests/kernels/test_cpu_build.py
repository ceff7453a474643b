"""Compiling at first use: once, in parallel, after a kill, without a compiler, off PATH."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lottery_kernels.cpu import build

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="the C++ kernels are for GCC and Clang"),
    pytest.mark.skipif(not build.load(), reason="no C++ compiler"),
]

BUILD = "import sys; from pathlib import Path; from lottery_kernels.cpu import build; print(build.library(Path('{}')))"
LINEAR = """
import torch
from lottery_kernels import Pattern, operators
pattern = Pattern.from_mask(torch.ones(3, 2, dtype=torch.bool))
x, weight = torch.randn(4, 2), torch.randn(3, 2)
y = operators.linear(x, pattern.pack(weight), None, pattern.index, pattern.weight_shape)
assert torch.allclose(y, x @ weight.T)
"""


class Workshop:
    """A folder of stand-in sources, an extension directory, and a compiler that counts its calls."""

    def __init__(self, folder: Path) -> None:
        self.sources = folder / "sources"
        self.sources.mkdir()
        (self.sources / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
        self.calls, self.slow = folder / "calls", folder / "slow"
        self.compiler = folder / "g++"
        self.compiler.write_text(
            f'#!/bin/sh\ncase "$*" in *" -c "*) echo x >> {self.calls}; [ -e {self.slow} ] && sleep 60;; esac\n'
            f'exec {" ".join(build.compiler_command())} "$@"\n'
        )
        self.compiler.chmod(0o755)
        self.environment = {
            **os.environ,
            "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
            "CXX": str(self.compiler),
        }

    def start(self, code: str | None = None, **environment: str) -> subprocess.Popen:
        command = [sys.executable, "-c", code or BUILD.format(self.sources)]
        pipe = subprocess.PIPE
        env = {**self.environment, **environment}
        return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)

    def run(self, code: str | None = None, **environment: str) -> tuple[str, str]:
        process = self.start(code, **environment)
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        return out.strip(), error

    def compilations(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def test_compiles_once_and_says_so(workshop):
    library, said = workshop.run()
    assert Path(library).exists()
    assert [line.split(",")[0].split(" in ")[0] for line in said.splitlines()] == [
        "lottery_kernels: compiling the CPU kernels",
        "lottery_kernels: compiled",
    ]
    assert workshop.run() == (library, "")
    assert workshop.compilations() == 1


def test_a_changed_source_is_compiled_anew(workshop):
    first, _ = workshop.run()
    (workshop.sources / "one.cpp").write_text('extern "C" int one() { return 2; }\n')
    assert workshop.run()[0] != first


def test_appended_flags_make_a_library_of_their_own(workshop):
    (workshop.sources / "one.cpp").write_text('extern "C" int one() { return ANSWER; }\n')
    answers = []
    for answer in ("1", "2"):
        library, _ = workshop.run(LOTTERY_KERNELS_CXXFLAGS=f"-DANSWER={answer}")
        answers.append(ctypes.CDLL(library).one())
    assert answers == [1, 2]


def test_parallel_first_uses_compile_once(workshop):
    processes = [workshop.start() for _ in range(3)]
    libraries = {process.communicate(timeout=120)[0] for process in processes}
    assert len(libraries) == 1
    assert Path(libraries.pop().strip()).exists()
    assert workshop.compilations() == 1


def test_a_killed_compile_leaves_nothing_behind(workshop):
    workshop.slow.touch()
    process = workshop.start()
    deadline = time.monotonic() + 60
    while not workshop.compilations() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    workshop.slow.unlink()
    library, _ = workshop.run()
    assert sorted(path.name for path in Path(library).parent.iterdir()) == sorted(["lock", build.LIBRARY])


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CXX": "/nowhere/g++"}, "CXX names /nowhere/g++, which is not there. Install one: `apt install g++`"),
        ({"CXX": "", "PATH": "/nowhere"}, "there is no C++ compiler. Install one: `apt install g++`"),
        ({"CXX": "false"}, "false --version failed"),
        ({"LOTTERY_KERNELS_NO_CPP": "1", "CXX": "/nowhere/g++"}, None),
    ],
    ids=["unknown", "none", "broken", "switched off"],
)
def test_without_a_compiler_the_reference_serves(workshop, environment, said):
    _, error = workshop.run(LINEAR * 2, **environment)
    assert error.count("the C++ kernels cannot be used") == (said is not None)
    assert said is None or said in error


def test_what_the_compiler_says_is_passed_on(workshop):
    (workshop.sources / "one.cpp").write_text("int one() { return undeclared; }\n")
    process = workshop.start()
    _, error = process.communicate(timeout=120)
    assert process.returncode
    assert "RuntimeError" in error
    assert "one.cpp:1" in error.partition("RuntimeError")[2]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_no_second_openmp_runtime_is_loaded():
    code = f"{LINEAR}\nimport re\nmaps = open('/proc/self/maps').read()\n"
    code += "print(*set(re.findall(r'\\S*lib(?:gomp|omp|iomp)\\S*', maps)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(run.stdout.split()) == 1


def test_the_first_step_of_a_process_rounds_as_later_ones_do():
    code = """
import torch
from lottery_kernels import SparseLinear
layer, x = SparseLinear(50, 30, mask=torch.rand(30, 50) < 0.2), torch.randn(1000, 50)
gradients = [torch.autograd.grad(layer(x).square().sum(), layer.parameters()) for _ in range(2)]
assert all(map(torch.equal, *gradients))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
