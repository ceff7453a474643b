"""Sparse linear layers on the CPU beside dense masked PyTorch: forward and backward, whole training steps, densities.

    pytest benchmarks/bench_linear.py [--results FILE] [-k layer | step | density]

Every figure stands beside a parity check against fp64 in the same run. Dense masked is weight × mask, then `F.linear`,
eager and through torch.compile; the faster of the two is what a speed-up is over. SparseProp (ICML 2023), the best
published sparse training on a CPU, runs too where it is installed.

Beside each time stands a floor, measured in the same turns, that no kernel for the live weights can go below: what
PyTorch takes around one operator with the same parameters that computes nothing, and the multiply-adds of the live
weights from registers alone. "At most" is the speed-up of a layer or step that takes no longer than that.

Small layers, and steps, stand there replayed too (`lottery_kernels.Replayed`), which drops most of what PyTorch takes:
over dense masked PyTorch, and over dense masked replayed.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import Times, in_turns
from lottery_kernels import Replayed, SparseLinear, operators, sparsify
from lottery_kernels.cpu import build
from lottery_kernels.replay import CALLS_BEFORE, Recorder

BLOCKS = [(1, 1), (4, 4), (8, 8), (16, 16)]
# (in, out, batch, first): a first layer reads rows of a data set and owes nobody a gradient of them
SHAPES = [
    (784, 300, 60, True),
    (784, 300, 512, True),
    (2048, 2048, 128, False),
    (4096, 4096, 256, False),
    (4608, 512, 512, False),
]
NETS = {
    "LeNet-300-100, batch 60": ((784, 300, 100, 10), 60, 0.036),
    "LeNet-300-100, batch 512": ((784, 300, 100, 10), 512, 0.036),
    "784-2048-1024-10, batch 128": ((784, 2048, 1024, 10), 128, 0.032),
}
MULTIPLY_ADDS = 1 << 25  # for the rate of multiply-adds: some 0.3 ms of them
SWEEP = [1.0, 0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.036, 0.02, 0.01]


@pytest.fixture(scope="module", autouse=True)
def floors_are_there() -> None:
    torch.ops.load_library(build.library(Path(__file__).parent / "floors"))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


def random_mask(out: int, inputs: int, density: float, block: tuple[int, int]) -> Tensor:
    """Whole blocks, drawn at random; exactly `density` of them."""
    rows, cols = -(-out // block[0]), -(-inputs // block[1])
    live = torch.zeros(rows * cols, dtype=torch.bool)
    live[torch.randperm(rows * cols)[: max(1, round(density * rows * cols))]] = True
    mask = live.reshape(rows, cols).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return mask[:out, :inputs].contiguous()


class DenseMasked(nn.Linear):
    """weight × mask in every forward, as `torch.nn.utils.prune` does."""

    mask: Tensor

    @classmethod
    def of(cls, linear: nn.Linear, mask: Tensor) -> DenseMasked:
        layer = cls(linear.in_features, linear.out_features)
        layer.load_state_dict(linear.state_dict())
        layer.register_buffer("mask", mask.to(linear.weight.dtype))
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


@dataclass
class Problem:
    """One layer: weight, mask, input and cotangent."""

    inputs: int
    out: int
    batch: int
    first: bool
    density: float
    block: tuple[int, int] = (1, 1)
    linear: nn.Linear = field(init=False)

    def __post_init__(self) -> None:
        self.linear = nn.Linear(self.inputs, self.out)
        self.mask = random_mask(self.out, self.inputs, self.density, self.block)
        self.x, self.dy = torch.randn(self.batch, self.inputs), torch.randn(self.batch, self.out)

    @property
    def flops(self) -> float:
        """Of the live weights, forward and backward."""
        return 2.0 * int(self.mask.sum()) * self.batch * (2 if self.first else 3)

    def step(
        self, layer: nn.Module, batch_innermost: bool = False, run: Callable | None = None
    ) -> Callable[[], Tensor]:
        """Forward and backward of a layer, in the layout that its neighbours would give it; returns y."""
        x, dy = self.x.clone(), self.dy
        if batch_innermost:
            dy = dy.T.contiguous().T
            x = x if self.first else x.T.contiguous().T
        x.requires_grad_(not self.first)
        run = layer if run is None else run

        def step() -> Tensor:
            x.grad = None
            for parameter in layer.parameters():
                parameter.grad = None
            y = run(x)
            y.backward(dy)
            return y

        step.x = x  # type: ignore[attr-defined]
        return step

    def replayed(self, layer: nn.Module) -> Callable[[], object]:
        """The same of a first layer, replayed: returns y and the gradients, checked to be those of the plain call."""
        assert self.first
        dy = self.dy.T.contiguous().T if isinstance(layer, SparseLinear) else self.dy

        def work(x: Tensor) -> list[Tensor]:
            for parameter in layer.parameters():
                parameter.grad = None
            y = layer(x)
            y.backward(dy)
            return [y.detach(), *(parameter.grad for parameter in layer.parameters() if parameter.grad is not None)]

        replay = Replayed(work)
        plain = work(self.x)
        for _ in range(4):
            assert all(map(torch.equal, replay(self.x), plain))
        assert replay.refusal is None
        return lambda: replay(self.x)

    def check(self, layer: SparseLinear, step: Callable[[], Tensor]) -> None:
        """y, dx and the gradients of values and bias, against fp64: close everywhere, and their root mean square error
        at most twice that of dense masked fp32."""
        exact, single = self._dense_gradients(torch.float64), self._dense_gradients(torch.float32)
        y, dx = step().detach(), step.x.grad  # type: ignore[attr-defined]
        found = [y, dx, layer.pattern.unpack(layer.values.grad), layer.bias.grad]
        for ours, theirs, true in zip(found, single, exact, strict=True):
            if true is not None:
                torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-5)
                assert (ours - true).square().mean().sqrt() <= 2 * (theirs - true).square().mean().sqrt()

    def _dense_gradients(self, dtype: torch.dtype) -> list[Tensor | None]:
        layer = DenseMasked.of(self.linear, self.mask).to(dtype)
        x = self.x.to(dtype).requires_grad_(not self.first)
        y = layer(x)
        y.backward(self.dy.to(dtype))
        return [y.detach(), x.grad, layer.weight.grad, layer.bias.grad]

    def steps(self) -> dict[str, Callable[[], Tensor]]:
        """All contestants; parity of ours is checked first."""
        sparse, masked = (
            SparseLinear.from_dense(self.linear, self.mask, self.block),
            DenseMasked.of(self.linear, self.mask),
        )
        ours = self.step(sparse, batch_innermost=True)
        self.check(sparse, ours)
        steps = {"sparse": ours, "eager": self.step(masked)}
        steps["compiled"] = self.step(masked, run=torch.compile(masked))
        if importlib.util.find_spec("sparseprop") and self.block == (1, 1):
            steps["SparseProp"] = self.step(_sparseprop(self.linear, self.mask))
            steps["behind SparseProp"] = steps["eager"]  # which comes out slower there, so that nothing compared does
        return steps | {"hollow": self.step(Hollow(sparse, self.out)), "multiply-adds": multiply_adds}


def _sparseprop(linear: nn.Linear, mask: Tensor) -> nn.Module:
    from sparseprop.modules import SparseLinear as SparsePropLinear

    return SparsePropLinear(linear.weight.detach() * mask, nn.Parameter(linear.bias.detach().clone()))


class Hollow(nn.Module):
    """One operator with the parameters of a net, which computes nothing: a call, a node of autograd, and zeros written
    as its output and gradients."""

    def __init__(self, net: nn.Module, out: int) -> None:
        super().__init__()
        self.operator = torch.ops.lottery_benchmarks.hollow.default
        # A plain list beside the registry: reading a ParameterList would take longer than the operator.
        self.out, self.held = out, [nn.Parameter(parameter.detach().clone()) for parameter in net.parameters()]
        for number, parameter in enumerate(self.held):
            self.register_parameter(str(number), parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x, self.held, self.out)


def multiply_adds() -> None:
    torch.ops.lottery_benchmarks.multiply_adds(MULTIPLY_ADDS)


def floor(times: dict[str, Times], flops: float) -> float:
    """Seconds below which no kernel goes: those of the contestant "hollow", and of so many operations."""
    return times["hollow"].median + flops / 2 / MULTIPLY_ADDS * times["multiply-adds"].median


def dense_masked(times: dict[str, Times]) -> Times:
    return min(times["eager"], times["compiled"], key=lambda kept: kept.median)


def columns(times: dict[str, Times], flops: float, rate: bool = True) -> dict[str, str]:
    """What a table shows of contestants that took turns; `rate`: GFLOP/s too."""
    dense, sparse, least = dense_masked(times), times["sparse"], floor(times, flops)
    row = {"dense masked, ms": f"{dense.median * 1e3:.3g}", "sparse, ms": f"{sparse.median * 1e3:.3g}"}
    if rate:
        row["GFLOP/s"] = f"{flops / sparse.median / 1e9:.0f}"
    row["speed-up"] = str(sparse.speedup_over(dense))
    row["floor, ms"], row["at most"] = f"{least * 1e3:.3g}", f"{dense.median / least:.1f}×"
    if "SparseProp" in times:
        row["SparseProp"] = str(times["SparseProp"].speedup_over(dense))
    return row


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
@pytest.mark.parametrize("density", [0.036, 0.07])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}-b{shape[2]}")
def test_layer(benchmark, tables, shape, density, block):
    problem = Problem(*shape, density, block)
    steps = problem.steps()
    times = in_turns(steps)
    row = columns(times, problem.flops)
    title = "Forward and backward of one layer, fp32"
    name = f"{shape[0]}→{shape[1]}, batch {shape[2]}"
    tables.add(title, layer=name, remaining=f"{density:.1%}", block=f"{block[0]}×{block[1]}", **row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(steps["sparse"], rounds=10, warmup_rounds=1)


def replayed_columns(times: dict[str, Times]) -> dict[str, str]:
    """The same of "replayed", the sparse contestant, and "dense replayed"."""
    ours, theirs = times["replayed"], times["dense replayed"]
    return {
        "dense masked replayed, ms": f"{theirs.median * 1e3:.3g}",
        "replayed, ms": f"{ours.median * 1e3:.3g}",
        "over dense masked": str(ours.speedup_over(dense_masked(times))),
        "over that replayed": str(ours.speedup_over(theirs)),
    }


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
@pytest.mark.parametrize("density", [0.036, 0.07])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=lambda shape: f"{shape[0]}-{shape[1]}-b{shape[2]}")
def test_layer_replayed(tables, shape, density, block):
    """Layers whose calls take as long as their kernels."""
    problem = Problem(*shape, density, block)
    steps = problem.steps()
    sparse = SparseLinear.from_dense(problem.linear, problem.mask, block)
    for name, layer in (("replayed", sparse), ("dense replayed", DenseMasked.of(problem.linear, problem.mask))):
        steps[name] = problem.replayed(layer)
    times = in_turns({name: steps[name] for name in ("eager", "compiled", "replayed", "dense replayed")})
    tables.add(
        "Forward and backward of one layer, replayed",
        layer=f"{shape[0]}→{shape[1]}, batch {shape[2]}",
        remaining=f"{density:.1%}",
        block=f"{block[0]}×{block[1]}",
        **{"dense masked, ms": f"{dense_masked(times).median * 1e3:.3g}"},
        **replayed_columns(times),
    )


def network(sizes: Sequence[int], density: float, block: tuple[int, int], sparse: bool) -> nn.Module:
    """Linear layers with ReLU between them, sparse or dense masked; the same weights and masks both ways."""
    torch.manual_seed(1)
    drawn = [(nn.Linear(i, o), random_mask(o, i, density, block)) for i, o in itertools.pairwise(sizes)]
    layers = [
        module for linear, mask in drawn for module in (linear if sparse else DenseMasked.of(linear, mask), nn.ReLU())
    ]
    net = nn.Sequential(*layers[:-1])
    masks = {str(2 * number): mask for number, (_, mask) in enumerate(drawn)}
    return sparsify(net, masks, block, when="always") if sparse else net


def training_step(
    net: nn.Module, x: Tensor, target: Tensor, run: Callable | None = None, lr: float = 0.0, replay: bool = False
) -> Callable[[], Tensor]:
    """zero_grad, forward, cross entropy, backward, fused Adam; returns the loss.

    Timed with a learning rate of 0: thousands of steps on one batch would fit it, and underflowing gradients are slow.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    run = net if run is None else run

    def step(x: Tensor, target: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(run(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return functools.partial(Replayed(step) if replay else step, x, target)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
@pytest.mark.parametrize("name", NETS)
def test_step(benchmark, tables, name, block):
    sizes, batch, density = NETS[name]
    x, target = torch.randn(batch, sizes[0]), torch.randint(sizes[-1], (batch,))
    sparse, twin, exact = (network(sizes, density, block, sparse) for sparse in (True, True, False))
    ours = training_step(sparse, x, target, lr=1.2e-3)
    replayed = training_step(twin, x, target, lr=1.2e-3, replay=True)
    exact = training_step(exact.double(), x.double(), target, lr=1.2e-3)
    for _ in range(8):
        loss = ours()
        assert abs(loss - exact()) < 1e-5 and torch.equal(loss, replayed())
    masked, compiled = (network(sizes, density, block, sparse=False) for _ in range(2))
    steps = {
        "sparse": training_step(network(sizes, density, block, sparse=True), x, target),
        "eager": training_step(masked, x, target),
        "compiled": training_step(compiled, x, target, torch.compile(compiled)),
        "hollow": training_step(Hollow(network(sizes, density, block, sparse=True), sizes[-1]), x, target),
        "multiply-adds": multiply_adds,
        "replayed": training_step(network(sizes, density, block, sparse=True), x, target, replay=True),
        "dense replayed": training_step(network(sizes, density, block, sparse=False), x, target, replay=True),
    }
    weights = [round(density * inputs * out) for inputs, out in itertools.pairwise(sizes)]
    flops = 2.0 * batch * (2 * weights[0] + 3 * sum(weights[1:]))
    for _ in range(CALLS_BEFORE):
        steps["replayed"](), steps["dense replayed"]()
    times = in_turns(steps, seconds=2.0)
    row = columns(times, flops, rate=False) | replayed_columns(times)
    title = "Whole training step: zero_grad, forward, loss, backward, fused Adam"
    tables.add(title, net=name, remaining=f"{density:.1%}", block=f"{block[0]}×{block[1]}", **row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(steps["sparse"], rounds=10, warmup_rounds=1)


def parts_of_step(net: nn.Module, x: Tensor, target: Tensor, steps: int = 400) -> dict[str, float]:
    """Median microseconds of each part of a training step."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0, fused=True)
    names = ["zero_grad", "forward", "loss", "backward", "Adam"]
    kept: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(steps):
        moments = [time.perf_counter()]

        def lap(moments: list[float] = moments) -> None:
            moments.append(time.perf_counter())

        optimizer.zero_grad()
        lap()
        y = net(x)
        lap()
        loss = F.cross_entropy(y, target)
        lap()
        loss.backward()
        lap()
        optimizer.step()
        lap()
        for name, (start, end) in zip(names, itertools.pairwise(moments), strict=True):
            kept[name].append((end - start) * 1e6)
    return {name: statistics.median(times) for name, times in kept.items()}


PART_OF = {"mlp_forward": "forward", "mlp_backward": "backward", "foreach_add": "Adam", "fused_adam": "Adam"}


def parts_of_replay(net: nn.Module, x: Tensor, target: Tensor, steps: int = 400) -> dict[str, float]:
    """Median microseconds of the operators of each part of a replayed step; what is no other part is the loss."""
    step = training_step(net, x, target)
    for _ in range(CALLS_BEFORE):
        step()
    recorder = Recorder(())
    with recorder:
        loss = step()
    kept: dict[str, list[float]] = {}

    def timed(name: str, operator: Callable) -> Callable:
        def run(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            result = operator(*args, **kwargs)
            kept.setdefault(name, []).append((time.perf_counter() - start) * 1e6)
            return result

        return run

    operators = {name: value for name, value in recorder.bound.items() if callable(value)}
    recorder.bound.update({name: timed(name, operator) for name, operator in operators.items()})
    program = recorder.program(loss)
    for _ in range(steps):
        program()
    parts = dict.fromkeys(("forward", "loss", "backward", "Adam"), 0.0)
    for name, times in kept.items():
        part = next((part for key, part in PART_OF.items() if key in name), "loss")
        parts[part] += statistics.median(times) * len(times) / steps
    return parts


@pytest.mark.parametrize("name", NETS)
def test_parts_of_a_step(tables, name):
    """Where the time of a sparse step goes, beside that of one around an operator that computes nothing: the floor that
    PyTorch's own cost sets, whatever the kernels do."""
    sizes, batch, density = NETS[name]
    x, target = torch.randn(batch, sizes[0]), torch.randint(sizes[-1], (batch,))
    sparse = network(sizes, density, (1, 1), sparse=True)
    nets = {
        "dense masked": network(sizes, density, (1, 1), sparse=False),
        "sparse": sparse,
        "nothing computed": Hollow(sparse, sizes[-1]),
    }
    found = {title: parts_of_step(net, x, target) for title, net in nets.items()}
    found["sparse, replayed"] = {"zero_grad": 0.0, **parts_of_replay(sparse, x, target)}
    for title, parts in found.items():
        row = {part: f"{microseconds:.0f}" for part, microseconds in parts.items()}
        tables.add("Parts of a training step, µs", net=f"{name}, {title}", **row, sum=f"{sum(parts.values()):.0f}")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}-b{shape[2]}")
def test_parts_of_a_layer(tables, shape, block):
    """Where the time of one layer goes: its two operators alone, without autograd, and all the rest, beside one that
    computes nothing: the floor that PyTorch's own cost sets."""
    problem = Problem(*shape, 0.036, block)
    layer = SparseLinear.from_dense(problem.linear, problem.mask, block)
    whole = problem.step(layer, batch_innermost=True)
    problem.check(layer, whole)
    x, dy = whole.x.detach(), problem.dy.T.contiguous().T  # type: ignore[attr-defined]
    values, bias, where = layer.values.detach(), layer.bias.detach(), (layer.pattern.index, layer.pattern.weight_shape)
    wanted = [not problem.first, True, True]
    times = in_turns(
        {
            "forward": lambda: operators.linear(x, values, bias, *where),
            "backward": lambda: torch.ops.lottery_kernels.linear_backward(dy, x, values, *where, wanted),
            "whole": whole,
            "nothing computed": problem.step(Hollow(layer, problem.out)),
        }
    )
    row = {name: f"{kept.median * 1e6:.0f}" for name, kept in times.items()}
    name = f"{shape[0]}→{shape[1]}, batch {shape[2]}"
    tables.add("Parts of a layer at 3.6 %, µs", layer=name, block=f"{block[0]}×{block[1]}", **row)


def allocated(layer: SparseLinear, batch: int) -> dict[str, int]:
    """Bytes by purpose: what training a sparse layer keeps, and what its kernels use while they run."""
    values = layer.values.numel() * layer.values.element_size()
    threads, lanes = torch.get_num_threads(), {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)
    width = 4 * lanes  # batch entries of a panel
    panels = threads * width * max(layer.in_features, layer.out_features) * 4
    parts = 2 if -(-batch // width) % 2 == 0 else 1  # of the batch, whose sums are added in the end
    sums = (parts if layer.block == (1, 1) else parts - 1) * values
    index = sum(array.numel() * array.element_size() for array in layer.pattern.index)
    return {"values": values, "gradient": values, "Adam": 2 * values, "index": index, "workspace": panels + sums}


@pytest.mark.parametrize("block", [(1, 1), (16, 16)], ids=lambda block: f"{block[0]}x{block[1]}")
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=lambda shape: f"{shape[0]}-{shape[1]}-b{shape[2]}")
def test_density(benchmark, tables, shape, block):
    won = []
    for density in SWEEP:
        problem = Problem(*shape, density, block)
        steps = problem.steps()
        for name in ("SparseProp", "behind SparseProp"):
            steps.pop(name, None)
        times = in_turns(steps, seconds=0.3)
        layer = SparseLinear.from_dense(problem.linear, problem.mask, block)
        sizes = allocated(layer, problem.batch)
        if dense_masked(times).median > times["sparse"].median:
            won.append(density)
        dense_bytes = 5 * layer.in_features * layer.out_features * 4  # weight, mask, gradient, Adam's two
        tables.add(
            f"By density: {shape[0]}→{shape[1]}, batch {shape[2]}, blocks of {block[0]}×{block[1]}",
            remaining=f"{density:.1%}",
            **columns(times, problem.flops),
            **{"KiB": sum(sizes.values()) // 1024, "of dense": f"{sum(sizes.values()) / dense_bytes:.0%}"},
        )
    row = {"faster than dense masked from": f"{max(won):.0%}" if won else "never"}
    tables.add("Overtaking", layer=f"{shape[0]}→{shape[1]}, batch {shape[2]}", block=f"{block[0]}×{block[1]}", **row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(steps["sparse"], rounds=10, warmup_rounds=1)
