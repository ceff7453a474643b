"""The same search, sparse and dense masked, takes the same path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lottery_kernels import SparseLinear
from lth import files, masked
from lth.events import Observer
from lth.prune import Block
from lth.ticket import Tickets
from lth.timing import threads
from tests.lth import tiny

STEPS = 200
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.003, fused=True),
}


def searched(kernels: str, optimizer: str, dtype: torch.dtype, block: Block) -> tuple[Tickets, Tensor]:
    """Three rounds of 200 steps, and the loss of every step."""
    x, y = tiny.examples()
    losses: dict[nn.Module, list[Tensor]] = {}

    def network() -> nn.Module:
        layers = nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)
        return nn.Sequential(*layers).to(dtype)

    def step(model: nn.Module, batch: Any) -> Tensor:
        loss = tiny.step(model, batch)
        losses.setdefault(model, []).append(loss.detach())
        return loss

    found = tiny.search(
        model=network,
        data=(x.to(dtype), y),
        step=step,
        optimizer=OPTIMIZERS[optimizer],
        evaluate=None,
        iterations=STEPS,
        rounds=2,
        rate=0.5,
        block=block,
        kernels=kernels,
        checkpoint_seconds=60,
    )
    trained = [torch.stack(of_model) for of_model in losses.values() if len(of_model) == STEPS]  # the others are copies
    assert len(trained) == 3
    return found, torch.stack(trained)


@pytest.mark.parametrize("block", [(1, 1), (4, 3), (5, 7)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_sparse_and_dense_masked_take_the_same_path(
    dtype: torch.dtype, tolerance: float, optimizer: str, block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To what 200 steps make of rounding: 8e-16 in fp64 and 4e-7 in fp32 were seen, where losses are about 1."""
    monkeypatch.setattr("lth.driver.side_by_side", lambda sparse, dense: {})  # the steps on copies are no part of it
    (sparse, sparse_losses), (dense, dense_losses) = (
        searched(kernels, optimizer, dtype, block) for kernels in ("sparse", "dense")
    )
    torch.testing.assert_close(sparse_losses, dense_losses, rtol=tolerance, atol=tolerance)
    for ticket, peer in zip(sparse, dense, strict=True):
        for layer, mask in peer.masks.items():
            assert torch.equal(ticket.masks[layer], mask)
        for name, weight in peer.trained.items():
            torch.testing.assert_close(ticket.trained[name], weight, rtol=tolerance, atol=tolerance)
    kernels = {how for ticket in (sparse[1], sparse[2]) for how in ticket.result["kernels"]["layers"].values()}
    assert kernels == {"sparse {}x{}".format(*block)}


