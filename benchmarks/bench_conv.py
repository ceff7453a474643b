"""Sparse convolutions on the CPU beside dense masked PyTorch, forward and backward of one layer.

    pytest benchmarks/bench_conv.py [--results FILE] [-k "layer and 64-64 and 1x1" | density]

Every figure stands beside a parity check against fp64 in the same run. Dense masked is weight × mask, then `F.conv2d`,
with activations and weights as NCHW and as channels_last; the faster of the two is what a speed-up is over. The sparse
layer gets activations in the layout that its neighbours hand over, batch innermost; what it costs to enter that layout
from NCHW stands beside, and its floor: the time to read x and write y, then to read x and dy and write dx, with nothing
computed. SparseProp (ICML 2023), the best published sparse training on a CPU, runs too where it is installed, in the
better of its two forms.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.timing import Times, in_turns
from lottery_kernels import SparseConv2d
from lottery_kernels.cpu import build

BATCH = 64
BLOCKS = [(1, 1), (4, 4), (8, 8)]
# (in, out, image, kernel, stride)
SHAPES = [
    (64, 64, 32, 3, 1),
    (128, 128, 16, 3, 1),
    (256, 256, 8, 3, 1),
    (512, 512, 4, 3, 1),
    (512, 512, 2, 3, 1),
    (64, 128, 32, 3, 2),
    (256, 256, 16, 1, 1),
    (256, 512, 8, 1, 2),
]
SWEEP = [0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1]  # densities


@pytest.fixture(scope="module", autouse=True)
def floors_are_there() -> None:
    torch.ops.load_library(build.library(Path(__file__).parent / "floors"))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def random_mask(shape: torch.Size, density: float, block: tuple[int, int]) -> Tensor:
    """Whole blocks at single taps, drawn at random; exactly `density` of them."""
    out, inputs, height, width = shape
    rows, cols = -(-out // block[0]), -(-inputs // block[1])
    live = torch.zeros(rows * cols * height * width, dtype=torch.bool)
    live[torch.randperm(live.numel())[: max(1, round(density * live.numel()))]] = True
    mask = live.reshape(rows, cols, height, width).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return mask[:out, :inputs].contiguous()


def batch_innermost(x: Tensor) -> Tensor:
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


class DenseMasked(nn.Conv2d):
    """weight × mask in every forward, as `torch.nn.utils.prune` does."""

    mask: Tensor

    @classmethod
    def of(cls, conv: nn.Conv2d, mask: Tensor) -> DenseMasked:
        layer = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=conv.bias is not None
        )
        layer.load_state_dict(conv.state_dict())
        layer.register_buffer("mask", mask.to(conv.weight.dtype))
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


@dataclass
class Problem:
    """One layer: weight, mask, input and cotangent."""

    inputs: int
    out: int
    image: int
    kernel: int
    stride: int
    density: float
    block: tuple[int, int]
    conv: nn.Conv2d = field(init=False)

    def __post_init__(self) -> None:
        self.conv = nn.Conv2d(self.inputs, self.out, self.kernel, self.stride, self.kernel // 2, bias=False)
        self.mask = random_mask(self.conv.weight.shape, self.density, self.block)
        self.x = torch.randn(BATCH, self.inputs, self.image, self.image)
        self.dy = torch.randn_like(self.conv(self.x))

    @property
    def flops(self) -> float:
        """Of the live weights, forward and backward, taps in the padding included."""
        return 6.0 * int(self.mask.sum()) * BATCH * self.dy.shape[2] * self.dy.shape[3]

    def step(self, layer: nn.Module, enter: Callable[[Tensor], Tensor] = torch.clone) -> Callable[[], Tensor]:
        """Forward and backward of a layer, in the layout that its neighbours would give it; returns y."""
        x, dy = enter(self.x).requires_grad_(), enter(self.dy)

        def step() -> Tensor:
            x.grad = None
            for parameter in layer.parameters():
                parameter.grad = None
            y = layer(x)
            y.backward(dy)
            return y

        step.x = x  # type: ignore[attr-defined]
        return step

    def check(self, layer: SparseConv2d, step: Callable[[], Tensor]) -> None:
        """y, dx and the values' gradient against fp64: root mean square error at most twice that of dense masked."""
        y, dx = step().detach(), step.x.grad  # type: ignore[attr-defined]
        found = [y, dx, layer.values.grad]
        single, exact = self._dense(torch.float32, layer), self._dense(torch.float64, layer)
        for ours, theirs, true in zip(found, single, exact, strict=True):
            assert (ours - true).square().mean().sqrt() <= 2 * (theirs - true).square().mean().sqrt()

    def _dense(self, dtype: torch.dtype, sparse: SparseConv2d) -> list[Tensor]:
        layer = DenseMasked.of(self.conv, self.mask).to(dtype)
        x = self.x.to(dtype, copy=True).requires_grad_()
        y = layer(x)
        y.backward(self.dy.to(dtype))
        assert x.grad is not None and layer.weight.grad is not None
        return [y.detach(), x.grad, sparse.pattern.pack(layer.weight.grad)]

    def traffic(self, y: Tensor, dx: Tensor) -> Callable[[], None]:
        """What no forward and backward can do without: reads of x and dy, writes of y and dx."""
        x, dy = batch_innermost(self.x), batch_innermost(self.dy)
        read = min(1, self.kernel / self.stride) ** 2  # a stride past the kernel leaves sources out
        x, dy, y, dx = (t.permute(1, 2, 3, 0).flatten() for t in (x, dy, y, dx))
        x = x[: round(read * x.numel())]

        def stream() -> None:
            torch.ops.lottery_benchmarks.traffic([x], [y])
            torch.ops.lottery_benchmarks.traffic([x, dy], [dx])

        return stream

    def steps(self) -> dict[str, Callable[[], object]]:
        """All contestants; parity of ours is checked first."""
        sparse = SparseConv2d.from_dense(self.conv, self.mask, self.block)
        ours = self.step(sparse, batch_innermost)
        self.check(sparse, ours)
        last = torch.channels_last
        steps: dict[str, Callable[[], object]] = {
            "sparse": ours,
            "NCHW": self.step(DenseMasked.of(self.conv, self.mask)),
            "channels_last": self.step(
                DenseMasked.of(self.conv, self.mask).to(memory_format=last), lambda t: t.clone(memory_format=last)
            ),
        }
        if importlib.util.find_spec("sparseprop") and self.block == (1, 1):
            for form in (False, True):
                steps[f"SparseProp {form}"] = self.step(_sparseprop(self.conv, self.mask, form))
        # What comes behind SparseProp needs five calls to reach the time that it has after one behind the others, so
        # nothing that is compared does.
        steps["enter"] = lambda: batch_innermost(self.x)
        steps["floor"] = self.traffic(ours().detach(), ours.x.grad)  # type: ignore[attr-defined]
        return steps


