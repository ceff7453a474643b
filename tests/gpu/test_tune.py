"""Measured launch settings, with a timer that says what the test wants."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lottery_kernels.gpu import tune, tuned
from lottery_kernels.gpu.settings import Target, Tile
from tests.gpuless import kernels
from tests.gpuless.driver import stand_in

from .cases import Layer, as_tensor_core, check

TABLE = Tile(rows=64, cols=32, depth=32, warps=4, stages=3, group=8)
A100 = Target("cuda", 80, 108)
SIZES = tune.Sizes(rows=100, lines=4, nnz=9)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and tuning turned on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOTTERY_KERNELS_TUNE", "1")
    tune.forget()
    yield tmp_path / "lottery-kernels" / "tiles"
    tune.forget()


class Gpu:
    """Runs nothing; a launch takes as long as `time` says of its tile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, time: Callable[[Tile], float]) -> None:
        self.time, self.launched = time, list[Tile]()
        monkeypatch.setattr(tune, "milliseconds", self.measured)

    def measured(self, run: Callable[[], None]) -> float:
        run()
        return self.time(self.launched[-1])

    def tile(self, sizes: tune.Sizes = SIZES, target: Target = A100, **options: object) -> Tile:
        return tune.best_tile(
            kernels.product_kernel, TABLE, (64, 128), ("bf16",), sizes, target, self.launched.append, **options
        )


def distance(best: Tile) -> Callable[[Tile], float]:
    """A time that falls with every step towards a tile."""

    def time(tile: Tile) -> float:
        doubled = sum(
            abs((getattr(tile, name) / getattr(best, name)) - 1) for name in ("rows", "cols", "depth", "warps", "group")
        )
        return 1 + doubled + abs(tile.stages - best.stages)

    return time


def test_the_fastest_is_found_step_by_step(monkeypatch):
    best = replace(TABLE, rows=32, warps=2, depth=64)
    assert Gpu(monkeypatch, distance(best)).tile() == best


def test_the_tables_tile_stays_unless_another_is_clearly_faster(monkeypatch):
    gpu = Gpu(monkeypatch, lambda tile: 1.0 if tile == TABLE else 0.99)
    assert gpu.tile() == TABLE
    assert len(set(gpu.launched)) == len(gpu.launched) > 8


def test_it_is_measured_once_and_read_by_the_next_process(monkeypatch, cache):
    best = replace(TABLE, warps=8)
    assert Gpu(monkeypatch, distance(best)).tile() == best
    tune.forget()  # as a new process would have
    gpu = Gpu(monkeypatch, distance(TABLE))
    assert gpu.tile() == best
    assert gpu.launched == []
    assert [path.name for path in cache.iterdir()] == [next(iter(tune.stored())) + ".json"]


def test_sizes_share_a_measurement_up_to_powers_of_two(monkeypatch):
    gpu = Gpu(monkeypatch, distance(TABLE))
    gpu.tile()
    measured = len(gpu.launched)
    gpu.tile(tune.Sizes(rows=128, lines=3, nnz=16))
    assert len(gpu.launched) == measured
    gpu.tile(tune.Sizes(rows=129, lines=4, nnz=9))
    assert len(gpu.launched) == 2 * measured


def test_gpus_keep_files_of_their_own(monkeypatch):
    gpu = Gpu(monkeypatch, distance(TABLE))
    gpu.tile()
    measured = len(gpu.launched)
    gpu.tile(target=Target("cuda", 90, 132))
    assert len(gpu.launched) == 2 * measured
    assert sorted(tune.stored().values()) == [1, 1]


def test_what_another_process_stored_is_kept(monkeypatch, cache):
    gpu = Gpu(monkeypatch, distance(TABLE))
    gpu.tile()
    path = next(cache.iterdir())
    theirs = {"another": json.loads(path.read_bytes()).popitem()[1]}
    path.write_text(json.dumps(theirs))
    gpu.tile(tune.Sizes(1000, 4, 9))
    assert json.loads(path.read_bytes()).keys() > {"another"}
    assert tune.stored() == {path.stem: 3}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff",
        b"[]",
        b'{"key": 3}',
        b'{"key": {"rows": 64}}',
        b'{"key": {"rows": "x"}}',
        b'{"key": {"rows": 64, "cols": 32, "depth": 32, "warps": -4, "stages": 3, "group": 8}}',
    ],
)
def test_a_damaged_file_is_not_used_and_made_anew(monkeypatch, cache, content):
    gpu = Gpu(monkeypatch, distance(TABLE))
    gpu.tile()
    path, measured = next(cache.iterdir()), len(gpu.launched)
    whole = path.read_bytes()
    path.write_bytes(content)
    tune.forget()
    with pytest.warns(UserWarning, match="is damaged and is not used"):
        assert gpu.tile() == TABLE
    assert len(gpu.launched) == 2 * measured
    assert path.read_bytes() == whole
    assert list(cache.iterdir()) == [path]


