"""What the sparse layers promise: dense masked results, and all that one does with a layer besides calling it."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.compiler import config as compiler_config
from torch.nn.utils import prune

from lottery_kernels import SparseConv2d, SparseLinear

BLOCKS = [(1, 1), (4, 4), (3, 2)]


def dense_masked(layer: nn.Module) -> nn.Module:
    """The dense layer of the same weight, masked by `torch.nn.utils.prune`."""
    return prune.custom_from_mask(layer.to_dense(), "weight", layer.mask)


def sparse_linear(block=(1, 1), density=0.3, dtype=torch.float64, **options) -> SparseLinear:
    return SparseLinear(13, 11, mask=torch.rand(11, 13) < density, block=block, dtype=dtype, **options)


def sparse_conv(block=(1, 1), density=0.3, dtype=torch.float64, groups=2, **options) -> SparseConv2d:
    mask = torch.rand(6, 8 // groups, 3, 3) < density
    return SparseConv2d(8, 6, 3, mask=mask, block=block, dtype=dtype, groups=groups, **options)


LAYERS = [pytest.param(sparse_linear, (5, 13), id="linear"), pytest.param(sparse_conv, (2, 8, 6, 6), id="conv")]


def assert_same_training(sparse: nn.Module, dense: nn.Module, x: torch.Tensor) -> None:
    """Output, input gradient and parameter gradients equal those of the dense masked layer."""
    sparse.zero_grad()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(batch) for layer, batch in zip((sparse, dense), inputs, strict=True)]
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(sparse.values.grad, sparse.pattern.pack(dense.weight_orig.grad))
    if dense.bias is not None:
        torch.testing.assert_close(sparse.bias.grad, dense.bias.grad)


# Results


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_training_equals_dense_masked(make, shape, block, density):
    layer = make(block, density)
    assert_same_training(layer, dense_masked(layer), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(13,), (0, 13), (1, 13), (2, 3, 13), (2, 0, 13), (2, 1, 3, 13)])
def test_linear_takes_any_leading_shape(shape):
    layer = sparse_linear()
    assert_same_training(layer, dense_masked(layer), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_the_input_may_be_named(make, shape):
    layer, x = make(), torch.randn(shape, dtype=torch.float64)
    assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("shape", [(8, 6, 7), (0, 8, 6, 7), (1, 8, 3, 3)])
def test_conv_takes_unbatched_images_and_empty_batches(shape):
    layer = sparse_conv()
    assert_same_training(layer, dense_masked(layer), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": (2, 1), "dilation": (1, 2)},
        {"padding": "same"},
        {"padding": "same", "dilation": (1, 2), "padding_mode": "reflect"},
        {"padding": "valid", "bias": False},
        {"padding": 1, "padding_mode": "circular"},
        {"groups": 1},
    ],
    ids=str,
)
def test_conv_takes_what_nn_conv2d_takes(options):
    layer = sparse_conv(**options)
    assert_same_training(layer, dense_masked(layer), torch.randn(2, 8, 7, 9, dtype=torch.float64))


def test_same_padding_of_an_even_kernel():
    """Which pads one side more than the other."""
    layer = SparseConv2d(3, 4, (2, 4), padding="same", dtype=torch.float64)
    assert_same_training(layer, dense_masked(layer), torch.randn(2, 3, 5, 6, dtype=torch.float64))


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_layers_without_features(sizes):
    y = SparseLinear(*sizes)(torch.randn(2, sizes[0]))
    assert y.shape == (2, sizes[1])


@pytest.mark.parametrize("shape", [(5, 12), (12,), ()])
def test_an_input_of_the_wrong_width_is_named(shape):
    with pytest.raises(ValueError, match=r"input has shape \(.*in_features=13"):
        sparse_linear()(torch.randn(shape, dtype=torch.float64))


def test_an_image_of_the_wrong_channels_is_named():
    with pytest.raises(ValueError, match=r"input has shape \(2, 7, 6, 6\).*\[N, 8, H, W\]"):
        sparse_conv()(torch.randn(2, 7, 6, 6, dtype=torch.float64))


def test_from_dense_takes_its_own_kind_alone():
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Linear, got Conv2d"):
        SparseLinear.from_dense(nn.Conv2d(3, 4, 1))
    with pytest.raises(TypeError, match=r"conv must be a torch\.nn\.Conv2d, got Linear"):
        SparseConv2d.from_dense(nn.Linear(3, 4))


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (torch.ones(13, 11, dtype=torch.bool), ValueError, r"mask has shape \(13, 11\), the weight's is \(11, 13\)"),
        (torch.ones(11, 13), TypeError, "mask must be a bool tensor.*float32"),
        ([[True] * 13] * 11, TypeError, "mask must be a bool tensor.*list"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(mask, error, words):
    with pytest.raises(error, match=words):
        SparseLinear(13, 11, mask=mask)
    layer = sparse_linear()
    before = layer.weight
    with pytest.raises(error, match=words):
        layer.set_mask(mask)
    assert torch.equal(layer.weight, before)


# To and from dense layers


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dense", [nn.Linear(13, 11), nn.Conv2d(8, 6, 3, 2, "valid", 1, 2, False)])
def test_from_dense_and_back_gives_the_same_bits(dense, block):
    mask = torch.rand_like(dense.weight) < 0.4
    kind = SparseLinear if isinstance(dense, nn.Linear) else SparseConv2d
    back = kind.from_dense(dense.eval(), mask, block).to_dense()
    assert type(back) is type(dense)
    assert repr(back) == repr(dense)
    assert not back.training
    assert torch.equal(back.weight, dense.weight.where(mask, torch.zeros(())))
    assert (back.bias is None) == (dense.bias is None)
    assert back.bias is None or torch.equal(back.bias, dense.bias)


def test_copies_are_independent():
    dense = nn.Linear(13, 11)
    layer = SparseLinear.from_dense(dense)
    back = layer.to_dense()
    with torch.no_grad():
        layer.values.zero_()
        layer.bias.zero_()
    assert dense.weight.all()
    assert dense.bias.all()
    assert back.weight.all()
    assert back.bias.all()


def test_from_dense_takes_what_prune_left_even_after_an_optimizer_step():
    """prune's `weight` is that of the last forward."""
    dense = prune.random_unstructured(nn.Linear(13, 11), "weight", 0.5)
    with torch.no_grad():
        dense.weight_orig.add_(1)
    layer = SparseLinear.from_dense(dense)
    assert torch.equal(layer.mask, dense.weight_mask.bool())
    assert torch.equal(layer.weight, dense.weight_orig * dense.weight_mask)