def _sparseprop(conv: nn.Conv2d, mask: Tensor, form: bool) -> nn.Module:
    from sparseprop.modules import SparseConv2d as SparsePropConv2d

    size = {"padding": conv.padding[0], "stride": conv.stride[0]}
    return SparsePropConv2d(conv.weight.detach() * mask, **size, vectorizing_over_on=form)


def title_of(shape: tuple[int, int, int, int, int]) -> str:
    inputs, out, image, kernel, stride = shape
    return f"{inputs}→{out}, {kernel}×{kernel}" + (f" stride {stride}" if stride > 1 else "") + f", {image}×{image}"


def fastest(times: dict[str, Times], *names: str) -> Times:
    return min((times[name] for name in names), key=lambda kept: kept.median)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
@pytest.mark.parametrize("density", [0.036, 0.07])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_layer(benchmark, tables, shape, density, block):
    problem = Problem(*shape, density, block)
    steps = problem.steps()
    times = in_turns(steps, seconds=1.5)
    dense, sparse = fastest(times, "NCHW", "channels_last"), times["sparse"]
    row = {
        "dense masked, ms": f"{dense.median * 1e3:.3g}",
        "sparse, ms": f"{sparse.median * 1e3:.3g}",
        "GFLOP/s": f"{problem.flops / sparse.median / 1e9:.0f}",
        "speed-up": str(sparse.speedup_over(dense)),
        "floor, ms": f"{times['floor'].median * 1e3:.3g}",
        "entering, ms": f"{times['enter'].median * 1e3:.3g}",
    }
    if "SparseProp True" in times:
        row["SparseProp"] = str(fastest(times, "SparseProp True", "SparseProp False").speedup_over(dense))
    name = title_of(shape)
    title = f"Forward and backward of one layer, fp32, batch {BATCH}"
    tables.add(title, layer=name, remaining=f"{density:.1%}", block=f"{block[0]}×{block[1]}", **row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(steps["sparse"], rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
def test_density(benchmark, tables, block):
    """Speed-ups from the highest density down to one of 1.2, and the lowest such density: what crossover.json holds."""
    reached = []
    for shape in SHAPES:
        row = {}
        for density in SWEEP:
            steps = Problem(*shape, density, block).steps()
            times = in_turns({name: steps[name] for name in ("sparse", "NCHW", "channels_last")}, seconds=0.3)
            speedup = times["sparse"].speedup_over(fastest(times, "NCHW", "channels_last"))
            row[f"{density:.0%}"] = f"{speedup.median:.2f}×"
            if speedup.median >= 1.2:
                break
        reached.append(density if speedup.median >= 1.2 else 0.0)
        tables.add(f"Speed-up by density, blocks of {block[0]}×{block[1]}", layer=title_of(shape), **row)
    lowest = {"1.2 times as fast below": f"{min(reached):.0%}"}
    tables.add("Every layer", block=f"{block[0]}×{block[1]}", **lowest)
    benchmark.extra_info.update(lowest)
    benchmark.pedantic(steps["sparse"], rounds=3, warmup_rounds=1)