def test_where_nothing_can_be_written_it_serves_this_process(monkeypatch, tmp_path):
    (tmp_path / "lottery-kernels").write_text("in the way")
    gpu = Gpu(monkeypatch, distance(TABLE))
    with pytest.warns(UserWarning, match="lost when this process ends"):
        gpu.tile()
    measured = len(gpu.launched)
    gpu.tile()
    assert len(gpu.launched) == measured


def test_tiles_that_do_not_run_are_passed_over(monkeypatch):
    gpu = Gpu(monkeypatch, lambda tile: tile.warps)

    def run(tile: Tile) -> None:
        if tile.warps < 4:
            raise RuntimeError("does not fit this GPU")
        gpu.launched.append(tile)

    assert tune.best_tile(kernels.product_kernel, TABLE, (64, 128), (), SIZES, A100, run) == TABLE


def test_the_tables_own_error_is_told(monkeypatch):
    def run(tile: Tile) -> None:
        raise RuntimeError("does not fit this GPU")

    Gpu(monkeypatch, distance(TABLE))
    with pytest.raises(RuntimeError, match="does not fit"):
        tune.best_tile(kernels.product_kernel, TABLE, (64, 128), (), SIZES, A100, run)


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch):
    gpu = Gpu(monkeypatch, distance(replace(TABLE, warps=8)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert gpu.tile() == TABLE and gpu.launched == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert gpu.tile().warps == 8  # and it is not remembered that the table served
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert gpu.tile().warps == 8
    assert next(iter(tune.stored())).startswith("NVIDIA-A100-SXM4-40GB_triton-")


@pytest.mark.parametrize("value", [None, "", "0"])
def test_without_being_asked_the_table_serves(monkeypatch, value, cache):
    gpu = Gpu(monkeypatch, distance(replace(TABLE, warps=8)))
    gpu.tile()
    if value is None:
        monkeypatch.delenv("LOTTERY_KERNELS_TUNE")
    else:
        monkeypatch.setenv("LOTTERY_KERNELS_TUNE", value)
    assert gpu.tile() == TABLE


def test_neighbours_stay_within_the_block_and_the_limits():
    block = (16, 32)
    tile = Tile(rows=256, cols=16, depth=32, warps=1, stages=2, group=1)
    found = list(tune.neighbours(tile, block, A100))
    assert found == [
        replace(tile, rows=128),
        replace(tile, warps=2),
        replace(tile, stages=3),
        replace(tile, group=2),
        replace(tile, depth=16),
    ]
    assert replace(tile, group=2) not in tune.neighbours(tile, block, A100, fixed=("group",))
    assert replace(tile, stages=3) not in tune.neighbours(tile, block, Target("hip", "gfx942", 304))


LAYERS = {
    "linear": Layer("bf16", (32, 32), (64, 96), 70),
    "conv2d": Layer("bf16", (32, 32), (64, 32, 3, 3), 2, (6, 5), (1, 1), (1, 1)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_launchers_launch_what_was_measured_to_be_fastest(monkeypatch, kind):
    """All three operators of a kind, each with a search of its own."""

    def milliseconds(run: Callable[[], None]) -> float:
        run()
        return float(driver.launches[-1].metadata.num_warps)

    monkeypatch.setattr(tune, "milliseconds", milliseconds)
    monkeypatch.setattr(tune, "neighbours", lambda tile, *rest: [replace(tile, warps=8), replace(tile, warps=1)])
    with stand_in("sm_80", execute=None) as driver:
        for compute in LAYERS[kind].sparse().values():
            compute()
            assert driver.launches[-1].metadata.num_warps == 1
        launches = len(driver.launches)
        for compute in LAYERS[kind].sparse().values():
            compute()
        assert [launch.metadata.num_warps for launch in driver.launches[launches:]] == [1, 1, 1]
    assert tuned() == {next(iter(tune.stored())): 3}


@pytest.mark.matrix
@pytest.mark.parametrize("kind", LAYERS)
def test_every_tile_that_is_tried_computes_the_same(monkeypatch, kind):
    layer = LAYERS[kind]
    exact, torchs = layer.dense(lambda t: t.double()), as_tensor_core(layer)
    outputs = {f"{kind}_product_kernel": 3, f"{kind}_wgrad_kernel": 2}
    checked: list[str] = []

    def timer(name: str) -> Callable[[Callable[[], None]], float]:
        def milliseconds(run: Callable[[], None]) -> float:
            run()
            launch = driver.launches[-1]
            check(launch.args[outputs[launch.name]], exact[name], torchs[name], f"{name} with {launch.metadata}")
            checked.append(name)
            return 1.0

        return milliseconds

    with stand_in("sm_80") as driver:
        for name, compute in layer.sparse().items():
            monkeypatch.setattr(tune, "milliseconds", timer(name))
            compute()
    assert min(checked.count(name) for name in exact) > 5
