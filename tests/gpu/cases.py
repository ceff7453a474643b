"""Layers, masks and inputs to try kernels on, and what their results must be."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from lottery_kernels import Pattern
from lottery_kernels.gpu import conv, conv_wgrad, launch, linear

BLOCKS = (16, 32, 64, 128)
# name -> dtype of the tensors, what torch's switch for fp32 says
PRECISIONS = {
    "fp16": (torch.float16, "ieee"),
    "bf16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}


@dataclass(frozen=True)
class Layer:
    """A linear layer, or with an `image` a convolution, and a batch for it."""

    precision: str
    block: tuple[int, int]
    weight_shape: tuple[int, ...]
    batch: int
    image: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    density: float = 0.3  # share of live blocks
    exact: bool = False  # whether as many blocks are live as that share rounds to; otherwise each is drawn
    fine: bool = False  # whether the mask is finer than its blocks
    bias: bool = True
    relu: bool = False
    layout: str = "plain"  # of activations: plain, transposed or sliced
    seed: int = 0
    together: int | None = None  # lines that a program works off, None: as the settings say

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision][0]

    @property
    def geometry(self) -> dict[str, Any]:
        options = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        return options if self.image else {}

    def mask(self) -> Tensor:
        """Drawn block by block at every tap."""
        out, inputs, *kernel = self.weight_shape
        rows, cols = out // self.groups, inputs
        shape = (self.groups, -(-rows // self.block[0]), -(-cols // self.block[1]), *kernel)
        mask = torch.rand(shape, generator=self._generator())
        if self.exact:  # the smallest numbers
            mask = mask.flatten().argsort().argsort().reshape(shape) < round(self.density * mask.numel())
        else:
            mask = mask < self.density
        mask = mask.repeat_interleave(self.block[0], 1)[:, :rows].repeat_interleave(self.block[1], 2)[:, :, :cols]
        mask = mask.reshape(self.weight_shape)
        return mask & (torch.rand(mask.shape, generator=self._generator()) < 0.5) if self.fine else mask

    def pattern(self) -> Pattern:
        return Pattern.from_mask(self.mask(), self.block, self.groups)

    def tensors(self, device: str = "cpu") -> dict[str, Tensor]:
        """Random `x`, `weight` (dense), `bias` and `dy`, the same on every device."""
        generator = self._generator()

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        inputs = self.weight_shape[1] * self.groups
        x = draw(self.batch, inputs, *(self.image or ()))
        weight = draw(*self.weight_shape)
        dy_shape = self._dense(x.to("meta"), weight.to("meta"), None).shape
        tensors = {"x": x, "weight": weight, "bias": draw(self.weight_shape[0]), "dy": draw(*dy_shape)}
        moved = {name: t.to(device) for name, t in tensors.items()}
        return {name: self._laid_out(t) if name in ("x", "dy") else t for name, t in moved.items()}

    def sparse(self, device: str = "cpu") -> dict[str, Callable[[], Tensor]]:
        """The launchers' results by name: y, dx and dvalues."""
        pattern = self.pattern().to(device)
        x, weight, bias, dy = self.tensors(device).values()
        values, added = pattern.pack(weight), bias if self.bias else None
        if self.image is None:
            passes = {
                "y": lambda: linear.linear(x, values, pattern, added, self.relu),
                "dx": lambda: linear.linear_dgrad(dy, values, pattern),
                "dvalues": lambda: linear.linear_wgrad(dy, x, pattern),
            }
        else:
            passes = {
                "y": lambda: conv.conv2d(x, values, pattern, added, **self.geometry),
                "dx": lambda: conv.conv2d_dgrad(dy, values, pattern, x.shape, **self.geometry),
                "dvalues": lambda: conv_wgrad.conv2d_wgrad(dy, x, pattern, **self.geometry),
            }
        return {name: functools.partial(self._launched, compute) for name, compute in passes.items()}

    def dense(self, compute: Callable[[Tensor], Tensor], device: str = "cpu") -> dict[str, Tensor]:
        """What dense masked PyTorch makes of inputs that `compute` has prepared, by autograd."""
        pattern = self.pattern().to(device)
        x, weight, bias, dy = map(compute, self.tensors(device).values())
        weight = weight * pattern.mask
        x.requires_grad_(), weight.requires_grad_()
        y = self._dense(x, weight, bias if self.bias else None)
        dx, dweight = torch.autograd.grad(y, (x, weight), dy)
        return {"y": (y.relu() if self.relu else y).detach(), "dx": dx, "dvalues": pattern.pack(dweight)}

    def _launched(self, compute: Callable[[], Tensor]) -> Tensor:
        if self.together is None:
            return compute()
        with mock.patch.object(launch, "lines_together", lambda *_: self.together):
            return compute()

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, **self.geometry) if self.image else F.linear(x, weight, bias)

    def _laid_out(self, t: Tensor) -> Tensor:
        if self.layout == "transposed":
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        if self.layout == "sliced":
            return torch.stack([t, t.new_full((), torch.nan).expand_as(t)], 1).flatten(0, 1)[::2]
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """Sets torch's switches for fp32, and puts them back."""
    owners: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [owner.fp32_precision for owner in owners]
    for owner in owners:
        owner.fp32_precision = PRECISIONS[name][1]
    try:
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.fp32_precision = value