def test_auto_decides_once_and_replays_on_resume(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupt(Observer):
        def evaluated(self, stage: Any, record: Any) -> None:
            if (stage.round, record["iteration"]) == (1, 3):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.search(out=tmp_path, kernels="auto", observer=Interrupt())
    decided = (tmp_path / "replicate-0/round-01/kernels.json").read_bytes()

    def again(*arguments: object) -> None:
        raise AssertionError("decided again")

    monkeypatch.setattr("lth.driver.choose_kernels", again)
    found = tiny.search(out=tmp_path, kernels="auto", resume=True)
    assert (tmp_path / "replicate-0/round-01/kernels.json").read_bytes() == decided
    assert found[1].result["kernels"]["choices"].keys() == {"0", "4"}


def test_auto_trains_on_the_threads_that_it_chose_and_resumes_on_them(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    class Watching(Observer):
        def evaluated(self, stage: Any, record: Any) -> None:
            counts.append(torch.get_num_threads())
            if (stage.round, record["iteration"]) == (1, 3):
                raise KeyboardInterrupt

    monkeypatch.setattr("lth.driver.fastest_threads", lambda step: 1)
    with threads(2):
        with pytest.raises(KeyboardInterrupt):
            tiny.search(out=tmp_path, kernels="auto", observer=Watching())
        assert files.read_json(tmp_path / "replicate-0/round-01/kernels.json")["threads"] == 1
        monkeypatch.setattr("lth.driver.fastest_threads", None)
        tiny.search(out=tmp_path, kernels="auto", resume=True, observer=Observer())
        assert torch.get_num_threads() == 2
    assert set(counts) == {1}


def test_asked_for_kernels_take_all_threads(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lth.driver.fastest_threads", None)
    with threads(2):
        tiny.search(out=tmp_path, kernels="sparse")
    assert files.read_json(tmp_path / "replicate-0/round-01/kernels.json")["threads"] is None


def test_auto_runs_dense_masked_where_a_sparse_step_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"sparse_ms": 2.0, "dense_ms": 1.0, "speedup": 0.5, "spread": [0.4, 0.6]}
    monkeypatch.setattr("lth.driver.side_by_side", lambda sparse, dense: times)
    real = masked.choose_kernels
    monkeypatch.setattr("lth.driver.choose_kernels", lambda *arguments: real(*arguments[:3], "sparse", None))
    result = tiny.search(kernels="auto")[1].result
    assert set(result["kernels"]["layers"].values()) == {"dense masked"}
    assert result["kernels"]["reason"] == "a training step takes 2 ms sparse and 1 ms dense masked"
    assert result["timing"]["sampled"] is None


def test_branches_run_on_the_kernels_of_their_ticket() -> None:
    found = tiny.search(kernels="sparse", branches=("reinit", "random"))
    kernels = [found.at(1, branch).result["kernels"] for branch in ("ticket", "reinit", "random")]
    assert kernels[0] == kernels[1] == kernels[2]
    assert found[1].result["timing"]["sampled"]["speedup"] > 0
    assert found.at(1, "reinit").result["timing"]["sampled"] is None


@pytest.mark.parametrize("speedup", [2.0, 0.5])
def test_an_exempt_layer_runs_sparse_under_a_full_mask_where_a_step_is_faster_so(
    tmp_path: Any, speedup: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []

    def timed(*sides: Callable[[], Any]) -> dict[str, Any]:
        """A round compares first with and without the exempt layer sparse, then sparse with dense masked."""
        for side in sides:
            side()
        steps.append(sides)
        gain = speedup if len(steps) % 2 else 2.0
        return {"sparse_ms": 1.0, "dense_ms": gain, "speedup": gain, "spread": [gain, gain]}

    search: dict[str, Any] = {"rate": {"0": 0.3, "2": 0.3}, "block": (4, 3), "rounds": 2, "iterations": 60}
    search["model"] = lambda: nn.Sequential(
        *(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))
    )
    dense = tiny.search(kernels="dense", **search)
    monkeypatch.setattr("lth.driver.side_by_side", timed)
    real = masked.choose_kernels
    monkeypatch.setattr("lth.driver.choose_kernels", lambda *arguments: real(*arguments[:3], "sparse", None))
    found = tiny.search(kernels="auto", out=tmp_path, **search)
    assert len(steps) == 4
    for ticket, peer in zip(found, dense, strict=True):
        assert ticket.masks.keys() == ticket.result["layers"].keys() == {"0", "2"}
        assert ticket.result["density"] == peer.result["density"]
        for name, weight in peer.trained.items():
            torch.testing.assert_close(ticket.trained[name], weight, rtol=1e-4, atol=1e-5)
    chosen = found[2].result["kernels"]
    assert chosen["layers"] == dict.fromkeys(("0", "2"), "sparse 4x3")
    assert chosen["choices"].keys() == ({"0", "2", "4"} if speedup > 1 else {"0", "2"})
    planted = found[2].plant(search["model"]())
    assert isinstance(planted[4], SparseLinear if speedup > 1 else nn.Linear)
    assert torch.equal(planted[4].weight, found[2].weights["4.weight"])
    (tmp_path / "replicate-0/round-02/result.json").unlink()
    resumed = tiny.search(kernels="auto", out=tmp_path, resume=True, **search)
    assert len(steps) == 4
    assert all(torch.equal(resumed[2].trained[name], weight) for name, weight in found[2].trained.items())


def test_only_linear_layers_that_can_be_masked_are_offered_a_full_mask() -> None:
    kernels = {"layers": {"0": "sparse 1x1"}, "choices": {"0": {"kernel": "sparse", "block": [1, 1], "reason": ""}}}
    tied = tiny.network(hidden=12, classes=12)
    tied[4].weight = tied[0].weight
    assert masked.with_exempt(kernels, tied, (1, 1)) is None
    assert masked.with_exempt(kernels, nn.Sequential(nn.Linear(3, 2)), (1, 1)) is None
    assert masked.with_exempt(kernels, tiny.network(), (1, 1))["choices"].keys() == {"0", "4"}
