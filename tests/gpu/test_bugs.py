"""Bugs planted into the kernels, or into their compiled code, are noticed by the tests' equipment."""

import re

import pytest

from lottery_kernels.gpu import conv, conv_wgrad, launch, linear
from tests.gpuless.driver import stand_in
from tests.gpuless.memory import Fault
from tests.gpuless.mutate import planted

from .cases import Layer, as_tensor_core, check

pytestmark = pytest.mark.usefixtures("nan_filled")
LINEAR = Layer("fp16", (32, 32), (144, 112), 100, density=0.6, fine=True, together=2)
CUT = Layer("fp16", (32, 32), (64, 64), 1200, density=0.6, fine=True)  # wgrad in two phases
CONV = Layer("fp16", (16, 16), (40, 24, 3, 3), 2, (6, 7), (2, 1), (1, 1), density=0.5, fine=True)
DEEP = 16 * " "
# where: what is wrong -> (right, wrong, the result that it spoils)
BUGS = {
    (linear, "linear_product_kernel"): {
        "tail mask dropped": ("TAIL_K else None", "False else None", "y"),
        "rows stored behind the last": ("o_m < rows", "o_m >= 0", "y"),
        "columns stored behind the last": ("N - n, o_n", "BLOCK_N, o_n", "y"),
        "rows not clamped": ("tl.minimum(o_m, rows - 1)", "o_m", "y"),
        "line overrun by an entry": ("end * PER_BLOCK", "(end + 1) * PER_BLOCK", "y"),
        "last block skipped": ("end * PER_BLOCK", "(end - 1) * PER_BLOCK", "y"),
        "index of the step before": ("tl.minimum(i + 1, last", "tl.minimum(i, last", "y"),
        "all lines written as the first": ("n = line * BLOCK_N + first_n", "n = first_n", "y"),
        "live lines taken for empty": ("if begin == end:", "if begin < end:", "y"),
        "bias forgotten": ("EVEN_N, HAS_BIAS", "EVEN_N, False", "y"),
        "transposed index not used": ("tl.load(entry_ptr + following) if TRANSPOSED else following", "following", "dx"),
        "sums carried into the next line": (
            f"{DEEP}b_y = tl.zeros((HM, BN), dtype=tl.float32)",
            f"{DEEP}b_y = b_y",
            "y",
        ),
        "line not written at its end": ("if i_line != line:", "if i_line < line:", "y"),
        "run of lines too long": ("first_line + LINES,", "first_line + LINES + 1,", "y"),
        "half of the depth left out": ("tl.dot(b_x1, b_b1, b_y,", "tl.dot(b_x, b_b1, b_y,", "y"),
        "values not transposed": ("o_k[:, None] * STEP_K + o_n[None", "o_k[:, None] * STEP_N + o_n[None", "dx"),
    },
    (linear, "linear_wgrad_kernel"): {
        "end of a part ignored": ("last = tl.minimum(first + part, M)", "last = M", "dvalues"),
        "tail of the batch not masked": ("o_m < last", "o_m >= 0", "dvalues"),
        "parts written over each other": ("i_entry, i_part, nnz", "i_entry, 0, nnz", "dvalues"),
        "columns taken for rows": ("tl.load(row_ptr + i_entry) * R", "tl.load(col_ptr + i_entry) * R", "dvalues"),
    },
    (launch, "add_parts_kernel"): {
        "a part left out of the sum": ("range(PARTS)", "range(PARTS - 1)", "dvalues"),
        "dead positions not zero": ("if HAS_ALIVE:", "if False:", "dvalues"),
    },
    (conv, "load_tap"): {
        "border of the image not masked": ("((x_w + shift_w).to(tl.uint32) < XW)", "(x_w + shift_w < XW)", "y"),
    },
    (conv, "pixels"): {
        "phase of a stride forgotten": ("o_i * STRIDE_H + phase_h", "o_i * STRIDE_H", "dx"),
    },
    (conv, "conv2d_product_kernel"): {
        "tap shifted the wrong way": ("shift_h = tap // KW * DILATION_H", "shift_h = -(tap // KW) * DILATION_H", "y"),
        "entries of another phase": ("begin_ptr += i_phase * lines", "begin_ptr += lines", "dx"),
    },
    (conv_wgrad, "load_pixels"): {
        "stride ignored": ("% PIXELS // YW * STRIDE_H", "% PIXELS // YW", "dvalues"),
        "pixels not carried on": ("begin_x + shift_w", "begin_x * 0 + shift_w", "dvalues"),
    },
    (conv_wgrad, "conv2d_wgrad_kernel"): {
        "pixels behind the last not masked": ("o_m < last)", "o_m >= 0)", "dvalues"),
        "channels not masked": ("(first_n + o_r < N)", "(first_n + o_r >= 0)", "dvalues"),
    },
}
EDITS = {
    "wait for copies dropped": lambda ptx: re.sub(r"cp\.async\.wait_group[^;]*;", "", ptx),
    "wait for copies weakened": lambda ptx: re.sub(r"(wait_group\s+)(\d+)", lambda m: m[1] + str(int(m[2]) + 2), ptx),
    "swizzle wrong": lambda ptx: ptx.replace("xor.b32", "or.b32", 1),
}


def caught(layer: Layer, result: str, gpu: str = "sm_80", **options) -> bool:
    exact, torchs = layer.dense(lambda t: t.double())[result], as_tensor_core(layer)[result]
    with stand_in(gpu, **options):
        try:
            check(layer.sparse()[result](), exact, torchs, "")
        except (Fault, AssertionError):
            return True
    return False


@pytest.mark.parametrize(
    ("module", "kernel", "right", "wrong", "result"),
    [pytest.param(*where, *bug, id=name) for where, bugs in BUGS.items() for name, bug in bugs.items()],
)
def test_bugs_in_the_source_are_caught(module, kernel, right, wrong, result):
    layer = CONV if module in (conv, conv_wgrad) else CUT if result == "dvalues" else LINEAR
    with planted(module, kernel, right, wrong):
        assert caught(layer, result)


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_bugs_in_the_compiled_code_are_caught(gpu, edit):
    layer = Layer("fp16", (64, 64), (64, 512), 64, density=1.0)
    assert caught(layer, "y", gpu, edit=edit)
    assert not caught(layer, "y", gpu)


@pytest.mark.parametrize("layer", [LINEAR, CUT, CONV], ids=["linear", "cut", "conv2d"])
@pytest.mark.parametrize("result", ["y", "dx", "dvalues"])
def test_without_a_bug_nothing_is_caught(layer, result):
    assert not caught(layer, result)
