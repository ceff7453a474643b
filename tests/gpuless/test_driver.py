"""The stand-in driver, the emulator and the interpreter on kernels whose results are known."""

import re

import pytest
import torch

from . import kernels
from .driver import stand_in
from .memory import Fault
from .mutate import planted

BOTH = pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
EXECUTORS = pytest.mark.parametrize("execute", ["emulator", "interpreter"])


def scaled(x: torch.Tensor, masked: bool = True, programs: int = 2) -> torch.Tensor:
    y = torch.full_like(x, torch.nan)
    kernels.scale_kernel[(programs,)](x, y, x.numel(), 0.5, BLOCK=128, MASKED=masked)
    return y


@EXECUTORS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_executes_with_float_arguments_and_tails(execute, dtype):
    x = torch.randn(200).to(dtype)
    with stand_in("sm_80", execute=execute):
        assert torch.equal(scaled(x), x / 2)


@EXECUTORS
def test_access_outside_of_tensors_is_a_fault(execute):
    with stand_in("sm_80", execute=execute), pytest.raises(Fault):
        scaled(torch.randn(200), masked=False)


@EXECUTORS
def test_threads_exchange_registers(execute):
    x, y = torch.randn(3, 128), torch.empty(3)
    with stand_in("sm_80", execute=execute):
        kernels.sum_kernel[(3,)](x, y, BLOCK=128, SEPARATE=True)
    torch.testing.assert_close(y, x.sum(1))


@EXECUTORS
def test_programs_that_write_one_element_race(execute):
    with stand_in("sm_80", execute=execute), pytest.raises(Fault, match="race"):
        kernels.sum_kernel[(3,)](torch.randn(3, 128), torch.empty(3), BLOCK=128, SEPARATE=False)


def test_paths_that_part_meet_again():
    x, y = torch.arange(1, 10, dtype=torch.int32), torch.empty(9, dtype=torch.int32)
    with stand_in("sm_80"):
        kernels.countdown_kernel[(9,)](x, y)
    assert y.tolist() == [0, 1, 7, 2, 5, 8, 16, 3, 19]


@BOTH
def test_integers_of_16_bits(gpu):
    x = torch.randint(-200, 200, (512,), dtype=torch.int16)
    y = torch.empty_like(x)
    with stand_in(gpu) as driver:
        kernels.saturate_kernel[(1,)](x, y, BLOCK=512)
    assert torch.equal(y, (2 * x).clamp(max=100))
    assert ("16x2" in driver.launches[-1].asm["ptx"]) == (gpu == "sm_90")


def test_only_the_chosen_programs_are_executed():
    x = torch.randn(256)
    with stand_in("sm_80", programs=lambda launch: [1]):
        y = scaled(x)
    assert y[:128].isnan().all() and torch.equal(y[128:], x[128:] / 2)


def test_counts_instructions_and_sectors():
    with stand_in("sm_80") as gpu:
        scaled(torch.randn(256))
    counts = gpu.launches[-1].counts
    assert counts["bytes read"] == counts["bytes written"] == 1024
    assert counts["sectors read"] == counts["sectors written"] == 32
    assert counts["instructions"] > 0


def test_counts_each_instruction():
    _, launch = product_error("sm_80")
    executed = list(zip(launch.program.instructions, launch.executed, strict=True))
    assert {count for instruction, count in executed if instruction.name == "mma"} == {4 * 4}  # four steps, four warps
    assert {count for instruction, count in executed if instruction.name == "ret"} == {4}
    assert launch.executed.sum() == launch.counts["instructions"]


@BOTH
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")],
)
@pytest.mark.parametrize("cols", [16, 128])
def test_matrix_products(gpu, dtype, precision, cols):
    error, launch = product_error(gpu, dtype, precision, cols)
    exact = precision == "ieee"
    assert error < 1e-6 if exact else 1e-4 < error < 2e-3  # products of half types are exact in fp32
    assert (launch.counts["mma"] > 0) == (dtype != torch.float32 or not exact)
    assert ("wgmma" in launch.asm["ptx"]) == (gpu == "sm_90" and launch.counts["mma"] > 0)
    if launch.counts["mma"]:
        assert launch.counts["multiply-adds"] == 64 * cols * 128


def product_error(gpu: str, dtype=torch.float16, precision="ieee", cols=32, **options):
    """Relative error of c = a · b with K = 128, four steps of a pipeline, and the launch."""
    a, b, c = torch.randn(64, 128).to(dtype), torch.randn(128, cols).to(dtype), torch.full((64, cols), torch.nan)
    with stand_in(gpu, **options) as driver:
        kernels.product_kernel[(1,)](
            a, b, c, 128, BM=64, BN=cols, BK=32, PRECISION=precision, num_warps=4, num_stages=3
        )
    expected = a.double() @ b.double()
    return ((c - expected).norm() / expected.norm()).item(), driver.launches[-1]


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32")]
)
def test_the_interpreter_rounds_and_counts_as_a_tensor_core(dtype, precision):
    error, launch = product_error("sm_80", dtype, precision, execute="interpreter")
    assert 1e-4 < error < 2e-3 if precision == "tf32" else error < 1e-6
    assert launch.counts["multiply-adds"] == 64 * 32 * 128


@BOTH
@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda ptx: re.sub(r"cp\.async\.wait_group[^;]*;", "", ptx), id="no wait for copies"),
        pytest.param(
            lambda ptx: re.sub(r"(cp\.async\.wait_group\s*)(\d+)", lambda m: m[1] + str(int(m[2]) + 2), ptx),
            id="weaker wait",
        ),
        pytest.param(lambda ptx: ptx.replace("xor.b32", "or.b32", 1), id="wrong swizzle"),
    ],
)
def test_wrong_pipelining_and_layout_show(gpu, edit):
    assert product_error(gpu)[0] < 1e-6
    try:
        error, _ = product_error(gpu, edit=edit)
    except Fault:
        return
    assert not error < 0.1


def test_products_that_are_not_waited_for_are_missing():
    error, _ = product_error("sm_90", edit=lambda ptx: re.sub(r"wgmma\.wait_group[^;]*;", "", ptx))
    assert not error < 0.1


def test_a_bug_can_be_planted_and_is_gone_afterwards():
    x = torch.randn(256)
    with stand_in("sm_80"):
        with planted(kernels, "scale_kernel", "* factor", "+ factor"):
            assert torch.equal(scaled(x), x + 0.5)
        assert torch.equal(scaled(x), x / 2)
        with pytest.raises(ValueError, match="has no"), planted(kernels, "scale_kernel", "not there", ""):
            pass


def test_unknown_instructions_are_refused():
    with stand_in("sm_80", edit=lambda ptx: ptx.replace("mul.f32", "sin.f32", 1)), pytest.raises(NotImplementedError):
        scaled(torch.randn(256))
