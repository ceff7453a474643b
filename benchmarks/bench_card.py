"""The GPU kernels on a card: sparse beside dense PyTorch, layers and whole training steps.

    pytest benchmarks/bench_card.py [--results FILE] [-k "linear or step"]

Dense is PyTorch's own operator on the whole weight, without a mask: cuBLAS's products, and for convolutions in
channels_last the fastest that cuDNN finds. In whole steps it is the network as it is trained without pruning, and
dense masked beside it. Everything is captured in CUDA graphs, so that no launch from the host is in a time; a turn
replays one graph of each kind. Every layer's passes are compared with fp64 in the same run, every network's gradients
with those of the dense masked one.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bench_gpu import LAYERS, blocks_of
from benchmarks.timing import Times
from lottery_kernels import sparsify
from lth.cuda_graph import record
from lth.models import NETWORKS
from tests.gpu.cases import BLOCKS, Layer, check, precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing to time here"),
]
TURNS = 15
REPEATS = 8  # of a layer's pass in one graph
SHARE = 0.05  # of blocks that are live
CASES = [(name, block, SHARE) for name, layer in LAYERS.items() for block in blocks_of(layer)]
CASES += [(name, 32, share) for name in ("linear 4096", "VGG-19 512, 4x4") for share in (0.2, 0.1, 0.03)]


@pytest.fixture(autouse=True)
def fastest_convolutions() -> Iterator[None]:
    torch.backends.cudnn.benchmark = True
    yield
    torch.backends.cudnn.benchmark = False


def on_card(runs: Mapping[str, Callable[[], object]], repeats: int = 1) -> dict[str, Times]:
    """Seconds of each run on the card, in turns; `repeats`: what a run does so often in one graph."""
    kept: dict[str, list[float]] = {name: [] for name in runs}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for turn in range(TURNS + 2):
        for name, run in runs.items():
            start.record()
            run()
            end.record()
            end.synchronize()
            if turn >= 2:
                kept[name].append(start.elapsed_time(end) / 1e3 / repeats)
    return {name: Times(times) for name, times in kept.items()}


def repeated(work: Callable[[], object]) -> Callable[[], None]:
    def often() -> None:
        for _ in range(REPEATS):
            work()

    return record(often)


def dense_passes(layer: Layer) -> dict[str, Callable[[], Tensor]]:
    """y, dx and dvalues of the whole weight."""
    x, weight, _, dy = layer.tensors("cuda").values()
    if layer.image is None:
        return {"y": lambda: F.linear(x, weight), "dx": lambda: dy @ weight, "dvalues": lambda: dy.T @ x}
    weight = weight.contiguous(memory_format=torch.channels_last)
    geometry = [list(layer.stride), list(layer.padding), list(layer.dilation), False, [0, 0], layer.groups]

    def backward(*wanted: bool) -> Tensor:
        results = torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, [*wanted, False])
        return next(result for result in results if result is not None)

    return {
        "y": lambda: F.conv2d(x, weight, **layer.geometry),
        "dx": lambda: backward(True, False),
        "dvalues": lambda: backward(False, True),
    }


@functools.cache
def drawn(name: str) -> dict[str, Tensor]:
    return LAYERS[name].tensors("cuda")


@contextlib.contextmanager
def drawn_once(name: str) -> Iterator[dict[str, Tensor]]:
    """The tensors of a layer, meanwhile the same for all blocks and shares: drawing takes longer than all else."""
    tensors = drawn(name)
    with mock.patch.object(Layer, "tensors", lambda self, device: tensors):
        yield tensors


@pytest.mark.parametrize(("name", "block", "share"), CASES)
def test_layer(tables, name: str, block: int, share: float) -> None:
    layer = replace(LAYERS[name], block=(block, block), density=share)
    with drawn_once(name):
        sparse, dense = layer.sparse("cuda"), dense_passes(layer)
        exact, torchs = (layer.dense(compute, "cuda") for compute in (lambda t: t.double(), lambda t: t.clone()))
    for key, compute in sparse.items():
        check(compute(), exact[key], torchs[key], f"{key} of {layer}")
    graphs = {f"{kind} {key}": repeated(run) for kind, passes in (("sparse", sparse), ("dense", dense))
              for key, run in passes.items()}  # fmt: skip
    times = on_card(graphs, REPEATS)
    live = layer.pattern().nnz * block * block / math.prod(layer.weight_shape)
    row: dict[str, object] = {"layer": name, "block": block, "live": f"{live:.1%}"}
    for key in sparse:
        row[key] = str(times[f"sparse {key}"].speedup_over(times[f"dense {key}"]))
    whole = {kind: _sum([times[f"{kind} {key}"] for key in sparse]) for kind in ("sparse", "dense")}
    row["all three"] = str(whole["sparse"].speedup_over(whole["dense"]))
    for kind, taken in whole.items():
        parts = "/".join(f"{times[f'{kind} {key}'].median * 1e6:.0f}" for key in sparse)
        row[f"{kind}, µs"] = f"{taken.median * 1e6:.0f} ({parts})"
    tables.add(f"Layers in bf16 on one {torch.cuda.get_device_name()}: speed over dense", **row)


def _sum(times: list[Times]) -> Times:
    return Times([sum(turn) for turn in zip(*(one.seconds for one in times), strict=True)])


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", ["linear 2048", "linear 4096"])
def test_forward_beside_pytorchs_block_sparse_product(tables, name: str, block: int) -> None:
    from torch.sparse._triton_ops import bsr_dense_addmm

    layer = replace(LAYERS[name], block=(block, block), density=SHARE)
    with drawn_once(name) as tensors:
        ours = layer.sparse("cuda")["y"]
    pattern = layer.pattern().to("cuda")
    packed = pattern.pack(tensors["weight"])
    bsr = torch.sparse_bsr_tensor(pattern.row_ptr, pattern.col, packed, layer.weight_shape)
    y = packed.new_zeros(layer.weight_shape[0], layer.batch)

    def theirs() -> Tensor:
        return bsr_dense_addmm(y, bsr, tensors["x"].T, beta=0, out=y)

    expected = theirs().T.float()
    assert (ours().float() - expected).norm() <= 1e-2 * expected.norm()
    times = on_card({"ours": repeated(ours), "bsr_dense_addmm": repeated(theirs)}, REPEATS)
    tables.add(
        f"Forward in bf16 on one {torch.cuda.get_device_name()}: speed over torch.sparse's bsr_dense_addmm",
        layer=name,
        block=block,
        speed=str(times["ours"].speedup_over(times["bsr_dense_addmm"])),
        **{f"{kind}, µs": f"{taken.median * 1e6:.0f}" for kind, taken in times.items()},
    )


NETS = {"lenet-wide": (1, 28, 28), "vgg19": (3, 32, 32)}  # network -> its image
BATCH = 128


def masks_of(model: nn.Module, block: int) -> dict[str, Tensor]:
    """Of random blocks, for every layer that holds a few, but for the output."""
    masks = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and name != "output" and min(layer.weight.shape[:2]) >= 2 * block:
            masks[name] = Layer("bf16", (block, block), tuple(layer.weight.shape), 1, density=SHARE, exact=True).mask()
    return masks


def training_step(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], None]:
    """As `lth run --device cuda` runs it: bf16 by autocast, fused Adam, all in one graph."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True, capturable=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()

    return record(step, model)


