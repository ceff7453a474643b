"""A mask turned into index arrays."""

import copy
import pickle
import re

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import lottery_kernels.pattern
from lottery_kernels import Pattern

ARRAYS = ("row_ptr", "col", "t_ptr", "t_row", "t_index")


@st.composite
def masks(draw) -> tuple[torch.Tensor, tuple[int, int], int]:
    """(mask, block, groups) of a linear or convolution weight: any sizes, from all pruned to full."""
    groups = draw(st.integers(1, 3))
    out, inputs = groups * draw(st.integers(1, 7)), draw(st.integers(1, 9))
    kernel = draw(st.sampled_from([(), (1, 1), (3, 2)]))
    density = draw(st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.rand(out, inputs, *kernel, generator=generator) < density
    block = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    return mask, block, groups if kernel else 1


def test_the_docstrings_example_is_true():
    text = lottery_kernels.pattern.__doc__
    rows = re.findall(r"^    ([1.](?: [1.]){3})", text, re.MULTILINE)
    mask = torch.tensor([[cell == "1" for cell in row.split()] for row in rows])
    pattern = Pattern.from_mask(mask, (2, 2))
    for name in ARRAYS:
        stated = re.search(rf"\b{name} +((?:\d )*\d) ", text)[1]
        assert getattr(pattern, name).tolist() == [int(number) for number in stated.split()], name
    alive = [[[1, 1], [1, 1]], [[0, 0], [0, 1]], [[1, 0], [0, 0]]]
    assert mask.shape == (4, 4)
    assert pattern.alive.int().tolist() == alive


@hypothesis.settings(deadline=None, max_examples=80)
@hypothesis.given(masks())
def test_packing_and_unpacking_give_back_what_remains(case):
    mask, block, groups = case
    pattern = Pattern.from_mask(mask, block, groups)
    weight = torch.randn(mask.shape)
    values = pattern.pack(weight)
    assert values.shape == (pattern.nnz, *block)
    assert torch.equal(pattern.unpack(values), weight.where(mask, torch.zeros(())))
    if weight.numel() > 1:  # of a 1×1 kernel too no strides that pass for channels_last
        assert pattern.unpack(values).stride() == weight.stride()
    assert torch.equal(pattern.pack(pattern.unpack(values)), values)
    assert torch.equal(pattern.mask, mask)
    assert pattern.density == mask.float().mean(dtype=torch.float64)
    if pattern.alive is not None:
        assert pattern.alive.sum() == mask.sum()
        assert (values[~pattern.alive] == 0).all()
    else:
        assert values.numel() == mask.sum()


@hypothesis.settings(deadline=None, max_examples=80)
@hypothesis.given(masks())
def test_the_transpose_lists_the_same_blocks_by_column(case):
    mask, block, groups = case
    pattern = Pattern.from_mask(mask, block, groups)
    taps, rows = mask[0, 0].numel(), -(-mask.shape[0] // groups // block[0])
    cols = -(-mask.shape[1] // block[1])
    by_row = []  # (group, tap, block row, block column) in the order of values
    for row in range(groups * rows):
        entries = pattern.col[pattern.row_ptr[row] : pattern.row_ptr[row + 1]].tolist()
        assert entries == sorted(entries)
        by_row += [(row // rows, col // cols, row % rows, col % cols) for col in entries]
    by_column = {}  # the same -> its position in values
    for column in range(groups * cols):
        span = slice(pattern.t_ptr[column], pattern.t_ptr[column + 1])
        entries = pattern.t_row[span].tolist()
        assert entries == sorted(entries)
        for row, position in zip(entries, pattern.t_index[span].tolist(), strict=True):
            by_column[column // cols, row // rows, row % rows, column % cols] = position
    assert by_column == {entry: i for i, entry in enumerate(by_row)}
    assert all(group < groups and tap < taps for group, tap, _, _ in by_row)
    assert all(getattr(pattern, name).dtype == torch.int32 for name in ARRAYS)


def test_packing_and_unpacking_are_differentiable():
    pattern = Pattern.from_mask(torch.rand(5, 7) < 0.4, (2, 3))
    weight = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pattern.pack, weight)
    assert torch.autograd.gradcheck(pattern.unpack, pattern.pack(weight).detach().requires_grad_())


def test_what_is_not_finite_vanishes_where_pruned():
    mask = torch.rand(6, 6) < 0.4
    weight = torch.ones(6, 6).where(mask, torch.nan)
    pattern = Pattern.from_mask(mask, (4, 4))
    assert torch.equal(pattern.unpack(pattern.pack(weight)), mask.float())
    values = torch.ones(pattern.nnz, 4, 4).where(pattern.alive, torch.inf)
    assert torch.equal(pattern.unpack(values), mask.float())


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_weights_without_elements(shape):
    pattern = Pattern.from_mask(torch.ones(shape, dtype=torch.bool), (2, 2))
    assert pattern.nnz == 0
    assert pattern.unpack(pattern.pack(torch.empty(shape))).shape == shape


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.ones(3, 4),), TypeError, "mask must be a bool tensor.*float32"),
        (([[True]],), TypeError, "mask must be a bool tensor.*list"),
        ((torch.ones(3, dtype=torch.bool),), ValueError, r"mask must be \[out, in\].*\(3,\)"),
        ((torch.ones(3, 4, dtype=torch.bool, device="meta"),), ValueError, "mask is on the meta device"),
        ((torch.ones(3, 4, dtype=torch.bool), 4), TypeError, "block must be a pair of integers.*4"),
        ((torch.ones(3, 4, dtype=torch.bool), (2.0, 2)), TypeError, "block must be a pair of integers"),
        ((torch.ones(3, 4, dtype=torch.bool), (0, 1)), ValueError, r"block must be positive.*\(0, 1\)"),
        ((torch.ones(3, 4, 1, 1, dtype=torch.bool), (1, 1), 2), ValueError, "groups must be.*divides the 3 outputs"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        Pattern.from_mask(*arguments)


def test_blocks_may_be_lists_as_json_has_them():
    assert Pattern.from_mask(torch.ones(3, 4, dtype=torch.bool), [2, 2]).block == (2, 2)


def test_tensors_of_another_shape_are_refused():
    pattern = Pattern.from_mask(torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(3, 4\)"):
        pattern.pack(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"\(3, 1, 1\).*\(12, 1, 1\)"):
        pattern.unpack(torch.ones(3, 1, 1))


def test_a_pattern_is_immutable_and_so_shared_by_deep_copies():
    pattern = Pattern.from_mask(torch.rand(5, 7) < 0.4)
    with pytest.raises(AttributeError):
        pattern.block = (2, 2)
    assert copy.deepcopy(pattern) is pattern


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_pickling_keeps_everything_on_the_cpu(device):
    mask = torch.rand(5, 7) < 0.4
    found = pickle.loads(pickle.dumps(Pattern.from_mask(mask, (2, 2)).to(device)))
    assert found.device.type == "cpu"
    assert torch.equal(found.mask, mask)
    assert found.block == (2, 2)


@pytest.mark.parametrize(
    ("name", "value"), [("col", 99), ("col", -1), ("t_row", 99), ("t_index", 99), ("row_ptr", 99), ("t_ptr", -1)]
)
def test_a_damaged_pickle_is_refused(name, value):
    """Kernels turn these numbers into addresses."""
    pattern = Pattern.from_mask(torch.rand(5, 7) < 0.4)
    getattr(pattern, name)[1] = value
    data = pickle.dumps(pattern)
    with pytest.raises(ValueError, match=f"{name} does not fit"):
        pickle.loads(data)


def test_moving_there_and_back_reads_no_uninitialised_memory():
    mask = torch.rand(5, 7) < 0.4
    pattern = Pattern.from_mask(mask, (2, 2))
    away = pattern.to("meta")
    assert away.col.is_meta
    assert away.to("cpu") is pattern


@hypothesis.given(masks())
def test_the_schedule_names_lines_and_orders_their_runs(case):
    mask, block, groups = case
    pattern = Pattern.from_mask(mask, block, groups)
    row, column, *orders = pattern.schedule
    for line, order, pointer in zip((row, column), orders, (pattern.row_ptr, pattern.t_ptr), strict=True):
        lines = pointer.numel() - 1
        assert all(pointer[n] <= i < pointer[n + 1] for i, n in enumerate(line.tolist()))
        for size in lottery_kernels.pattern.RUNS:
            found = lottery_kernels.pattern.runs(order, lines, size).tolist()
            assert sorted(found) == list(range(-(-lines // size)))
            live = [int(pointer[min((n + 1) * size, lines)] - pointer[n * size]) for n in found]
            assert live == sorted(live, reverse=True)
