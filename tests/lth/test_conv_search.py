"""Searches over convolutional nets with BatchNorm, augmentation, a schedule and the global scope."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lth.events import Observer
from lth.prune import remaining
from lth.schedule import Schedule
from lth.ticket import Tickets
from tests.lth import tiny

PRUNED = ("0", "3.body.conv1", "3.body.conv2")
WEIGHTS = 6 * 2 * 9 + 8 * 6 * 9 + 8 * 8 * 9


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Tickets:
    """Two rounds of 12 iterations, rewound to the second; sparse."""
    out = tmp_path_factory.mktemp("conv") / "run"
    return tiny.conv_search(out=out, iterations=12, rounds=2, kernels="sparse", branches=("reinit", "random"))


def test_global_rounds_leave_exactly_the_count_of_the_largest_over_all_layers(found: Tickets) -> None:
    for number in (1, 2):
        before, after = found[number - 1], found[number]
        kept = sum(int(mask.sum()) for mask in after.masks.values())
        assert kept == round(WEIGHTS * 0.7**number)
        assert after.result["density"] == kept / WEIGHTS
        stays = torch.cat([after.masks[name].flatten() for name in PRUNED])
        was = torch.cat([before.masks[name].flatten() for name in PRUNED])
        magnitude = torch.cat([before.trained[f"{name}.weight"].abs().flatten() for name in PRUNED])
        assert not (stays & ~was).any()
        assert magnitude[stays].min() >= magnitude[was & ~stays].max()
    shares = [float(mask.float().mean()) for mask in found[2].masks.values()]
    assert max(shares) - min(shares) > 0.02  # layers were not pruned alike


def test_exempt_layers_are_neither_masked_nor_counted(found: Tickets) -> None:
    assert set(found[2].masks) == set(PRUNED)
    trained = found[2].trained
    assert trained["6.weight"].all() and trained["3.shortcut.conv.weight"].all()


def test_random_masks_keep_the_count_of_each_layer(found: Tickets) -> None:
    ticket, control = found[2].masks, found.at(2, "random").masks
    for name in PRUNED:
        assert ticket[name].sum() == control[name].sum() and not torch.equal(ticket[name], control[name])


def test_weights_and_buffers_of_batch_norm_are_rewound(found: Tickets) -> None:
    rewound = found[1].weights
    buffers = [name for name in rewound if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert len(buffers) == 4 * 3
    assert all(int(rewound[name]) == 2 for name in buffers if name.endswith("tracked"))  # iterations before it
    for name, value in rewound.items():
        assert torch.equal(value, found[2].weights[name])
        assert not torch.equal(value, found[0].trained[name])
    assert int(found[2].trained["1.num_batches_tracked"]) == 12  # 2 rewound to, 10 since


def test_reinit_starts_with_buffers_as_new(found: Tickets) -> None:
    start = found.at(1, "reinit").weights
    assert int(start["1.num_batches_tracked"]) == 0
    assert not start["1.running_mean"].any() and (start["1.running_var"] == 1).all()


class Notes(Observer):
    """Keeps what is worth a line."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def losses_and_tickets(kernels: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tickets]:
    monkeypatch.setattr("lth.driver.side_by_side", lambda sparse, dense: {})
    by_model: dict[nn.Module, list[Tensor]] = {}

    def step(model: nn.Module, batch: Any) -> Tensor:
        loss = tiny.step(model, batch)
        by_model.setdefault(model, []).append(loss.detach())
        return loss

    found = tiny.conv_search(
        step=step,
        scheduler=lambda optimizer: Schedule(10, (50,)).schedulers([optimizer]),
        dtype=dtype,
        kernels=kernels,
        iterations=60,
        rounds=2,
        rate=0.5,
        rewind=0,
    )
    trained = [torch.stack(losses) for losses in by_model.values() if len(losses) == 60]  # the others are copies
    assert len(trained) == 3
    return torch.stack(trained), found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-13), (torch.float32, 2e-5)])
