"""Sparse layers under compilers and DistributedDataParallel."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.compiler import config as compiler_config

from tests.kernels.layer_cases import LAYERS, assert_same_training, dense_masked, sparse_linear

# Compilers


@pytest.mark.parametrize(("make", "shape"), LAYERS)
@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_one_compiled_graph_serves_fifteen_masks(make, shape, block):
    torch._dynamo.reset()
    layer = make(block)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for i in range(15):
        density = 0.9 * 0.8**i
        layer.set_mask(torch.rand_like(layer.weight) < density)
        assert_same_training(layer, dense_masked(layer), torch.randn(shape, dtype=torch.float64))
        layer.zero_grad()
        x = torch.randn(shape, dtype=torch.float64)
        y = compiled(x)
        torch.testing.assert_close(y, layer(x))
        y.sum().backward()
        found, layer.values.grad = layer.values.grad, None
        layer(x).sum().backward()
        torch.testing.assert_close(found, layer.values.grad)
    assert counter.frame_count <= 3


# What another version of the kernels compiled is no test of this one, and the cache cannot tell them apart.
@compiler_config.patch(force_disable_caches=True)
def test_inductor_trains_as_eager_does():
    torch._dynamo.reset()
    layer = sparse_linear(dtype=torch.float32)
    compiled = torch.compile(nn.Sequential(layer, nn.ReLU()), fullgraph=True)
    for density in (0.5, 0.2):
        layer.set_mask(torch.rand(11, 13) < density)
        x = torch.randn(5, 13)
        grads = []
        for forward in (compiled, lambda x: layer(x).relu()):
            layer.values.grad = None
            y = forward(x)
            y.square().sum().backward()
            grads.append(layer.values.grad)
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_export_with_a_dynamic_batch(make, shape):
    layer = make((4, 4)).eval()
    x, more = torch.randn(shape, dtype=torch.float64), torch.randn(9, *shape[1:], dtype=torch.float64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(more), layer(more))


# DistributedDataParallel


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_training_inside_ddp_and_no_new_mask_there(process_group):
    layer = sparse_linear()
    model = nn.parallel.DistributedDataParallel(nn.Sequential(layer, nn.ReLU()))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    dense, x = dense_masked(layer), torch.randn(5, 13, dtype=torch.float64)
    model(x).sum().backward()
    dense(x).relu().sum().backward()
    torch.testing.assert_close(layer.values.grad, layer.pattern.pack(dense.weight_orig.grad))
    optimizer.step()
    state, before = model.state_dict(), layer.weight.detach()
    changed = state | {"module.0.weight_mask": ~layer.mask}
    with pytest.raises(RuntimeError, match="inside DistributedDataParallel"):
        layer.set_mask(~layer.mask)
    with pytest.raises(RuntimeError, match="inside DistributedDataParallel"):
        model.load_state_dict(changed)
    assert torch.equal(layer.weight, before)
    model.load_state_dict(state)  # under the same mask: fine
    model(x).sum().backward()


def test_a_new_mask_after_ddp_is_gone(process_group):
    layer = sparse_linear()
    model = nn.parallel.DistributedDataParallel(layer)
    x = torch.randn(5, 13, dtype=torch.float64)
    model(x).sum().backward()
    del model
    layer.set_mask(~layer.mask)
    model = nn.parallel.DistributedDataParallel(layer)
    model(x).sum().backward()
    assert layer.values.grad.shape == layer.values.shape
