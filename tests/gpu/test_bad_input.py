"""What the launchers refuse, before any work and by name; and what odd input they take."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lottery_kernels import Pattern
from lottery_kernels import gpu as package
from lottery_kernels.gpu import conv, conv_wgrad, launch, linear, settings, unsupported
from tests.gpuless import kernels
from tests.gpuless.driver import stand_in

from .cases import Layer

LINEAR = Layer("fp16", (16, 16), (32, 48), 5, density=0.5)
CONV = Layer("fp16", (16, 16), (32, 16, 3, 3), 2, (6, 6), groups=2, padding=(1, 1), density=0.5)


@pytest.fixture(autouse=True)
def gpu():
    with stand_in("sm_80", execute=None) as driver:
        yield driver


def arguments(layer: Layer) -> tuple:
    """(x, values, bias, dy, pattern)"""
    pattern, tensors = layer.pattern(), layer.tensors()
    return tensors["x"], pattern.pack(tensors["weight"]), tensors["bias"], tensors["dy"], pattern


def test_tensors_on_different_devices():
    x, values, bias, dy, pattern = arguments(LINEAR)
    with pytest.raises(ValueError, match="x is on meta, values are on cpu"):
        linear.linear(x.to("meta"), values, pattern)
    with pytest.raises(ValueError, match="bias is on meta"):
        linear.linear(x, values, pattern, bias.to("meta"))
    with pytest.raises(ValueError, match="dy is on meta"):
        linear.linear_wgrad(dy.to("meta"), x, pattern)
    with pytest.raises(ValueError, match="pattern is on cpu, values are on meta"):
        linear.linear(x, values.to("meta"), pattern)


def test_tensors_on_different_devices_in_a_convolution():
    x, values, bias, dy, pattern = arguments(CONV)
    options = CONV.geometry
    with pytest.raises(ValueError, match="x is on meta, values are on cpu"):
        conv.conv2d(x.to("meta"), values, pattern, **options)
    with pytest.raises(ValueError, match="bias is on meta, values are on cpu"):
        conv.conv2d(x, values, pattern, bias.to("meta"), **options)
    with pytest.raises(ValueError, match="dy is on meta, values are on cpu"):
        conv.conv2d_dgrad(dy.to("meta"), values, pattern, x.shape, **options)
    with pytest.raises(ValueError, match="dy is on meta, values are on cpu"):
        conv_wgrad.conv2d_wgrad(dy.to("meta"), x, pattern, **options)


@pytest.mark.parametrize("name", ["linear", "linear_dgrad", "linear_wgrad"])
def test_the_operators_kernel_refuses_them_too(name):
    """What torch's dispatcher calls as soon as one of the tensors is on a GPU."""
    x, values, bias, dy, pattern = arguments(LINEAR)
    index, shape = pattern.scheduled_index, pattern.weight_shape
    kernel = package._kernel(name, package._launchers()[name])
    calls = {
        "linear": (x.to("meta"), values, bias, index, shape),
        "linear_dgrad": (dy.to("meta"), values, index, shape),
        "linear_wgrad": (dy.to("meta"), x, index, shape, pattern.block),
    }
    with pytest.raises(ValueError, match=r"is on meta, (values|x) on cpu"):
        kernel(*calls[name])


def test_tensors_of_different_dtypes():
    x, values, _, dy, pattern = arguments(LINEAR)
    with pytest.raises(TypeError, match=r"x has dtype torch.float32, values have torch.float16"):
        linear.linear(x.float(), values, pattern)
    with pytest.raises(TypeError, match=r"dy has dtype torch.float32"):
        linear.linear_dgrad(dy.float(), values, pattern)


@pytest.mark.parametrize("block", [(8, 16), (16, 1), (48, 48), (256, 16)])
def test_blocks_without_a_kernel(block):
    x, values, _, _, pattern = arguments(replace(LINEAR, block=block, density=1.0))
    with pytest.raises(ValueError, match=rf"block \({block[0]}, {block[1]}\) has no GPU kernel: rows and cols must be"):
        linear.linear(x, values, pattern)
    assert unsupported(torch.float16, block) is not None


