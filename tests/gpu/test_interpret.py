"""Small ragged layers in the interpreter: no access out of bounds, no race, the arithmetic of the live blocks."""

import pytest

from tests.gpuless.driver import stand_in

from .cases import Layer, as_tensor_core, check, precision

pytestmark = pytest.mark.usefixtures("nan_filled")
LAYERS = {
    "ragged linear": Layer("bf16", (16, 32), (21, 40), 17, density=0.5, relu=True),
    "finer mask in tf32": Layer("tf32", (32, 16), (33, 20), 3, density=0.7, fine=True),
    "one row in fp32": Layer("fp32", (16, 16), (17, 15), 1, density=1.0),
    "strided convolution": Layer("bf16", (16, 16), (10, 18, 2, 2), 1, (5, 4), (2, 1), (1, 0), density=0.5),
    "dilated groups": Layer("fp16", (16, 16), (34, 9, 1, 2), 1, (3, 5), padding=(1, 0), dilation=(1, 2), groups=2),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_results_bounds_and_races(layer):
    exact, torchs = layer.dense(lambda t: t.double()), as_tensor_core(layer)
    with stand_in("sm_80", execute="interpreter"), precision(layer.precision):
        for name, compute in layer.sparse().items():
            check(compute(), exact[name], torchs[name], f"{name} of {layer}")


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_arithmetic_is_that_of_the_live_blocks(density):
    layer = Layer("fp16", (32, 16), (64, 48), 128, density=density)
    pattern = layer.pattern()
    with stand_in("sm_80", execute="interpreter") as gpu:
        for compute in layer.sparse().values():
            compute()
    products = [launch.counts["multiply-adds"] for launch in gpu.launches if launch.name != "add_parts_kernel"]
    assert products == [128 * pattern.nnz * 32 * 16] * (3 if pattern.nnz else 2)