def test_from_dense_keeps_trainability_and_draws_no_random_numbers():
    dense = nn.Linear(13, 11).requires_grad_(False)
    state = torch.get_rng_state()
    layer = SparseLinear.from_dense(dense)
    assert torch.equal(torch.get_rng_state(), state)
    assert not layer.values.requires_grad
    assert not layer.bias.requires_grad
    assert not layer.to_dense().weight.requires_grad


@pytest.mark.parametrize("bias", [True, False])
def test_the_same_seed_draws_the_dense_layers_survivors(bias):
    torch.manual_seed(3)
    dense = [nn.Linear(13, 11, bias), nn.Conv2d(4, 6, 3, bias=bias)]
    masks = [torch.rand_like(layer.weight) < 0.5 for layer in dense]
    torch.manual_seed(3)
    sparse = [SparseLinear(13, 11, bias, mask=masks[0]), SparseConv2d(4, 6, 3, bias=bias, mask=masks[1])]
    for one, other, mask in zip(dense, sparse, masks, strict=True):
        assert torch.equal(other.weight, one.weight.where(mask, torch.zeros(())))
        assert not bias or torch.equal(other.bias, one.bias)


def test_values_are_a_leaf_as_small_as_the_mask():
    layer = sparse_linear(density=0.2)
    assert layer.values.is_leaf
    assert layer.values.numel() == layer.mask.sum()
    assert layer.density == layer.mask.double().mean()
    assert {name for name, _ in layer.named_parameters()} == {"values", "bias"}
    assert not list(layer.buffers())


def test_weight_is_dense_and_differentiable():
    layer = sparse_linear((4, 4))
    assert torch.equal(layer.weight, layer.weight * layer.mask)
    layer.weight.sum().backward()
    assert torch.equal(layer.values.grad, layer.pattern.pack(torch.ones_like(layer.weight)))


# Changing the mask


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_a_new_mask_keeps_survivors_and_starts_others_at_zero(make, shape, block):
    layer = make(block)
    before, values = layer.weight.detach(), layer.values
    mask = torch.rand_like(before) < 0.4
    layer(torch.randn(shape, dtype=torch.float64)).sum().backward()
    layer.set_mask(mask)
    assert layer.values is values
    assert layer.values.grad is None
    assert torch.equal(layer.mask, mask)
    assert torch.equal(layer.weight, before.where(mask, torch.zeros((), dtype=torch.float64)))
    assert_same_training(layer, dense_masked(layer), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("fused", [False, True])
def test_a_new_mask_carries_the_optimizers_state_along(block, fused):
    layer = sparse_linear(block, density=0.6)
    optimizer = torch.optim.Adam(layer.parameters(), amsgrad=True, fused=fused)
    x = torch.randn(5, 13, dtype=torch.float64)
    layer(x).square().sum().backward()
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[layer.values].items()}
    pattern, mask = layer.pattern, torch.rand(11, 13) < 0.5
    layer.set_mask(mask, optimizer)
    state = optimizer.state[layer.values]
    assert state.keys() == before.keys()
    assert torch.equal(state["step"], before["step"])
    for key in state.keys() - {"step"}:
        expected = pattern.unpack(before[key]).where(mask, torch.zeros((), dtype=torch.float64))
        assert torch.equal(layer.pattern.unpack(state[key]), expected)
    layer(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight, layer.weight * mask)


