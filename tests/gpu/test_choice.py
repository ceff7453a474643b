"""Where a GPU's sparse kernels cannot win, and why."""

import pytest
import torch

from lottery_kernels.gpu import nothing_to_save


@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [
        ((300, 100), 1, torch.float16),
        ((256, 256), 1, torch.bfloat16),
        ((16, 16, 3, 3), 1, torch.bfloat16),
        ((512, 1, 3, 3), 512, torch.float16),  # depthwise
        ((10, 84), 1, torch.float32),
    ],
)
def test_narrow_layers_stay_dense(shape, groups, dtype):
    assert "too narrow" in str(nothing_to_save(shape, groups, dtype))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2048, 784), torch.float16),
        ((1024, 1024), torch.bfloat16),
        ((512, 512, 3, 3), torch.bfloat16),
        ((300, 784), torch.float32),
    ],
)
def test_wide_layers_may_win(shape, dtype):
    assert nothing_to_save(shape, 1, dtype) is None
