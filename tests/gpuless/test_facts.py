"""What is read out of compiled kernels, on kernels where it is known."""

import pytest
import torch

from . import kernels
from .driver import stand_in
from .facts import facts


def product_facts(gpu: str, tile=(64, 64, 32), warps=4, stages=3, dtype=torch.float16):
    (rows, cols, depth) = tile
    a, b, c = torch.zeros(rows, 128, dtype=dtype), torch.zeros(128, cols, dtype=dtype), torch.zeros(rows, cols)
    with stand_in(gpu, execute=None) as driver:
        kernels.product_kernel[(1,)](
            a, b, c, 128, BM=rows, BN=cols, BK=depth, PRECISION="tf32", num_warps=warps, num_stages=stages
        )
    launch = driver.launches[-1]
    return facts(launch.asm, launch.metadata)


@pytest.mark.parametrize(
    ("gpu", "matrix"),
    [("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("sm_100", "tcgen05"), ("sm_120", "mma.sync"), ("gfx942", "mfma")],
)
def test_matrix_instructions_of_each_target(gpu, matrix):
    found = product_facts(gpu)
    assert (found.matrix, found.copy, found.spilled, found.warps) == (matrix, 16, 0, 4)
    assert found.registers > 0 and found.shared > 0


def test_more_stages_are_more_buffers():
    assert product_facts("sm_80", stages=2).buffers < product_facts("sm_80", stages=4).buffers


def test_a_tile_too_large_for_its_warps_spills():
    assert product_facts("sm_80", tile=(128, 128, 32), warps=1).spilled > 0
