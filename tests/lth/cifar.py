"""CIFAR-10's files with made-up images, in both of its formats."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest


def records(count: int, seed: int) -> np.ndarray:
    """Of the binary version: a label byte, then 3 × 32 × 32 pixel bytes."""
    random = np.random.default_rng(seed)
    drawn = random.integers(0, 256, (count, 3073), dtype=np.uint8)
    drawn[:, 0] %= 10
    return drawn


def write_binary(folder: Path, batch: int, test: int) -> None:
    """Five files of `batch` training images, and `test` test images."""
    for number in range(1, 6):
        records(batch, number).tofile(folder / f"data_batch_{number}.bin")
    records(test, 0).tofile(folder / "test_batch.bin")


def write_python(folder: Path, batch: int, test: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as torchvision lays it out; the checksums that it compares become those of these files."""
    from torchvision.datasets import CIFAR10

    def write(name: str, content: object) -> list[str]:
        path = folder / "cifar-10-batches-py" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(content))
        return [name, hashlib.md5(path.read_bytes()).hexdigest()]

    def images(count: int, seed: int) -> dict[str, object]:
        drawn = records(count, seed)
        return {"data": drawn[:, 1:], "labels": drawn[:, 0].tolist()}

    monkeypatch.setattr(CIFAR10, "train_list", [write(f"data_batch_{n}", images(batch, n)) for n in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", images(test, 0))])
    name, md5 = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
