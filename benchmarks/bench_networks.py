"""Whole training steps of convolutional networks on the CPU: sparse beside dense masked PyTorch.

    pytest benchmarks/bench_networks.py [--results FILE] [--compiled] [-k "conv-4"]

A step is: an augmented batch (where the network's setting has it), zero_grad, forward, loss, backward, fused optimizer.
Dense masked is weight × mask in every forward, as NCHW and as channels_last, with `--compiled` through torch.compile
too; the fastest of them is what a speed-up is over. Masks are random, of one density in every layer that is pruned.
Every figure stands beside parity with the dense masked net in the same run: gradients in fp64, losses of a training in
fp32. A second table says where the sparse step's time goes.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import bench_conv, bench_linear
from benchmarks.bench_conv import fastest
from benchmarks.timing import in_turns
from lottery_kernels import sparsify
from lottery_kernels.layers import SparseLayer
from lth.augment import Augmented
from lth.classify import Shuffled
from lth.models import NETWORKS

Step = Callable[[], Tensor]
LAST = torch.channels_last


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=3e-4, fused=True)


def torchvision_resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=10)


@dataclass
class Setting:
    """A network as it is trained."""

    name: str
    make: Callable[[], nn.Module]
    density: float
    batch: int
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    image: int = 32
    augment: tuple[str, ...] = ()
    exempt: tuple[str, ...] = ()  # layers that are not pruned


IMAGE = (3, 32, 32)
DEEP = {"optimizer": sgd, "augment": ("flip", "crop")}
SETTINGS = [
    Setting("VGG-19", lambda: NETWORKS["vgg19"](IMAGE, 10), 0.035, 64, exempt=("output",), **DEEP),
    Setting("Conv-2", lambda: NETWORKS["conv-2"](IMAGE, 10), 0.07, 60, adam),
    Setting("Conv-4", lambda: NETWORKS["conv-4"](IMAGE, 10), 0.07, 60, adam),
    Setting("Conv-6", lambda: NETWORKS["conv-6"](IMAGE, 10), 0.07, 60, adam),
    Setting(
        "ResNet-20", lambda: NETWORKS["resnet20"](IMAGE, 10), 0.118, 128, exempt=("output", "*.shortcut.*"), **DEEP
    ),
    Setting("torchvision resnet18, 64×64", torchvision_resnet18, 0.05, 32, image=64, exempt=("fc",), **DEEP),
]


@dataclass
class Problem:
    """A setting with masks and data, and its training steps."""

    setting: Setting
    model: nn.Module = field(init=False)
    masks: dict[str, Tensor] = field(init=False)
    batches: Callable[[int, int], tuple[Tensor, ...]] = field(init=False)

    def __post_init__(self) -> None:
        setting = self.setting
        self.model = setting.make()
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        self.masks = {}
        for name, layer in layers.items():
            is_exempt = any(fnmatch.fnmatch(name, pattern) for pattern in setting.exempt)
            self.masks[name] = torch.rand_like(layer.weight) < (1.0 if is_exempt else setting.density)
        images = torch.randn(10 * setting.batch, 3, setting.image, setting.image)
        shuffled = Shuffled((images, torch.randint(10, (len(images),))), setting.batch)
        self.batches = Augmented(shuffled, setting.augment) if setting.augment else shuffled

    def sparse(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Every convolution and linear layer sparse, those that are not pruned with a full mask."""
        return sparsify(copy.deepcopy(self.model).to(dtype), self.masks, when="always")

    def dense(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        model = copy.deepcopy(self.model).to(dtype)
        for name, mask in self.masks.items():
            parent, _, key = name.rpartition(".")
            layer = model.get_submodule(name)
            of = bench_conv.DenseMasked.of if isinstance(layer, nn.Conv2d) else bench_linear.DenseMasked.of
            if not mask.all():
                setattr(model.get_submodule(parent), key, of(layer, mask).to(dtype))
        return model

    def step(self, model: nn.Module, call: nn.Module | None = None, last: bool = False) -> Step:
        """A training step, which returns the loss. call: what is run in the model's place."""
        optimizer = self.setting.optimizer(model.train())
        call, iteration = call or model, 0

        def step() -> Tensor:
            nonlocal iteration
            with record_function("augmentation"):
                x, y = self.batches(iteration, 0)
            iteration += 1
            optimizer.zero_grad()
            loss = F.cross_entropy(call(x.contiguous(memory_format=LAST) if last else x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    def check(self) -> None:
        """Against the dense masked net: all gradients of a small batch and the losses of a short training in fp64, and
        the first loss in fp32, to 1e-4. (Later ones in fp32 part: deep nets amplify rounding errors step by step.)"""
        x, y = (part[:8] for part in self.batches(0, 0))
        dense, sparse = self.dense(torch.float64).train(), self.sparse(torch.float64).train()
        for model in (dense, sparse):
            F.cross_entropy(model(x.double()), y).backward()
        for name, parameter in sparse.named_parameters():
            expected = dense.get_parameter(name.removesuffix("values") + "weight" * name.endswith("values")).grad
            layer = sparse.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, SparseLayer) and name.endswith("values"):
                assert expected is not None
                expected = layer.pattern.pack(expected)
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-7, atol=1e-10)
        losses: list[list[Tensor]] = []
        for model in (dense, sparse):
            optimizer = self.setting.optimizer(model)
            losses.append([])
            for _ in range(3):
                loss = F.cross_entropy(model(x.double()), y)
                losses[-1].append(loss.detach())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
        torch.testing.assert_close(self.step(self.sparse())(), self.step(self.dense())(), rtol=1e-4, atol=0)


# Names of what a profiler sees at its topmost, by part of the step; the first that fits counts.
PARTS = {
    "augmentation": ("augmentation",),
    "optimizer": ("Optimizer.",),
    "convolutions": ("conv2d", "Conv2d"),
    "BatchNorm, ReLU, sums": (
        "batch_norm",
        "BatchNorm",
        "relu",
        "Relu",
        "Threshold",
        "aten::add",
        "AddBackward",
        "lerp",
    ),
    "pooling": ("pool", "Pool", "Mean", "aten::mean"),
    "fully connected": ("linear", "Linear", "mlp", "Mlp", "addmm", "Addmm"),
    "loss": ("cross_entropy", "Nll", "LogSoftmax"),
}


def breakdown(step: Step, steps: int = 3) -> dict[str, float]:
    """Milliseconds of a step by part."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(steps):
            with record_function("whole"):
                step()
    spent = dict.fromkeys([*PARTS, "the rest"], 0.0)
    total = 0.0
    for event in profiled.events():
        if event.name == "whole":
            total += event.cpu_time_total
        elif event.cpu_parent is not None and event.cpu_parent.name == "whole":
            part = next((part for part, names in PARTS.items() if any(n in event.name for n in names)), "the rest")
            spent[part] += event.cpu_time_total
    spent["the rest"] = total - sum(time for part, time in spent.items() if part != "the rest")
    return {part: time / steps / 1e3 for part, time in spent.items()}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name.replace(" ", "-"))
def test_step(benchmark, tables, setting, request):
    problem = Problem(setting)
    problem.check()
    sparse = problem.step(problem.sparse())
    last = problem.dense().to(memory_format=LAST)
    steps = {"sparse": sparse, "NCHW": problem.step(problem.dense()), "channels_last": problem.step(last, last=True)}
    if request.config.getoption("--compiled"):
        for name, is_last in (("NCHW, compiled", False), ("channels_last, compiled", True)):
            model = problem.dense().to(memory_format=LAST if is_last else torch.contiguous_format)
            steps[name] = problem.step(model, torch.compile(model), is_last)
    times = in_turns(steps, seconds=3, least=5)
    dense = fastest(times, *(name for name in steps if name != "sparse"))
    row = {
        **{f"{name}, ms": f"{times[name].median * 1e3:.3g}" for name in steps if name != "sparse"},
        "sparse, ms": f"{times['sparse'].median * 1e3:.3g}",
        "speed-up": str(times["sparse"].speedup_over(dense)),
    }
    head = {"net": setting.name, "batch": setting.batch, "remaining": f"{setting.density:.1%}"}
    tables.add("A whole training step, fp32, over the fastest dense masked one", **head, **row)
    parts = {part: f"{time:.3g}" for part, time in breakdown(sparse).items()}
    tables.add("Where the sparse step's time goes, ms, under a profiler", net=setting.name, **parts)
    benchmark.extra_info.update(row)
    benchmark.pedantic(sparse, rounds=3, warmup_rounds=1)
