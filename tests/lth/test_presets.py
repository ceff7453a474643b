"""Presets of the convolutional nets: the paper's settings, and that they train."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from lth import data, presets
from lth.events import Observer
from lth.plan import make_plan
from lth.prune import layers_of, remaining
from lth.schedule import Schedule
from lth.ticket import run_search
from lth.train import Training
from tests.lth import cifar

CONVOLUTIONAL = ("conv2", "conv4", "conv6", "resnet20", "vgg19")


@pytest.fixture(autouse=True)
def made_up_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10's files, small: 24 training, 16 validation and 8 test images."""
    monkeypatch.setattr(data, "VALIDATION", 16)
    monkeypatch.setattr(data, "cache_folder", lambda: tmp_path)
    cifar.write_python(tmp_path, 8, 8, monkeypatch)
    return tmp_path


def settings_of(preset: str, **changes: Any) -> presets.Settings:
    return dataclasses.replace(presets.named(preset), **changes)


@pytest.mark.parametrize("preset", CONVOLUTIONAL)
def test_every_preset_trains_and_prunes_sparse(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lth.driver.side_by_side", lambda sparse, dense: {})  # VGG-19 would take long
    cheap = {"batch": 8, "rounds": 1, "eval_every": 2, "kernels": "sparse", "conv_rate": 0.9}
    settings = settings_of(preset, iterations=2, **cheap)
    task, search, described, _ = presets.make(settings)
    run = run_search(task, search, tmp_path / "run", resume=False, observer=Observer(), settings=described)
    _, ticket = run.finished()
    layers = layers_of(task.model(), search.rate)
    counted = {name: layer["remaining"] for name, layer in ticket.result()["layers"].items()}
    if settings.scope == "global":
        assert sum(counted.values()) == remaining(layers, 1)
    else:
        assert counted == {layer.name: remaining([layer], 1) for layer in layers}
    assert set(ticket.result()["kernels"]["layers"].values()) == {"sparse 1x1"}
    assert ticket.result()["final"].keys() == {
        *("iteration", "val_loss", "val_accuracy", "test_loss", "test_accuracy"),
        *("train_loss", "train_accuracy", "train_loss_all", "train_accuracy_all"),
    }
    start, trained, masks = ticket.start(), ticket.weights(), ticket.mask()
    for layer in layers:
        before, after = start[f"{layer.name}.weight"], trained[f"{layer.name}.weight"]
        assert (before != after)[masks[layer.name]].any() and not after[~masks[layer.name]].any()


@pytest.mark.parametrize(
    ("preset", "rates"),
    [
        ("conv2", {"conv1": 0.1, "conv2": 0.1, "fc1": 0.2, "fc2": 0.2, "output": 0.1}),
        ("conv4", {**{f"conv{n}": 0.1 for n in range(1, 5)}, "fc1": 0.2, "fc2": 0.2, "output": 0.1}),
        ("conv6", {**{f"conv{n}": 0.15 for n in range(1, 7)}, "fc1": 0.2, "fc2": 0.2, "output": 0.1}),
        ("vgg19", {f"conv{n}": 0.2 for n in range(1, 17)}),
    ],
)
def test_layers_are_pruned_at_the_papers_rates(preset: str, rates: dict[str, float]) -> None:
    _, search, _, _ = presets.make(settings_of(preset, batch=8))
    assert search.rate == rates
    assert search.scope == ("global" if preset == "vgg19" else "layer")


def test_the_residual_net_spares_output_and_shortcuts() -> None:
    task, search, _, _ = presets.make(settings_of("resnet20", batch=8))
    layers = layers_of(task.model(), search.rate)
    assert len(layers) == 19 and sum(layer.weights for layer in layers) == 270_896 - 2_560 - 640
    assert {layer.rate for layer in layers} == {0.2} and search.scope == "global"
    ten_rounds = remaining(layers, 10) + 2_560 + 640
    assert ten_rounds / 270_896 == pytest.approx(0.118, abs=0.0005)  # the paper counts what it spares


@pytest.mark.parametrize(
    ("preset", "schedule"),
    [
        ("conv6", Schedule()),
        ("resnet20", Schedule(20_000, (20_000, 25_000))),
        ("vgg19", Schedule(10_000, (56_000, 84_000))),
    ],
)
def test_learning_rates_follow_the_papers_schedules(preset: str, schedule: Schedule) -> None:
    settings = settings_of(preset, batch=8)
    task, _, _, _ = presets.make(settings)
    model = torch.nn.Linear(1, 1)
    for iteration in (0, 100, 21_000, 28_000):
        training = Training.begin(task, model, iteration)
        rate = training.optimizers[0].param_groups[0]["lr"]
        assert rate == pytest.approx(settings.learning_rate * schedule.factor(iteration))


def test_schedules_scale_with_the_iterations() -> None:
    settings = settings_of("resnet20", batch=8, iterations=300)
    task, _, _, _ = presets.make(settings)
    rates = [
        Training.begin(task, torch.nn.Linear(1, 1), iteration).optimizers[0].param_groups[0]["lr"]
        for iteration in (0, 199, 200, 250)
    ]
    assert rates == pytest.approx([0.03 / 200, 0.03, 0.003, 0.0003])


def test_deep_nets_train_on_augmented_images_and_are_judged_on_plain_ones() -> None:
    task, _, _, dataset = presets.make(settings_of("resnet20", batch=24))
    x, y = task.batches(0, 0)
    assert x.shape == (24, 3, 32, 32)
    plain = {tuple(image.flatten().tolist()) for image in dataset.train.x}
    assert sum(tuple(image.flatten().tolist()) in plain for image in x) < 4
    assert y.bincount(minlength=10).tolist() == dataset.train.y.bincount(minlength=10).tolist()


def test_weight_decay_and_momentum_are_the_papers() -> None:
    task, _, _, _ = presets.make(settings_of("vgg19", batch=8))
    optimizer = Training.begin(task, torch.nn.Linear(1, 1), 0).optimizers[0]
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, torch.optim.SGD)
    assert (group["momentum"], group["weight_decay"]) == (0.9, 1e-4)


@pytest.mark.parametrize(("image", "shape"), [("", (1, 28, 28)), ("3x32x32", (3, 32, 32))])
def test_grey_images_of_28_train_as_they_are_or_framed(image: str, shape: tuple[int, ...]) -> None:
    settings = settings_of("resnet20", data="mnist5k", image=image, batch=4)
    task, _, _, dataset = presets.make(settings)
    assert task.batches(0, 0)[0].shape[1:] == shape and dataset.test.x.shape[1:] == shape
    task.step(task.model(), task.batches(0, 0))


def test_dropout_runs_drop_half_of_the_hidden_units() -> None:
    task, _, _, _ = presets.make(settings_of("conv2", batch=8, dropout=0.5))
    assert [module.p for module in task.model().modules() if isinstance(module, torch.nn.Dropout)] == [0.5, 0.5]


@pytest.mark.parametrize("preset", CONVOLUTIONAL)
def test_every_plan_ends_below_seven_percent(preset: str) -> None:
    task, search, _, _ = presets.make(settings_of(preset, batch=8))
    plan = make_plan(search, layers_of(task.model(), search.rate, search.block), None)
    assert plan.stages[-1].density < 0.07
