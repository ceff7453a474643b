"""Data sets: read from what is there, never one for another, split once."""

from __future__ import annotations

import gzip
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from lth import data
from tests.lth import cifar

OPENINGS = {
    "mnist": {"train": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], "t10k": [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]},
    "fashion-mnist": {"train": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5], "t10k": [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]},
}


def write_idx(folder: Path, name: str = "fashion-mnist", zipped: bool = False) -> None:
    """A small set in MNIST's file format that opens as the real one does: 5,100 training and 50 test examples."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for split, count in (("train", 5100), ("t10k", 50)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        labels[:10] = OPENINGS[name][split]
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
            path = folder / f"{split}-{kind}-ubyte"
            if zipped:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(content, 1))
            else:
                path.write_bytes(content)


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache, no system package, no network."""
    from torchvision import datasets

    def refuse(*arguments: object, **named: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("mnist", "fashion-mnist", "cifar10"):
        changed = data._SETS[name].__class__(**{**vars(data._SETS[name]), "places": ()})
        monkeypatch.setitem(data._SETS, name, changed)
    for name in ("MNIST", "FashionMNIST", "CIFAR10"):
        monkeypatch.setattr(getattr(datasets, name), "download", refuse)


def test_mnist5k_is_split_evenly_over_the_digits_and_without_overlap() -> None:
    found = data.load("mnist5k")
    parts = found.train, found.validation, found.test
    assert [len(part) for part in parts] == [4000, 500, 500]
    for part in parts:
        assert torch.bincount(part.y).tolist() == [len(part) // 10] * 10
    images = torch.cat([part.x for part in parts]).flatten(1)
    assert len(images.unique(dim=0)) == 5000
    assert found.train.x.mean().abs() < 0.05 and (found.train.x.std() - 1).abs() < 0.05


def test_mnist5k_is_the_same_every_time() -> None:
    assert torch.equal(data.load("mnist5k").test.x, data.load("mnist5k").test.x)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("inner", [".", "raw", "FashionMNIST/raw"])
def test_idx_files_are_read_bare_or_as_torchvision_lays_them_out(tmp_path: Path, inner: str, zipped: bool) -> None:
    write_idx(tmp_path / inner, zipped=zipped)
    found = data.load("fashion-mnist", tmp_path)
    assert [len(found.train), len(found.validation), len(found.test)] == [100, 5000, 50]
    assert found.train.x.shape[1:] == (1, 28, 28)
    assert found.test.y[:10].tolist() == OPENINGS["fashion-mnist"]["t10k"]


def test_one_set_is_never_taken_for_another(tmp_path: Path) -> None:
    write_idx(tmp_path, "fashion-mnist")
    with pytest.raises(data.DataError, match="hold fashion-mnist, not mnist"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_truncated_file_is_named(tmp_path: Path, zipped: bool) -> None:
    write_idx(tmp_path, zipped=zipped)
    path = next(tmp_path.glob("train-images*"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(data.DataError, match="train-images-idx3-ubyte"):
        data.load("fashion-mnist", tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(data.DataError, match=r"lacks the file.* t10k-labels-idx1-ubyte"):
        data.load("fashion-mnist", tmp_path)


def test_other_files_under_idx_names_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"<html>not found</html>")
    with pytest.raises(data.DataError, match="not an IDX file"):
        data.load("fashion-mnist", tmp_path)


def test_images_and_labels_of_different_lengths_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path)
    labels = np.zeros(70, np.uint8)
    header = bytes((0, 0, 8, 1)) + np.array([70], ">i4").tobytes()
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    with pytest.raises(data.DataError, match="70 labels"):
        data.load("fashion-mnist", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_without_network_and_files_the_error_lists_what_would_work(name: str, nowhere: None) -> None:
    with pytest.raises(data.DataError, match=r"(?s)not on this machine.*--data-dir.*--data mnist5k"):
        data.load(name)


def test_a_folder_without_the_set_is_an_error_even_where_the_set_could_be_had(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="does not hold fashion-mnist; it takes"):
        data.load("fashion-mnist", tmp_path)


def test_the_cache_is_read_before_the_network(tmp_path: Path, nowhere: None) -> None:
    write_idx(data.cache_folder() / "MNIST" / "raw", "mnist")
    assert len(data.load("mnist").test) == 50
    assert data.available("mnist") == str(data.cache_folder())
    assert data.available("cifar10") is None


def test_a_change_in_the_data_changes_its_digest(tmp_path: Path) -> None:
    write_idx(tmp_path)
    before = data.load("fashion-mnist", tmp_path).digest
    path = tmp_path / "train-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert data.load("fashion-mnist", tmp_path).digest != before


def test_unknown_sets_are_refused_with_the_known_ones() -> None:
    with pytest.raises(data.DataError, match="'imagenet'; there are mnist5k, mnist, fashion-mnist, cifar10"):
        data.load("imagenet")


def test_cifar10_is_read_from_its_binary_version(tmp_path: Path) -> None:
    cifar.write_binary(tmp_path, 1100, 20)
    found, test = data.load("cifar10", tmp_path), cifar.records(20, 0)
    assert [len(found.train), len(found.validation), len(found.test)] == [500, 5000, 20]
    assert found.test.y.tolist() == test[:, 0].tolist()
    pixels = torch.from_numpy(test[:, 1:].reshape(-1, 3, 32, 32)).float() / 255
    restored = found.test.x * torch.tensor([0.2470, 0.2435, 0.2616]).view(1, 3, 1, 1)
    torch.testing.assert_close(restored + torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1), pixels)


def test_cifar10_is_read_as_torchvision_lays_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar.write_python(tmp_path, 1100, 20, monkeypatch)
    for folder in (tmp_path, tmp_path / "cifar-10-batches-py"):
        found = data.load("cifar10", folder)
        assert [len(found.train), len(found.validation), len(found.test)] == [500, 5000, 20]
        assert found.test.y.tolist() == cifar.records(20, 0)[:, 0].tolist()
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"")
    with pytest.raises(data.DataError, match="cifar-10-batches-py: incomplete or altered"):
        data.load("cifar10", tmp_path)


def test_images_are_framed_in_black_and_a_single_channel_is_repeated(tmp_path: Path) -> None:
    write_idx(tmp_path)
    own = data.load("fashion-mnist", tmp_path)
    found = data.fitted(own, (3, 33, 32))
    black = -0.2860 / 0.3530
    for part, before in ((found.train, own.train), (found.validation, own.validation), (found.test, own.test)):
        assert part.x.shape == (len(before), 3, 33, 32) and torch.equal(part.y, before.y)
        for channel in range(3):
            assert torch.equal(part.x[:, channel, 2:30, 2:30], before.x[:, 0])
        rim = torch.ones(33, 32, dtype=torch.bool)
        rim[2:30, 2:30] = False
        torch.testing.assert_close(part.x[:, :, rim], torch.full_like(part.x[:, :, rim], black))
    assert found.digest == own.digest


@pytest.mark.parametrize("shape", [(1, 27, 28), (1, 28, 27)])
def test_images_cannot_be_made_smaller(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    with pytest.raises(data.DataError, match=r"image: 1x2.*mnist5k has images of 1x28x28"):
        data.fitted(data.load("mnist5k"), shape)


def test_several_channels_stay_as_many(tmp_path: Path) -> None:
    cifar.write_binary(tmp_path, 1100, 20)
    own = data.load("cifar10", tmp_path)
    assert torch.equal(data.fitted(own, (3, 32, 32)).test.x, own.test.x)
    with pytest.raises(data.DataError, match="image: 4x32x32, but cifar10 has images of 3x32x32"):
        data.fitted(own, (4, 32, 32))
