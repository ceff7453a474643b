"""Results of the compiled kernels, launched by the project's own code and executed by the emulator."""

from unittest import mock

import pytest
import torch

from lottery_kernels.gpu import conv, conv_wgrad, linear
from tests.gpuless.driver import stand_in

from .cases import PRECISIONS, Layer, as_tensor_core, check, draw, draw_long, precision

GPUS = pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
pytestmark = pytest.mark.usefixtures("nan_filled")
SEEDS = 2  # random layers of each kind, target and precision in every run; the long sweep goes on from there
LONG_SWEEP = 25
LONG_BATCHES = 6


def check_layer(layer: Layer, gpu: str) -> None:
    """Forward, dgrad and wgrad of `layer` on `gpu` against fp64, and as exact as torch's own operators."""
    exact, torchs = layer.dense(lambda t: t.double()), as_tensor_core(layer)
    with stand_in(gpu), precision(layer.precision):
        for name, compute in layer.sparse().items():
            check(compute(), exact[name], torchs[name], f"{name} on {gpu} of {layer}")


@GPUS
@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_random_layers(gpu, name, kind):
    for seed in range(SEEDS):
        check_layer(draw(kind, name, seed), gpu)


@pytest.mark.matrix
@GPUS
@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("seed", range(SEEDS, SEEDS + LONG_SWEEP))
def test_more_random_layers(gpu, name, kind, seed):
    check_layer(draw(kind, name, seed), gpu)


@pytest.mark.matrix
@GPUS
@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("seed", range(LONG_BATCHES))
def test_random_layers_with_long_batches(gpu, name, kind, seed):
    check_layer(draw_long(kind, name, seed), gpu)


@GPUS
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_all_pruned_and_full(gpu, kind, density):
    image = (5, 6) if kind == "conv2d" else None
    shape = (48, 32, 3, 3) if image else (48, 80)
    check_layer(Layer("bf16", (32, 16), shape, 3, image, padding=(1, 1), density=density), gpu)


def test_the_batch_is_cut_where_few_blocks_are_live():
    """Two phases: partial sums of parts of the batch, then their sum in a fixed order, the same bits every time."""
    layer = Layer("bf16", (32, 32), (64, 64), 2100, density=0.5, fine=True)
    check_layer(layer, "sm_90")
    with stand_in("sm_90") as gpu:
        compute = layer.sparse()["dvalues"]
        assert (compute() == compute()).all()
    assert [launch.name for launch in gpu.launches[:2]] == ["linear_wgrad_kernel", "add_parts_kernel"]
    assert gpu.launches[0].grid[0] > layer.pattern().nnz


@GPUS
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (16, 64)])
def test_steps_in_pairs_and_weight_gradients_of_several_blocks(gpu, block):
    """What long batches and lines of many blocks take, with tails, empty rows and an odd number of blocks."""
    check_layer(Layer("bf16", block, (72, 1100), 1100, density=0.5, fine=True, relu=True, together=2), gpu)
    check_layer(Layer("fp16", block, (144, 208), 1024, density=0.1, seed=1), gpu)


@pytest.mark.parametrize("rows", [1280, 1536])
@pytest.mark.parametrize("density", [0.2, 0.6])
def test_batches_that_fill_the_steps_of_several_blocks_but_not_of_fewer(rows, density):
    """Without masks in the loop, a step that is longer where blocks are summed one by one ends with the batch too."""
    check_layer(Layer("fp16", (16, 16), (144, 208), rows, density=density, seed=1), "sm_80")


@GPUS
@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize(("block", "image", "stride"), [((16, 16), (4, 4), (1, 1)), ((32, 32), (8, 16), (1, 2))])
def test_images_that_fill_a_step_of_the_weight_gradient_exactly(gpu, name, block, image, stride):
    check_layer(Layer(name, block, (64, 40, 3, 3), 9, image, stride, padding=(1, 1)), gpu)


def with_tensors(tensors: dict[str, torch.Tensor]):
    """Layers have these inputs."""
    return mock.patch.object(Layer, "tensors", lambda *_: tensors)