def test_dtypes_without_a_kernel():
    x, values, _, _, pattern = arguments(LINEAR)
    with pytest.raises(ValueError, match=r"torch.float64 has no GPU kernel"):
        linear.linear(x.double(), values.double(), pattern)


def test_gpus_that_are_too_old():
    old = settings.Target("cuda", 75, 40)
    assert "compute capability 7.5 is too old" in str(settings.unsupported(torch.float16, (16, 16), old))


@pytest.mark.parametrize("layer", [LINEAR, CONV], ids=["linear", "conv2d"])
def test_launchers_refuse_such_a_gpu(layer, monkeypatch):
    monkeypatch.setattr(settings.Target, "current", lambda: settings.Target("cuda", 75, 40))
    for compute in layer.sparse().values():
        with pytest.raises(ValueError, match=r"compute capability 7.5 is too old: the GPU kernels need 8.0"):
            compute()


def test_shapes_that_do_not_fit():
    x, values, bias, dy, pattern = arguments(LINEAR)
    with pytest.raises(ValueError, match=r"x has shape .* the weight needs 48 features"):
        linear.linear(x[:, :-1], values, pattern)
    with pytest.raises(ValueError, match="bias has shape"):
        linear.linear(x, values, pattern, bias[:-1])
    with pytest.raises(ValueError, match="values have shape"):
        linear.linear(x, values[1:], pattern)
    with pytest.raises(ValueError, match="x has 3 dimensions, this takes 2"):
        linear.linear(x[None], values, pattern)
    with pytest.raises(ValueError, match="dy has 5 rows, x has 4"):
        linear.linear_wgrad(dy, x[:-1], pattern)


def test_shapes_that_do_not_fit_a_convolution():
    x, values, _, dy, pattern = arguments(CONV)
    options = CONV.geometry
    with pytest.raises(ValueError, match=r"dy has shape .* height and width"):
        conv.conv2d_dgrad(dy[:, :, 1:], values, pattern, x.shape, **options)
    with pytest.raises(ValueError, match="dy has 2 images, x has 1"):
        conv_wgrad.conv2d_wgrad(dy, x[:1], pattern, **options)
    with pytest.raises(ValueError, match="x has 3 dimensions, this takes 4"):
        conv.conv2d(x[0], values, pattern, **options)
    with pytest.raises(ValueError, match=r"kernel .* is larger than"):
        conv.conv2d(x[:, :, :2, :2], values, pattern, groups=2)


def test_groups_that_do_not_fit():
    x, values, _, dy, pattern = arguments(CONV)
    with pytest.raises(ValueError, match="groups=1, but the pattern was made for 2"):
        conv.conv2d(x[:, :16], values, pattern)
    with pytest.raises(ValueError, match="dy has 32 features, which groups=3 does not divide"):
        rest = (CONV.weight_shape, (2, 48, 6, 6), (1, 1), (1, 1), (1, 1), 3)
        conv.transposed_product(dy, values, pattern.scheduled_index, *rest)


def test_the_index_of_a_pattern_on_the_cpu():
    x, values, _, _, pattern = arguments(LINEAR)
    with pytest.raises(ValueError, match="index holds 5 arrays on cpu"):
        linear.product(x, values, None, pattern.index, LINEAR.weight_shape)


def test_a_launch_that_does_not_fit_the_gpu(monkeypatch):
    x, values, _, _, pattern = arguments(Layer("fp16", (64, 64), (64, 768), 128, density=1.0))
    monkeypatch.setattr(launch, "product_tile", lambda *args, **options: settings.Tile(128, 64, 64, 4, 12))
    with pytest.raises(RuntimeError, match=r"linear_product_kernel does not fit this GPU .*arch=80"):
        linear.linear(x, values, pattern)


@pytest.mark.parametrize("error", ["an illegal memory access was encountered", "invalid argument"])
def test_an_error_of_the_driver_at_launch(gpu, monkeypatch, error):
    def run(launch: object) -> None:
        raise RuntimeError(f"Triton Error [CUDA]: {error}")

    x, values, _, _, pattern = arguments(LINEAR)
    monkeypatch.setattr(gpu, "run", run)
    expected = rf"linear_product_kernel could not be launched on cpu .*arch=80.*{error}.*CUDA_LAUNCH_BLOCKING=1"
    with pytest.raises(RuntimeError, match=expected):
        linear.linear(x, values, pattern)


