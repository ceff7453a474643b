"""Dense or sparse, and which block: decided by rules, by a table or by measuring."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lottery_kernels import Pattern, SparseConv2d, SparseLinear, choices, choose, gpu, measure, operators, sparsify
from tests.kernels.nets import images, masked, random_masks, small_net

# Blocks


def blocky_mask(rows: int, cols: int, shape=(128, 192), keep: float = 0.3) -> torch.Tensor:
    """A mask that prunes whole blocks."""
    blocks = torch.rand(-(-shape[0] // rows), -(-shape[1] // cols)) < keep
    return blocks.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[: shape[0], : shape[1]]


@pytest.mark.parametrize("block", [(64, 64), (32, 32), (16, 16), (8, 8), (4, 4), (1, 1)])
def test_auto_finds_the_block_that_a_mask_was_pruned_in(block):
    assert choose.best_block(blocky_mask(*block)) == block


def test_auto_finds_blocks_of_convolutions_within_taps_and_groups():
    mask = (
        (torch.rand(8, 2, 3, 3) < 0.4).repeat_interleave(4, 0).repeat_interleave(4, 1)
    )  # [32, 8, 3, 3], groups of 8 × 8
    assert choose.best_block(mask, groups=4) == (4, 4)


def test_auto_forgives_a_little_waste_and_no_more():
    mask = blocky_mask(8, 8)
    live = mask.nonzero()
    for share, expected in ((0.1, (8, 8)), (0.4, (1, 1))):
        thinned = mask.clone()
        drop = live[torch.randperm(len(live))[: int(share * len(live))]]
        thinned[drop[:, 0], drop[:, 1]] = False
        assert choose.best_block(thinned) == expected


@pytest.mark.parametrize("shape", [(5, 7), (300, 784), (1, 1)])
def test_auto_on_full_and_empty_masks(shape):
    for mask in (torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)):
        block = choose.best_block(mask)
        assert sparsify(nn.Linear(*reversed(shape)), {"": mask}, "auto", "always").block == block


def test_a_block_for_each_layer():
    model = small_net()
    masks = random_masks(model)
    sparsify(model, masks, {"4": (4, 4)}, "always")
    assert {name: record["block"] for name, record in choices(model).items()} == {"0": [1, 1], "4": [4, 4], "7": [1, 1]}
    other = small_net()
    sparsify(other, masks, lambda name, layer, mask: (2, 2) if isinstance(layer, nn.Conv2d) else "auto", "always")
    assert other[0].block == (2, 2)


# The decision


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """As on a machine that has compiled kernels for every operator."""
    monkeypatch.setattr(choose, "operators", SimpleNamespace(_backend_serves=lambda name, device: True))


@pytest.fixture
def table(monkeypatch):
    entries = [{"block": [1, 1], "density": 0.2}, {"block": [4, 4], "density": 0.5}]
    monkeypatch.setattr(choose, "_table", lambda: {"cpu": {"linear": entries}})


def decided(mask: torch.Tensor, block=(1, 1), **arguments) -> dict:
    layer = nn.Linear(*reversed(mask.shape))
    return choices(sparsify(layer, {"": mask}, block, **arguments))[""]


@pytest.mark.usefixtures("kernels_everywhere", "table")
@pytest.mark.parametrize(
    ("pruned_in", "keep", "block", "kernel", "words"),
    [
        ((1, 1), 0.1, (1, 1), "sparse", "is below 0.2"),
        ((1, 1), 0.4, (1, 1), "dense", "is not below 0.2"),
        ((4, 4), 0.4, (4, 4), "sparse", "is below 0.5"),
        ((8, 8), 0.4, (8, 8), "sparse", "is below 0.5"),  # the largest that was measured and fits
        ((4, 1), 0.4, (4, 1), "dense", "is not below 0.2"),
        ((1, 1), 0.1, (4, 4), "dense", "is not below 0.5"),  # few weights, but most blocks have one
    ],
)
def test_without_an_example_the_table_decides(pruned_in, keep, block, kernel, words):
    record = decided(blocky_mask(*pruned_in, keep=keep), block)
    assert record["kernel"] == kernel
    assert words in record["reason"]


@pytest.mark.usefixtures("kernels_everywhere", "table")
def test_what_was_never_measured_stays_dense():
    model = sparsify(net := small_net(), random_masks(net, 0.05))
    record = choices(model)["0"]
    assert record["kernel"] == "dense"
    assert "nothing was measured for conv2d" in record["reason"]


@pytest.mark.usefixtures("kernels_everywhere", "table")
def test_a_block_that_is_never_empty_skips_nothing():
    record = decided(torch.rand(128, 192) < 0.2, (16, 16))
    assert record["kernel"] == "dense"
    assert record["reason"] == "every 16x16 block has a live weight, so none can be skipped"


def test_what_a_gpu_cannot_run_is_a_reason(monkeypatch):
    """Asked of a layer that says it is on a GPU: no GPU is needed."""
    weight = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    target = SimpleNamespace(leaf=weight, layer=nn.Linear(8, 8))
    pattern = Pattern.from_mask(torch.eye(8) > 0, (4, 4))
    monkeypatch.setattr(gpu, "why_off", lambda: "no GPU: none was found")
    assert choose.refusal(target, pattern) == "no GPU: none was found"
    asked = []
    monkeypatch.setattr(gpu, "why_off", lambda: None)
    monkeypatch.setattr(gpu, "unsupported", lambda dtype, block: asked.append((dtype, block)) or "too small")
    assert choose.refusal(target, pattern) == "too small"
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.float16)
    choose.refusal(target, pattern)
    assert asked == [(torch.float32, (4, 4)), (torch.float16, (4, 4))]


def test_without_compiled_kernels_layers_stay_dense(monkeypatch):
    monkeypatch.setattr(choose, "operators", SimpleNamespace(_backend_serves=lambda name, device: False))
    model = small_net()
    sparsify(model, random_masks(model, 0.05), example=images())
    for record in choices(model).values():
        assert record["kernel"] == "dense"
        assert "no compiled sparse kernels" in record["reason"]
    assert prune.is_pruned(model)


def test_the_shipped_table_is_in_the_documented_form():
    for device, kinds in choose._table().items():
        assert device in ("cpu", "cuda")
        for kind, entries in kinds.items():
            assert kind in ("linear", "conv2d")
            for entry in entries:
                assert min(entry["block"]) >= 1
                assert 0 < entry["density"] <= 1


# Measuring


@pytest.fixture
def stopwatch(monkeypatch, kernels_everywhere):
    """Runs everything that is to be timed once, and gives the times that a test names."""
    times = []

    def scripted(runs, device, seconds):
        for run in runs:
            run()
        return times.pop(0)[: len(runs)]

    monkeypatch.setattr(measure, "medians", scripted)
    return times


def test_layers_that_win_by_themselves_and_in_the_model_become_sparse(stopwatch):
    model = small_net()
    stopwatch += [[2.0, 1.0], [1.0, 2.0], [2.0, 1.0]]  # dense and sparse of "0", "4", "7"
    stopwatch += [[1.0, 3.0, 2.0]]  # the model: those that won, all sparse, all dense masked
    sparsify(model, random_masks(model), example=images())
    records = choices(model)
    assert [record["kernel"] for record in records.values()] == ["sparse", "dense", "sparse"]
    assert records["0"]["reason"] == (
        "layer 1e+03 ms sparse, 2e+03 ms dense masked; "
        "model 1e+03 ms mixed, 2e+03 ms all dense masked, 3e+03 ms all sparse"
    )


@pytest.mark.parametrize(("model_times", "kernels"), [([3.0, 2.0, 1.0], "dense"), ([2.0, 1.0, 3.0], "sparse")])
def test_the_whole_model_has_the_last_word(stopwatch, model_times, kernels):
    model = small_net()
    stopwatch += [[2.0, 1.0], [1.0, 2.0], [2.0, 1.0], model_times]
    sparsify(model, random_masks(model), example=images())
    assert {record["kernel"] for record in choices(model).values()} == {kernels}


@pytest.mark.usefixtures("table")
def test_a_layer_that_the_example_does_not_reach_goes_by_the_table(stopwatch):
    model = nn.ModuleDict({"used": nn.Linear(6, 6), "unused": nn.Linear(6, 6)})
    model.forward = model["used"].forward
    model.forward = lambda x: model["used"](x)
    stopwatch += [[2.0, 1.0], [1.0, 2.0]]
    sparsify(model, {name: torch.rand(6, 6) < 0.1 for name in model}, example=torch.randn(3, 6))
    assert "below 0.2" in choices(model)["unused"]["reason"]
    assert "layer" in choices(model)["used"]["reason"]


@pytest.mark.parametrize(
    "example", [torch.randn(3, 6), (torch.randn(3, 6),), {"input": torch.randn(3, 6)}], ids=["tensor", "tuple", "dict"]
)
def test_examples_are_what_the_model_is_called_with(stopwatch, example):
    stopwatch += [[2.0, 1.0], [1.0, 2.0]]
    assert isinstance(sparsify(nn.Linear(6, 6), {"": torch.rand(6, 6) < 0.5}, example=example), SparseLinear)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("pruned", [True, False])
def test_measuring_disturbs_nothing(kernels_everywhere, mode, pruned):
    model = small_net(dropout=0.2).train(mode)
    masks = random_masks(model)
    if pruned:
        masked(model, masks)
    model(images()).sum().backward()
    model[4].register_forward_hook(lambda layer, args, y: y * (np.random.rand() + random.random()))
    names, x = list(model.state_dict()), images().requires_grad_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    identities = [id(tensor) for tensor in [*model.parameters(), *model.buffers()]]
    layers, kinds = list(model.modules()), [type(module) for module in model.modules()]
    modes = [module.training for module in layers]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def fail(*_):
        raise KeyboardInterrupt  # after the measuring, before the conversion

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lottery_kernels.convert.prepare_moves", fail)
        with pytest.raises(KeyboardInterrupt):
            sparsify(model, None if pruned else masks, example=x)
    assert list(model.state_dict()) == names
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) if gradient is None else torch.equal(parameter.grad, gradient)
    assert x.grad is None
    assert [id(tensor) for tensor in [*model.parameters(), *model.buffers()]] == identities
    assert list(model.modules()) == layers
    assert [type(module) for module in layers] == kinds
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_an_example_that_the_model_does_not_take_leaves_all_as_it_was(kernels_everywhere):
    model = small_net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        sparsify(model, random_masks(model), example=torch.randn(3, 7))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model[4]._forward_pre_hooks


def test_nothing_to_train_times_forward_alone(kernels_everywhere):
    model = small_net().requires_grad_(False)
    sparsify(model, random_masks(model), example=images())
    assert choices(model).keys() == {"0", "4", "7"}


@pytest.mark.skipif(not operators._backend_serves("linear", "cpu"), reason="no C++ compiler")
def test_a_wide_and_very_sparse_layer_is_measured_to_be_faster():
    model = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10))
    masks = {"0": torch.rand(2048, 2048) < 0.005}
    sparsify(model, masks, example=torch.randn(64, 2048))
    assert choices(model)["0"]["kernel"] == "sparse", choices(model)


def test_measured_choices_replay_without_measuring(stopwatch):
    model, masks = small_net(), random_masks(small_net())
    stopwatch += [[2.0, 1.0], [1.0, 2.0], [2.0, 1.0], [1.0, 3.0, 2.0]]
    sparsify(model, masks, example=images())
    again = small_net()
    sparsify(again, masks, when=choices(model), example=images())  # the stopwatch has no times left
    assert choices(again) == choices(model)
    assert [type(layer) for layer in again] == [type(layer) for layer in model]
    assert isinstance(again[0], SparseConv2d)
