"""State dicts, copies, devices and dtypes of sparse layers."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lottery_kernels import SparseLinear
from tests.kernels.layer_cases import LAYERS, assert_same_training, dense_masked, sparse_linear

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


def test_a_mask_changed_or_loaded_in_inference_mode_can_be_trained():
    layer, other = SparseLinear(12, 5), SparseLinear(12, 5, mask=torch.rand(5, 12) < 0.5)
    with torch.inference_mode():
        layer.set_mask(torch.rand(5, 12) < 0.5)
        layer.load_state_dict(other.state_dict())
    x = torch.randn(3, 12)
    y = layer(x)
    y.sum().backward()
    assert layer.values.grad is not None
    assert torch.equal(y, other(x))


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