def gradients(model: nn.Module, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Of the parameters that all kinds share, biases and those of normalisation, in exact fp32."""
    with precision("fp32"):
        F.cross_entropy(model(x), target).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.dim() == 1 and p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("name", NETS)
def test_step(tables, name: str, block: int) -> None:
    torch.manual_seed(0)
    plain = NETWORKS[name](NETS[name], 10).cuda().to(memory_format=torch.channels_last)
    x, target = torch.randn(BATCH, *NETS[name], device="cuda"), torch.randint(10, (BATCH,), device="cuda")
    x, masks = x.contiguous(memory_format=torch.channels_last), masks_of(plain, block)
    models = {
        "dense": plain,
        "dense masked": sparsify(copy.deepcopy(plain), masks, (block, block), when=lambda *_: False),
        "sparse": sparsify(copy.deepcopy(plain), masks, (block, block), when="always"),
    }
    ours, theirs = (gradients(models[kind], x, target) for kind in ("sparse", "dense masked"))
    for key, gradient in theirs.items():
        # ReLUs that flip by rounding change a deep net's gradients by some percent; a wrong kernel changes them wholly.
        assert (ours[key] - gradient).norm() <= 0.1 * gradient.norm(), key
    times = on_card({kind: training_step(model, x, target) for kind, model in models.items()})
    tables.add(
        f"Whole training steps on one {torch.cuda.get_device_name()}, bf16 by autocast, one CUDA graph, batch {BATCH}",
        net=name,
        block=block,
        live=f"{SHARE:.0%} of {len(masks)} layers",
        **{"over dense": str(times["sparse"].speedup_over(times["dense"]))},
        **{"over dense masked": str(times["sparse"].speedup_over(times["dense masked"]))},
        **{f"{kind}, µs": f"{taken.median * 1e6:.0f}" for kind, taken in times.items()},
    )
