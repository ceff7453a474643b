"""What the shipped launch settings compile to, against the table beside this file."""

import pytest

from . import matrix


def check_rows(rows: list[matrix.Row]) -> None:
    """Whatever falls short has a reason, and the table names it for every kernel that it lists."""
    table = matrix.read()
    for row in rows:
        short = matrix.misses(row, matrix.compiled(row))
        assert set(short.values()) <= matrix.REASONS.keys(), f"{row.key} falls short without a reason: {short}"
        if row.key in table:
            named = matrix.named(table[row.key])
            assert short.items() <= named.items(), f"{row.key} falls short in {short}, the table names {named}"


def test_the_table_names_a_reason_for_every_miss():
    keys = {row.key for row in matrix.rows()}
    for key, columns in matrix.read().items():
        assert key in keys
        assert set(matrix.named(columns).values()) <= matrix.REASONS.keys(), key


@pytest.mark.parametrize("gpu", matrix.GPUS)
def test_some_kernels_compile_as_the_table_says(gpu):
    """Each operator once, with another precision and block."""
    rows = [row for row in matrix.rows() if row.gpu == gpu]
    each = len(rows) // len(matrix.OPERATORS)
    check_rows([rows[i * each + (9 * i + 3) % each] for i in range(len(matrix.OPERATORS))])


def check_whole_images(rows: list[matrix.Row]) -> None:
    """The weight gradient has a way of its own where images fill a step exactly: no more spills than without it."""
    for row in rows:
        whole, others = (matrix.compiled(row, image).spilled for image in ((8, 8), (12, 12)))
        assert whole <= others, f"{row.key} spills {whole} bytes over whole images, {others} otherwise"


@pytest.mark.parametrize("gpu", matrix.GPUS)
def test_a_weight_gradient_over_whole_images_spills_no_more(gpu):
    check_whole_images([matrix.Row(gpu, "conv2d_wgrad", "bf16", (32, 32))])


@pytest.mark.matrix
@pytest.mark.parametrize("gpu", matrix.GPUS)
def test_no_weight_gradient_over_whole_images_spills_more(gpu):
    check_whole_images([row for row in matrix.rows() if (row.gpu, row.operator) == (gpu, "conv2d_wgrad")])


@pytest.mark.matrix
@pytest.mark.parametrize("operator", matrix.OPERATORS)
@pytest.mark.parametrize("gpu", matrix.GPUS)
def test_all_kernels_compile_as_the_table_says(gpu, operator):
    check_rows([row for row in matrix.rows() if (row.gpu, row.operator) == (gpu, operator)])