def as_tensor_core(layer: Layer, device: str = "cpu") -> dict[str, Tensor]:
    """What torch's own operators make of the inputs: exact products, in tf32 of rounded inputs as cuBLAS hands them to
    tensor cores, fp32 sums, a rounded result."""

    def read(t: Tensor) -> Tensor:
        if layer.precision != "tf32":
            return t.float()
        return ((t.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)  # 10 bits of mantissa are left

    if layer.precision == "tf32":  # a bias is added, not multiplied
        bias = layer.tensors(device)["bias"]
        found = layer.dense(lambda t: bias.clone() if t.shape == bias.shape else read(t).clone(), device)
    else:
        found = layer.dense(read, device)
    return {name: t.to(layer.dtype) for name, t in found.items()}


def check(found: Tensor, exact: Tensor, torchs: Tensor, what: str) -> None:
    """Raises unless `found` errs at most twice as much as `torchs`, at worst and on the whole."""
    assert found.shape == exact.shape and found.dtype == torchs.dtype, what
    assert found.isfinite().all(), f"{what}: something was not written"
    floor = torch.finfo(torch.float32).eps * exact.abs().max() if exact.numel() else 0
    ours, theirs = (result.to(exact.device).double() - exact for result in (found, torchs))
    if exact.numel():
        assert ours.abs().max() <= 2 * theirs.abs().max() + floor, (
            f"{what}: {ours.abs().max()}, torch {theirs.abs().max()}"
        )
        assert ours.norm() <= 2 * theirs.norm() + floor, f"{what}: {ours.norm()}, torch {theirs.norm()} on the whole"


def draw(kind: str, precision: str, seed: int) -> Layer:
    """A random small layer, odd in size more often than not."""
    choose = random.Random(f"{kind} {precision} {seed}")
    block = (choose.choice(BLOCKS), choose.choice(BLOCKS))
    common = {
        "precision": precision,
        "block": block,
        "density": choose.choice((0.0, 0.1, 0.3, 0.3, 1.0)),
        "fine": choose.random() < 0.3,
        "bias": choose.random() < 0.5,
        "layout": choose.choice(("plain", "plain", "transposed", "sliced")),
        "seed": seed,
        "together": (2, 1, 4, 8)[seed % 4],
    }

    def size(block: int, most: int) -> int:
        whole = choose.random() < 0.4
        return block * choose.randint(1, max(1, most // block)) if whole else choose.randint(1, most)

    if kind == "linear":
        shape = (size(block[0], 200), size(block[1], 200))
        return Layer(weight_shape=shape, batch=choose.choice((1, 7, 60, 150)), relu=choose.random() < 0.3, **common)
    groups = choose.choice((1, 1, 1, 2, 3))
    kernel = choose.choice(((1, 1), (3, 3), (3, 3), (2, 4)))
    dilation = (choose.choice((1, 1, 2)), choose.choice((1, 1, 2)))
    image = tuple(choose.randint(dilation[i] * (kernel[i] - 1) + 1, 9) for i in (0, 1))
    return Layer(
        weight_shape=(groups * size(block[0], 80), size(block[1], 80), *kernel),
        batch=choose.choice((1, 2)),
        image=image,
        stride=(choose.choice((1, 1, 2, 3)), choose.choice((1, 2))),
        padding=(choose.choice((0, 1, 2)), choose.choice((0, 1))),
        dilation=dilation,
        groups=groups,
        **common,
    )


def draw_long(kind: str, precision: str, seed: int) -> Layer:
    """The same with narrow blocks, over so many rows or pixels that programs of the weight gradient take several."""
    choose = random.Random(f"long {kind} {precision} {seed}")
    block = (choose.choice((16, 32)), choose.choice((16, 32)))
    layer = replace(draw(kind, precision, seed), block=block, density=choose.choice((0.1, 0.3, 0.6, 1.0)))
    rows = choose.choice((1024, 1280, 1536, 2048, choose.randint(1025, 2047)))
    if kind == "linear":
        return replace(layer, batch=rows)
    image = (choose.choice((2, 4, 8)), choose.choice((2, 4, 8)))
    same = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}  # dy is as large as x
    shape = (*layer.weight_shape[:2], 3, 3)
    return replace(layer, weight_shape=shape, image=image, batch=rows // (image[0] * image[1]), **same)
