"""The kernels on a card.

pytest -m gpu
compute-sanitizer --tool memcheck python -m pytest -m gpu -k random      # also: racecheck, initcheck, synccheck
"""

import copy

import pytest
import torch

from lottery_kernels import SparseConv2d, SparseLinear, sparsify
from lottery_kernels.gpu import tune

from .cases import BLOCKS, PRECISIONS, Layer, as_tensor_core, check, draw, precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: these kernels run on none here"),
    pytest.mark.usefixtures("nan_filled"),
]


def torchs(layer: Layer) -> dict[str, torch.Tensor]:
    """What PyTorch's own operators make of it on the same card, with an allowance: in exact fp32 they add partial sums,
    which is more exact, so that PyTorch on the CPU takes their place. In tf32 inputs are rounded as cuBLAS does it."""
    if layer.precision == "tf32":
        return as_tensor_core(layer, "cuda")
    return layer.dense(lambda t: t.clone(), "cpu" if layer.precision == "fp32" else "cuda")


def check_layer(layer: Layer) -> None:
    """Forward, dgrad and wgrad against fp64, and as exact as PyTorch's own operators."""
    with precision(layer.precision):
        exact, theirs = layer.dense(lambda t: t.double(), "cuda"), torchs(layer)
        for name, compute in layer.sparse("cuda").items():
            check(compute(), exact[name], theirs[name], f"{name} of {layer}")


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_random_layers(kind, name):
    for seed in range(30):
        check_layer(draw(kind, name, seed))


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("rows", BLOCKS)
@pytest.mark.parametrize("cols", BLOCKS)
def test_every_block(name, rows, cols):
    check_layer(Layer(name, (rows, cols), (384, 256), 300))
    check_layer(Layer(name, (rows, cols), (256, 128, 3, 3), 8, (14, 14), padding=(1, 1)))


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    conv = SparseConv2d(32, 64, 3, padding=1, mask=Layer("fp32", (32, 32), (64, 32, 3, 3), 1).mask(), block=(32, 32))
    linear = SparseLinear(64, 32, mask=Layer("fp32", (16, 16), (32, 64), 1).mask(), block=(16, 16))
    pool = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    return torch.nn.Sequential(conv, torch.nn.ReLU(), pool, linear).cuda()


def gradients(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def test_same_bits_every_time():
    model, x = network(), torch.randn(16, 32, 12, 12, device="cuda")
    for first, second in zip(gradients(model, x), gradients(model, x), strict=True):
        assert torch.equal(first, second)


def test_a_captured_step_replays_to_the_same_bits():
    model, x = network(), torch.randn(16, 32, 12, 12, device="cuda")
    expected = gradients(model, x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients(model, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(model, x)
    graph.replay()
    for one, other in zip(expected, captured, strict=True):
        assert torch.equal(one, other)


def test_compiles_without_a_graph_break():
    model, x = network(), torch.randn(16, 32, 12, 12, device="cuda")
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def test_gradients_of_gradients():
    layer = SparseLinear(64, 48, mask=Layer("fp32", (16, 16), (48, 64), 1).mask(), block=(16, 16)).cuda()
    dense = layer.to_dense()
    x = torch.randn(20, 64, device="cuda", requires_grad=True)
    twice = []
    for module in (layer, dense):
        (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        twice.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(*twice)


def test_sparsify_says_why_a_layer_stays_dense():
    dense = torch.nn.Sequential(torch.nn.Linear(64, 64)).cuda()
    choices = []
    sparsify(
        dense, {"0": torch.rand(64, 64) < 0.05}, block=(16, 16), when=lambda *given: choices.append(given) or False
    )
    assert choices and type(dense[0]) is torch.nn.Linear


@pytest.mark.parametrize("make", [lambda: SparseLinear(64, 48, block=(16, 16)), network], ids=["linear", "network"])
def test_a_model_and_its_input_on_different_devices(make):
    """Whichever comes first in a process: no kernel is loaded by then, or both are."""
    model = make().cpu()
    x = torch.randn(2, 64) if isinstance(model, SparseLinear) else torch.randn(2, 32, 12, 12)
    for one, other in ((model, x.cuda()), (copy.deepcopy(model).cuda(), x)):
        with pytest.raises((ValueError, RuntimeError), match=r"x is on c\w+(:0)?, (values|index) (are )?on c"):
            one(other)


def test_measured_tiles_compute_the_same_and_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOTTERY_KERNELS_TUNE", "1")
    tune.forget()
    try:
        check_layer(Layer("bf16", (32, 32), (512, 384), 300))
        check_layer(Layer("bf16", (32, 32), (128, 64, 3, 3), 8, (14, 14), padding=(1, 1)))
        assert list(tune.stored().values()) == [6]
    finally:
        tune.forget()