def test_an_optimizer_that_does_not_hold_the_layer_is_refused():
    layer = sparse_linear()
    with pytest.raises(ValueError, match="optimizer does not hold"):
        layer.set_mask(~layer.mask, torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1))


def test_a_new_mask_while_an_old_graph_is_alive():
    """A loss that is still referenced must not make the leaf remember its old size."""
    layer = sparse_linear()
    losses = []
    for density in (0.2, 0.6, 0.05):
        layer.set_mask(torch.rand(11, 13) < density)
        loss = layer(torch.randn(5, 13, dtype=torch.float64)).sum()
        loss.backward()
        assert layer.values.grad.shape == layer.values.shape
        losses.append(loss)


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_a_new_mask_between_forward_and_backward_is_an_error(make, shape):
    layer = make()
    loss = layer(torch.randn(shape, dtype=torch.float64, requires_grad=True)).sum()
    layer.set_mask(layer.mask)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_positions_of_tail_blocks_stay_zero_under_every_optimizer():
    layer = sparse_linear((4, 4), density=0.5)
    x = torch.randn(5, 13, dtype=torch.float64)
    for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.SGD):
        optimizer = kind(layer.parameters(), lr=0.1, weight_decay=0.1)
        layer(x).sum().backward()
        optimizer.step()
        assert (layer.values[~layer.pattern.alive] == 0).all(), kind


# State dicts


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_state_dicts_are_dense_and_carry_the_mask(make, shape, assign):
    layer, other = make((4, 4)), make((1, 1), density=0.7)
    state = layer.state_dict()
    assert {key: value.shape for key, value in state.items()} == {
        "weight": layer.weight.shape,
        "weight_mask": layer.weight.shape,
        "bias": layer.bias.shape,
    }
    assert state["weight_mask"].dtype == torch.bool
    values = other.values
    other.load_state_dict(state, assign=assign)
    assert (other.values is values) == (not assign)
    assert other.block == (1, 1)
    assert torch.equal(other.mask, layer.mask)
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(other.bias, layer.bias)
    other(torch.randn(shape, dtype=torch.float64)).sum().backward()


def test_loading_a_plain_weight_projects_it_on_the_mask_in_force():
    layer, dense = sparse_linear((4, 4), dtype=torch.float32), nn.Linear(13, 11)
    mask, values = layer.mask, layer.values
    layer.load_state_dict(dense.state_dict())
    assert layer.values is values
    assert torch.equal(layer.mask, mask)
    assert torch.equal(layer.weight, dense.weight * mask)


def test_a_live_zero_stays_alive():
    layer = sparse_linear()
    with torch.no_grad():
        layer.values.zero_()
    other = sparse_linear()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.mask, layer.mask)


def test_loading_what_prune_saved():
    dense = prune.random_unstructured(nn.Linear(13, 11), "weight", 0.5)
    layer = SparseLinear(13, 11)
    layer.load_state_dict(dense.state_dict())
    assert torch.equal(layer.mask, dense.weight_mask.bool())
    assert torch.equal(layer.weight, dense.weight)


def test_loading_casts_to_the_layers_dtype():
    layer = sparse_linear(dtype=torch.float32)
    layer.load_state_dict(sparse_linear(dtype=torch.float64).state_dict())
    assert layer.values.dtype == layer.bias.dtype == torch.float32