def test_sparse_and_dense_masked_take_the_same_path(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To what 60 steps make of rounding: 7e-15 in fp64 and 1e-6 in fp32 were seen."""
    (sparse_losses, sparse), (dense_losses, dense) = (
        losses_and_tickets(kernels, dtype, monkeypatch) for kernels in ("sparse", "dense")
    )
    torch.testing.assert_close(sparse_losses, dense_losses, rtol=tolerance, atol=tolerance)
    for ticket, peer in zip(sparse, dense, strict=True):
        for name, weight in peer.trained.items():
            torch.testing.assert_close(ticket.trained[name], weight, rtol=tolerance, atol=tolerance)
        for layer, mask in peer.masks.items():
            assert torch.equal(ticket.masks[layer], mask)
    assert set(sparse[2].result["kernels"]["layers"].values()) == {"sparse 1x1"}


def test_a_layer_that_loses_all_its_weights_is_said_and_trains_on_as_in_dense_pytorch() -> None:
    """The layer gives zeros, which BatchNorm turns into its bias; the shortcut goes round it."""

    def last_at_zero() -> nn.Module:
        model = tiny.residual_network().double()
        with torch.no_grad():
            model[3].body.conv2.weight.zero_()
        return model

    def search(kernels: str) -> tuple[Tickets, list[str]]:
        heard = Notes()
        found = tiny.conv_search(
            model=last_at_zero,
            dtype=torch.float64,
            optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1e-5),
            rate=dict.fromkeys(PRUNED, 0.6),
            kernels=kernels,
            observer=heard,
        )
        return found, heard.notes

    name = "3.body.conv2"
    (sparse, said), (dense, _) = search("sparse"), search("dense")
    assert not sparse[1].masks[name].any() and sparse[1].result["layers"][name]["remaining"] == 0
    assert sum(int(mask.sum()) for mask in sparse[1].masks.values()) == round(0.4 * WEIGHTS)
    assert any(f"round 1 of replicate 0: nothing is left of {name}" in note for note in said)
    for key, value in dense[1].trained.items():
        torch.testing.assert_close(sparse[1].trained[key], value, rtol=1e-12, atol=1e-12)
        if key.endswith("bn2.bias") or "shortcut" in key:
            assert not torch.equal(value, dense[1].weights[key])


def test_the_plan_of_global_rounds_counts_all_layers_together() -> None:
    from lth.plan import Search, make_plan
    from lth.prune import layers_of

    layers = layers_of(tiny.residual_network(), dict.fromkeys(PRUNED, 0.3))
    plan = make_plan(Search(iterations=5, rounds=3, scope="global"), layers, None)
    assert [planned.remaining for planned in plan.stages] == [{"all layers": remaining(layers, n)} for n in range(4)]
    assert plan.stages[3].density == remaining(layers, 3) / WEIGHTS


def test_global_scope_takes_one_rate() -> None:
    with pytest.raises(ValueError, match=r"rate: .* it takes one rate for all layers .* where the scope is global"):
        tiny.conv_search(rate={"0": 0.3, "3.body.conv1": 0.2})
    with pytest.raises(ValueError, match="scope: 'net'; it takes layer, global"):
        tiny.conv_search(scope="net")
    with pytest.raises(ValueError, match=r"rounds: after 30 rounds .* nothing would be left of the layers, which have"):
        tiny.conv_search(rounds=30)


class Scaled(nn.Conv2d):
    """Computes something else than its weight says."""


def with_second(convolution: Callable[[], nn.Module]) -> nn.Sequential:
    first = nn.Conv2d(2, 6, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), convolution(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


def tied() -> nn.Sequential:
    model = with_second(lambda: nn.Conv2d(6, 6, 3))
    model.append(nn.ReLU()).append(nn.Linear(3, 3)).append(nn.Linear(3, 3))
    model[8].weight = model[7].weight
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: with_second(lambda: parametrizations.weight_norm(nn.Conv2d(6, 6, 3))), "'2' is parametrized"),
        (lambda: with_second(lambda: Scaled(6, 6, 3)), "'2' is a Scaled"),
        (tied, "the weight of '7' is tied"),
    ],
)
def test_a_layer_that_cannot_be_masked_is_an_error_before_anything_is_trained(
    model: Callable[[], nn.Module], words: str, tmp_path: Path
) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        tiny.conv_search(model=model, rate=0.3, out=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_parametrized_layer_can_be_exempt() -> None:
    found = tiny.conv_search(
        model=lambda: with_second(lambda: parametrizations.weight_norm(nn.Conv2d(6, 6, 3))),
        rate={"0": 0.3, "5": 0.3},
        kernels="sparse",
    )
    assert set(found[1].masks) == {"0", "5"}
    assert set(found[1].result["kernels"]["layers"].values()) == {"sparse 1x1"}


def test_a_shared_layer_is_pruned_once_and_trains_in_both_places() -> None:
    def shared() -> nn.Sequential:
        layer = nn.Conv2d(6, 6, 3, padding=1)
        first = nn.Conv2d(2, 6, 3, padding=1)
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
        return nn.Sequential(first, nn.ReLU(), layer, nn.ReLU(), layer, *head).double()

    sparse, dense = (
        tiny.conv_search(model=shared, rate=0.3, kernels=kernels, dtype=torch.float64)
        for kernels in ("sparse", "dense")
    )
    assert set(sparse[1].masks) == {"0", "2", "7"}
    for name, value in dense[1].trained.items():
        torch.testing.assert_close(sparse[1].trained[name], value, rtol=1e-12, atol=1e-12)


def test_a_ticket_of_convolutions_is_planted_as_it_was_trained(found: Tickets) -> None:
    x, _ = tiny.images()
    model = found[2].plant(tiny.residual_network()).eval()
    expected = tiny.residual_network()
    weights = found[2].weights
    for name, mask in found[2].masks.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] * mask
    expected.load_state_dict(weights)
    torch.testing.assert_close(model(x), expected.eval()(x), rtol=1e-5, atol=1e-5)
    assert type(model[0]).__name__ == "SparseConv2d"