@GPUS
@pytest.mark.parametrize("image", [None, (4, 6)])
def test_tf32_computes_exactly_what_it_can_hold_and_loses_no_nan(gpu, image):
    """NaNs of all ones, as a GPU makes them, too."""
    layer = Layer("tf32", (32, 16), (40, 48, 3, 3) if image else (40, 48), 70, image, padding=(1, 1), bias=False)
    whole = {name: (8 * t).round() for name, t in layer.tensors().items()}
    with with_tensors(whole), stand_in(gpu), precision("tf32"):
        exact = layer.dense(lambda t: t.double())
        for name, compute in layer.sparse().items():
            assert (compute() == exact[name]).all(), name
    for name, source in {"y": "weight", "dx": "weight", "dvalues": "dy"}.items():
        nan = torch.full_like(whole[source], 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
        with with_tensors(whole | {source: nan}), stand_in(gpu), precision("tf32"):
            assert layer.sparse()[name]().isnan().any(), name


@GPUS
@pytest.mark.parametrize("image", [None, (4, 6)])
@pytest.mark.parametrize(("activations", "most"), [(torch.float32, 1.2), (torch.bfloat16, 1.75)])
def test_tf32_errs_little_more_than_with_rounded_operands(gpu, image, activations, most):
    """On the whole of a layer, and less than twice as much also where activations have no bits to lose."""
    layer = Layer("tf32", (32, 32), (64, 96, 3, 3) if image else (128, 256), 128, image, padding=(1, 1), bias=False)
    inputs = layer.tensors()
    inputs |= {name: inputs[name].to(activations).float() for name in ("x", "dy")}
    with with_tensors(inputs), stand_in(gpu), precision("tf32"):
        exact, rounded = layer.dense(lambda t: t.double()), as_tensor_core(layer)
        for name, compute in layer.sparse().items():
            ours, theirs = ((result - exact[name]).norm() for result in (compute(), rounded[name]))
            assert ours < most * theirs, f"{name}: {ours / theirs}"


@pytest.mark.parametrize(("block", "groups", "density"), [((16, 16), 1, 0.6), ((16, 16), 2, 0.2), ((32, 32), 2, 0.5)])
def test_blocks_of_a_row_are_summed_together_and_those_at_its_ends_apart(block, groups, density):
    """Four, two or one in a product."""
    options = {"padding": (1, 1), "groups": groups, "density": density, "fine": True}
    layer = Layer("bf16", block, (64 * groups, 72, 3, 3), 64, (4, 8), (1, 2), **options)
    check_layer(layer, "sm_80")
    with stand_in("sm_80", execute=None) as gpu:
        layer.sparse()["dvalues"]()
    launch = gpu.launches[0]
    assert dict(zip(launch.source.arg_names, launch.args, strict=True))["BLOCKS"] == 64 // block[1]


@GPUS
def test_strides_beyond_32_bits(gpu):
    """One row, of features or of an image, may have any stride."""
    far = 2**40
    for layer in (
        Layer("fp16", (16, 16), (32, 48), 1, density=0.7),
        Layer("fp16", (16, 16), (32, 16, 3, 3), 2, (1, 5), padding=(1, 1), density=0.7),
    ):
        pattern, tensors = layer.pattern(), layer.tensors()
        x, dy, values = tensors["x"], tensors["dy"], pattern.pack(tensors["weight"])
        strides = (far, 1) if layer.image is None else (x.stride(0), 1, far, x.stride(3))
        exact, torchs = layer.dense(lambda t: t.double()), as_tensor_core(layer)
        with stand_in(gpu):
            kind, options = (linear, {}) if layer.image is None else (conv, layer.geometry)
            forward, wgrad = (
                (kind.linear, kind.linear_wgrad) if kind is linear else (conv.conv2d, conv_wgrad.conv2d_wgrad)
            )
            y = forward(x.as_strided(x.shape, strides), values, pattern, tensors["bias"], **options)
            dvalues = wgrad(dy, x.as_strided(x.shape, strides), pattern, **options)
        check(y, exact["y"], torchs["y"], f"y of {layer}")
        check(dvalues, exact["dvalues"], torchs["dvalues"], f"dvalues of {layer}")


@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (2, 2)])
def test_matrix_instructions_are_proportional_to_live_blocks(stride):
    """In every pass of a convolution no tap and no block is computed that is not live, with strides neither."""
    layers = [
        Layer("fp16", (32, 32), (64, 64, 3, 3), 2, (8, 8), stride, padding=(1, 1), density=density)
        for density in (0.2, 1.0)
    ]
    counts = []
    for layer in layers:
        with stand_in("sm_80", races=False) as gpu:
            for compute in layer.sparse().values():
                compute()
        counts.append([launch.counts["mma"] for launch in gpu.launches if launch.counts["mma"]])
    few, all_ = (layer.pattern().nnz for layer in layers)
    assert 0 < few < all_ == 36
    # With strides each tap is seen by one phase of dgrad, which all have equally many pixels here.
    assert [some * all_ for some in counts[0]] == [full * few for full in counts[1]]


@pytest.mark.parametrize("block", [(16, 16), (32, 32)])
def test_matrix_instructions_of_linear_layers_are_proportional_to_live_blocks(block):
    """However many steps a turn has and however many blocks share a program."""
    few, full = (Layer("fp16", block, (64, 832), 1024, density=density, together=2) for density in (0.4, 1.0))
    counts = []
    for layer in (few, full):
        with stand_in("sm_80", races=False) as gpu:
            for compute in layer.sparse().values():
                compute()
        counts.append([launch.counts["mma"] for launch in gpu.launches if launch.counts["mma"]])
    some, all_ = (layer.pattern().nnz for layer in (few, full))
    assert 0 < some < all_ == 64 * 832 // (block[0] * block[1])
    assert [count * all_ for count in counts[0]] == [count * some for count in counts[1]]