def test_a_state_dict_that_does_not_fit_is_refused_by_name():
    model = nn.Sequential(sparse_linear())
    before = model[0].weight
    state = model.state_dict()
    for change, words in [
        ({"0.weight": torch.randn(2, 2)}, r"0\.weight: shape \(2, 2\)"),
        ({"0.weight_mask": torch.ones(2, 2, dtype=torch.bool)}, r"mask has shape \(2, 2\)"),
        ({"0.bias": torch.randn(2)}, r"0\.bias: shape \(2,\)"),
        ({"0.weight": "text"}, r"0\.weight.*str"),
        ({"0.extra": torch.randn(2)}, r"Unexpected.*0\.extra"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            model.load_state_dict(state | change)
    for missing in ("0.weight", "0.bias"):
        with pytest.raises(RuntimeError, match=f"Missing.*{missing}"):
            model.load_state_dict({key: value for key, value in state.items() if key != missing})
    assert torch.equal(model[0].weight, before)


def test_not_strict_loading_leaves_what_is_missing():
    layer = sparse_linear()
    before = layer.weight
    result = layer.load_state_dict({"bias": torch.ones(11), "other": torch.ones(1)}, strict=False)
    assert result.missing_keys == ["weight"]
    assert result.unexpected_keys == ["other"]
    assert torch.equal(layer.weight, before)
    assert (layer.bias == 1).all()


def test_hooks_that_rewrite_a_state_dict_before_loading_are_called():
    layer = sparse_linear()
    state = {"old." + key: value for key, value in sparse_linear().state_dict().items()}

    def rename(module, state_dict, prefix, *_):
        for key in list(state_dict):
            state_dict[key.removeprefix("old.")] = state_dict.pop(key)

    layer.register_load_state_dict_pre_hook(rename)
    layer.load_state_dict(dict(state))
    assert torch.equal(layer.weight, state["old.weight"])


# Copies, devices, dtypes


def copies(layer: nn.Module) -> dict[str, nn.Module]:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    pickled = pickle.loads(pickle.dumps(layer))
    return {"deepcopy": copy.deepcopy(layer), "pickle": pickled, "save": torch.load(file, weights_only=False)}


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_copies_train_as_the_original_and_apart_from_it(make, shape):
    layer = make((4, 4))
    for name, twin in copies(layer).items():
        assert torch.equal(twin.weight, layer.weight), name
        assert_same_training(twin, dense_masked(layer), torch.randn(shape, dtype=torch.float64))
        before = layer.weight
        twin.set_mask(~twin.mask)
        assert torch.equal(layer.weight, before), name


def test_loading_elsewhere_brings_the_pattern_along():
    file = io.BytesIO()
    torch.save(sparse_linear(), file)
    file.seek(0)
    layer = torch.load(file, map_location="meta", weights_only=False)
    assert layer.values.is_meta
    assert layer.pattern.device.type == "meta"


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_a_layer_made_on_the_meta_device_comes_to_life(make, shape):
    layer = make((4, 4), device="meta")
    mask = layer.mask
    assert mask.is_meta
    assert layer(torch.randn(shape, dtype=torch.float64, device="meta")).is_meta
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert_same_training(layer, dense_masked(layer), torch.randn(shape, dtype=torch.float64))


def test_assigning_a_state_dict_brings_a_meta_layer_to_life():
    source = sparse_linear((4, 4))
    layer = SparseLinear(13, 11, device="meta", block=(4, 4), dtype=torch.float64)
    layer.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(layer.mask, source.mask)
    assert_same_training(layer, dense_masked(source), torch.randn(5, 13, dtype=torch.float64))


def test_the_meta_device_as_a_context():
    with torch.device("meta"):
        layer = SparseLinear(13, 11)
    assert layer.values.is_meta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_casting_a_layer(dtype):
    layer = sparse_linear((4, 4)).to(dtype)
    assert layer.values.dtype == layer.weight.dtype == layer.to_dense().weight.dtype == dtype
    assert layer(torch.randn(5, 13, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_autocast_on_the_cpu_trains_in_fp32(make, shape):
    layer, x = make(dtype=torch.float32), torch.randn(shape, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.bfloat16())
    assert y.dtype == torch.float32
    y.sum().backward()
    assert layer.values.grad.dtype == torch.float32
    torch.testing.assert_close(y, dense_masked(layer)(x.bfloat16().float()))


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


# Training as a whole


@pytest.mark.parametrize("block", BLOCKS)
def test_a_hundred_steps_equal_dense_masked_training(block):
    sparse = nn.Sequential(sparse_conv(block), nn.Flatten(), nn.Tanh(), SparseLinear(96, 4, dtype=torch.float64))
    sparse[3].set_mask(torch.rand(4, 96) < 0.2)
    dense = nn.Sequential(dense_masked(sparse[0]), nn.Flatten(), nn.Tanh(), dense_masked(sparse[3]))
    optimizers = [torch.optim.Adam(model.parameters(), 1e-2) for model in (sparse, dense)]
    for _ in range(100):
        x, target = torch.randn(3, 8, 6, 6, dtype=torch.float64), torch.randint(4, (3,))
        for model, optimizer in zip((sparse, dense), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
    torch.testing.assert_close(sparse(x), dense(x))
