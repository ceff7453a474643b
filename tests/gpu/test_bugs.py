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
CUT = Layer("fp16", (32, 32), (64, 64), 2100, density=0.6, fine=True)  # wgrad in two phases
STEPS = Layer("fp16", (16, 16), (80, 392), 100, density=0.6, together=2)  # two steps in a turn of the loop
TALL = Layer("fp16", (16, 16), (392, 80), 100, density=0.6, together=2)  # the same of the transposed index
EMPTY = Layer("fp16", (16, 16), (80, 64), 100, density=0.2, together=2)  # with lines that have no block
SEVERAL = Layer("fp16", (16, 16), (72, 104), 1100, density=0.5)  # wgrad of several blocks together
CONV = Layer("fp16", (16, 16), (40, 24, 3, 3), 2, (6, 7), (2, 1), (1, 1), density=0.5, fine=True)
WHOLE = Layer("fp16", (16, 16), (48, 48, 3, 3), 64, (4, 4), padding=(1, 1), density=0.4)  # several blocks a program
DEEP = 16 * " "
# shown by, where: what is wrong -> (right, wrong, the result that it spoils)
BUGS = {
    (LINEAR, linear, "linear_product_kernel"): {
        "tail mask dropped": ("TAIL_K else None", "False else None", "y"),
        "rows stored behind the last": ("o_m < rows", "o_m >= 0", "y"),
        "columns stored behind the last": ("N - n, o_n", "BLOCK_N, o_n", "y"),
        "rows not clamped": ("tl.minimum(o_m, rows - 1)", "o_m", "y"),
        "line overrun by an entry": ("end * PER_BLOCK", "(end + 1) * PER_BLOCK", "y"),
        "last block skipped": ("end * PER_BLOCK", "(end - 1) * PER_BLOCK", "y"),
        "index of the step before": ("tl.minimum(i + STEPS, last", "tl.minimum(i, last", "y"),
        "all lines written as the first": ("n = line * BLOCK_N + first_n", "n = first_n", "y"),
        "live lines taken for empty": ("if begin == end:", "if begin < end:", "y"),
        "bias forgotten": ("EVEN_N, HAS_BIAS", "EVEN_N, False", "y"),
        "transposed index not used": ("tl.load(entry_ptr + entry) if TRANSPOSED else ", "", "dx"),
        "sums carried into the next line": (
            f"{DEEP}b_y = tl.zeros((HM, BN), dtype=tl.float32)",
            f"{DEEP}b_y = b_y",
            "y",
        ),
        "line not written at its end": ("if i == line_end:", "if i == -1:", "y"),
        "run of lines too long": ("first_line + LINES,", "first_line + LINES + 1,", "y"),
        "half of the depth left out": ("add_product(b_x1, b_b1, b_y,", "add_product(b_x, b_b1, b_y,", "y"),
        "values not transposed": ("o_k[:, None] * STEP_K + o_n[None", "o_k[:, None] * STEP_N + o_n[None", "dx"),
    },
    (STEPS, linear, "linear_product_kernel"): {
        "line not written in the middle of a turn": ("if i + 1 == line_end:", "if i + 1 == -1:", "y"),
        "first step alone left out": ("PER_BLOCK % 2 == 1:", "PER_BLOCK % 2 == 2:", "y"),
        "values of the first step taken twice": ("p_b += BLOCK_K * BLOCK_N if", "p_b += 0 if", "y"),
        "tail of the second step not masked": ("(outer1 + o_k < K)", "(outer1 + o_k >= 0)", "y"),
    },
    (TALL, linear, "linear_product_kernel"): {
        "transposed index of the first step taken twice": ("tl.cast(i_entry1,", "tl.cast(i_entry,", "dx"),
    },
    (EMPTY, linear, "any_empty"): {
        "empty lines not written": ("> 0", "> 1", "y"),
    },
    (CUT, linear, "sum_blocks"): {
        "end of a part ignored": ("last = tl.minimum(first + part, M)", "last = M", "dvalues"),
        "tail of the batch not masked": ("o_m < last", "o_m >= 0", "dvalues"),
        "parts written over each other": ("i_entry, i_part, nnz", "i_entry, 0, nnz", "dvalues"),
        "columns taken for rows": ("tl.load(row_ptr + i_entry) * R", "tl.load(col_ptr + i_entry) * R", "dvalues"),
    },
    (SEVERAL, linear, "sum_blocks"): {
        "all blocks at the column of the first": ("tl.where(o_j == j,", "tl.where(o_j == -1,", "dvalues"),
        "all blocks written as the first": ("o_j * (R * C) + o_c", "o_c", "dvalues"),
    },
    (SEVERAL, linear, "sum_entries"): {
        "blocks of two rows taken for one row's": ("elif of_one_row(", "elif nnz > 0 or of_one_row(", "dvalues"),
        "blocks left out where rows change": ("range(begin, end, HALF)", "range(begin, end - HALF, HALF)", "dvalues"),
    },
    (CUT, launch, "add_parts_kernel"): {
        "a part left out of the sum": ("range(1, PARTS)", "range(2, PARTS)", "dvalues"),
        "dead positions not zero": ("if HAS_ALIVE:", "if False:", "dvalues"),
    },
    (CONV, conv, "load_tap"): {
        "border of the image not masked": ("((x_w + shift_w).to(tl.uint32) < XW)", "(x_w + shift_w < XW)", "y"),
    },
    (CONV, conv, "pixels"): {
        "phase of a stride forgotten": ("o_i * STRIDE_H + phase_h", "o_i * STRIDE_H", "dx"),
    },
    (CONV, conv, "conv2d_product_kernel"): {
        "tap shifted the wrong way": ("shift_h = tap_h * DILATION_H", "shift_h = -tap_h * DILATION_H", "y"),
        "entries of another phase": ("begin_ptr += i_phase * lines", "begin_ptr += lines", "dx"),
    },
    (CONV, conv_wgrad, "load_pixels"): {
        "stride ignored": ("% PIXELS // YW * STRIDE_H", "% PIXELS // YW", "dvalues"),
        "pixels not carried on": ("p_c + begin_x", "p_c + begin_x * 0", "dvalues"),
    },
    (CONV, conv_wgrad, "sum_blocks"): {
        "pixels behind the last not masked": ("o_m < last)", "o_m >= 0)", "dvalues"),
        "channels not masked": ("(first_n + o_r < N)", "(first_n + o_r >= 0)", "dvalues"),
    },
    (WHOLE, conv_wgrad, "sum_blocks"): {
        "all blocks look through the first one's tap": (
            "tl.load(col_ptr + i_entry + j)",
            "tl.load(col_ptr + i_entry)",
            "dvalues",
        ),
        "blocks written over each other": ("(o_j * (R * C) + o_c)", "o_c", "dvalues"),
    },
    (WHOLE, conv_wgrad, "sum_entries"): {
        "blocks of two rows taken for one's": ("elif of_one_row(", "elif nnz > 0 or of_one_row(", "dvalues"),
        "blocks at a row's end left out": ("range(begin, end, HALF)", "range(begin, end - HALF, HALF)", "dvalues"),
    },
}
EDITS = {
    "wait for copies dropped": lambda ptx: re.sub(r"cp\.async\.wait_group[^;]*;", "", ptx),
    "wait for copies weakened": lambda ptx: re.sub(r"(wait_group\s+)(\d+)", lambda m: m[1] + str(int(m[2]) + 2), ptx),
    "swizzle wrong": lambda ptx: ptx.replace("xor.b32", "or.b32"),
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
    ("layer", "module", "kernel", "right", "wrong", "result"),
    [pytest.param(*where, *bug, id=name) for where, bugs in BUGS.items() for name, bug in bugs.items()],
)
def test_bugs_in_the_source_are_caught(layer, module, kernel, right, wrong, result):
    with planted(module, kernel, right, wrong):
        assert caught(layer, result)


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_bugs_in_the_compiled_code_are_caught(gpu, edit):
    layer = Layer("fp16", (64, 64), (64, 512), 64, density=1.0)
    assert caught(layer, "y", gpu, edit=edit)
    assert not caught(layer, "y", gpu)


@pytest.mark.parametrize(
    "layer",
    [LINEAR, STEPS, CUT, SEVERAL, CONV, WHOLE],
    ids=["linear", "steps", "cut", "several", "conv2d", "whole images"],
)
@pytest.mark.parametrize("result", ["y", "dx", "dvalues"])
def test_without_a_bug_nothing_is_caught(layer, result):
    assert not caught(layer, result)
