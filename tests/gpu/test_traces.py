"""The operators on CUDA tensors that have no data: what a compiler, a fake mode or autocast needs to know of them."""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lottery_kernels import gpu, operators
from tests.gpuless.driver import stand_in

from .cases import Layer

LAYERS = {
    "linear": Layer("fp16", (16, 32), (48, 40), 6),
    "conv2d": Layer("fp16", (16, 16), (32, 24, 3, 3), 2, (7, 5), (2, 1), (1, 1)),
}
KINDS = pytest.mark.parametrize("kind", LAYERS)


def calls(kind: str) -> dict:
    """The three operators of a kind on fake CUDA tensors, to be made and called inside of a FakeTensorMode."""
    layer = LAYERS[kind]

    def fake(*tensors):
        return [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors]

    index = fake(*INDICES[kind])
    values = torch.empty(INDICES[kind][1].shape[0], *layer.block, dtype=layer.dtype, device="cuda")
    x, bias, dy = fake(*(TENSORS[kind][name] for name in ("x", "bias", "dy")))
    shape = layer.weight_shape
    if layer.image is None:
        rest, x_shape = (), ()
    else:
        rest, x_shape = tuple(layer.geometry.values()), (x.shape,)
    return {
        "y": functools.partial(getattr(operators, kind), x, values, bias, index, shape, *rest),
        "dx": functools.partial(getattr(operators, f"{kind}_dgrad"), dy, values, index, shape, *x_shape, *rest),
        "dvalues": functools.partial(getattr(operators, f"{kind}_wgrad"), dy, x, index, shape, layer.block, *rest),
    }


INDICES = {kind: layer.pattern().scheduled_index for kind, layer in LAYERS.items()}
TENSORS = {kind: layer.tensors() for kind, layer in LAYERS.items()}


@KINDS
def test_fake_results_are_those_of_the_launchers(kind):
    with stand_in("sm_80", execute=None):
        launched = {name: compute() for name, compute in LAYERS[kind].sparse().items()}
    with FakeTensorMode():
        for name, call in calls(kind).items():
            fake = call()
            assert fake.device.type == "cuda"
            assert (fake.shape, fake.stride()) == (launched[name].shape, launched[name].stride()), name
            assert fake.dtype == launched[name].dtype


@KINDS
def test_autocast_casts_to_its_dtype(kind):
    """`torch.autocast` turns itself off without a card, so its switch is set."""
    with FakeTensorMode():
        made = calls(kind)
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            assert {name: call().dtype for name, call in made.items()} == dict.fromkeys(made, torch.bfloat16)
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", torch.float16)


@KINDS
def test_traces_keep_the_operators_whole(kind):
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, call in calls(kind).items():
            x, *rest = call.args
            graph = make_fx(lambda x: call.func(x, *rest))(x)  # noqa: B023
            targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
            assert targets == [call.func], name


@KINDS
def test_compiles_without_a_graph_break(kind):
    with FakeTensorMode() as mode:
        call = calls(kind)["y"]
        compiled = torch.compile(lambda x, *rest: call.func(x, *rest).relu(), backend="eager", fullgraph=True)
        y = compiled(*call.args)
        assert y.fake_mode is mode and y.device.type == "cuda" and y.shape == call().shape


@pytest.mark.parametrize("name", operators.SCHEMAS)
def test_cuda_kernels_are_registered(name):
    assert gpu.load()
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lottery_kernels::{name}", "CUDA")