def test_more_programs_than_a_launch_can_have():
    with pytest.raises(
        ValueError, match=r"scale_kernel would need 2147483648 programs; a launch has at most 2147483647"
    ):
        launch.launch(kernels.scale_kernel, 2**31, (torch.empty(1),), None)


@pytest.mark.parametrize("layer", [LINEAR, CONV], ids=["linear", "conv2d"])
def test_a_bias_of_any_stride(layer):
    """As a slice or a broadcast: the other arguments' strides are drawn with the random layers."""
    x, values, bias, _, pattern = arguments(layer)

    def product(bias: torch.Tensor) -> torch.Tensor:
        if layer is CONV:
            return conv.conv2d(x, values, pattern, bias, **layer.geometry)
        return linear.linear(x, values, pattern, bias)

    with stand_in("sm_80"):
        spread = torch.stack([bias, torch.full_like(bias, torch.nan)], 1)[:, 0]
        assert not spread.is_contiguous()
        assert torch.equal(product(spread), product(bias))
        broadcast = bias[:1].expand(len(bias))
        assert torch.equal(product(broadcast), product(broadcast.contiguous()))


@pytest.mark.parametrize("layer", [LINEAR, CONV], ids=["linear", "conv2d"])
def test_gradients_that_are_broadcast(layer):
    """As autograd hands them on from a sum: all strides are 0."""
    x, values, _, dy, pattern = arguments(layer)
    one = torch.ones((), dtype=dy.dtype).expand(dy.shape)
    with stand_in("sm_80"):
        if layer is CONV:
            found = [
                [conv.conv2d_dgrad(dy, values, pattern, x.shape, **layer.geometry),
                 conv_wgrad.conv2d_wgrad(dy, x, pattern, **layer.geometry)]
                for dy in (one, one.contiguous())
            ]  # fmt: skip
        else:
            found = [
                [linear.linear_dgrad(dy, values, pattern), linear.linear_wgrad(dy, x, pattern)]
                for dy in (one, one.contiguous())
            ]
    for broadcast, whole in zip(*found, strict=True):
        assert torch.equal(broadcast, whole)


@pytest.mark.parametrize("layer", [replace(LINEAR, batch=0), replace(CONV, batch=0)], ids=["linear", "conv2d"])
def test_empty_batches(layer):
    with stand_in("sm_80"):
        results = {name: compute() for name, compute in layer.sparse().items()}
    assert results["y"].numel() == results["dx"].numel() == 0
    assert (results["dvalues"] == 0).all()


def test_nothing_live_gives_the_bias():
    layer = replace(LINEAR, density=0.0)
    _, _, bias, _, pattern = arguments(layer)
    assert pattern.nnz == 0
    with stand_in("sm_80"):
        results = {name: compute() for name, compute in layer.sparse().items()}
    assert torch.equal(results["y"], bias.expand(5, -1))
    assert (results["dx"] == 0).all() and results["dvalues"].shape == (0, 16, 16)


@pytest.mark.parametrize("broken", ["raise ImportError('none here')", "raise OSError('libtriton.so is damaged')"])
def test_without_triton_everything_else_works(broken, tmp_path: Path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(broken)
    program = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import torch
from lottery_kernels import SparseLinear, gpu
assert SparseLinear(4, 3)(torch.ones(2, 4)).shape == (2, 3)
print(gpu.load(), gpu.unsupported(torch.float16, (16, 16)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    message = broken.split("'")[1]
    assert done.stdout.startswith("False triton cannot be imported: ") and message in done.stdout


def test_patterns_of_another_block():
    x, values, _, _, _ = arguments(LINEAR)
    other = Pattern.from_mask(torch.ones(32, 48, dtype=torch.bool), (32, 16))
    with pytest.raises(ValueError, match="values have shape"):
        linear.linear(x, values, other)
