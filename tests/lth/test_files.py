"""Files are whole or not there, and damage shows."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lth import files


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "mask": torch.rand(5) < 0.5, "empty": torch.zeros(0, 2), "n": torch.tensor(7)}
    files.write_tensors(tmp_path / "t", tensors)
    back = files.read_tensors(tmp_path / "t")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == tensors[name].dtype for name in tensors)
    content: dict[str, Any] = {"x": 0.1 + 0.2, "list": [1, None, "ä"], "nan": float("inf")}
    files.write_json(tmp_path / "j", content)
    assert files.read_json(tmp_path / "j") == content
    state = {"tensor": torch.arange(4), "nested": [{"lr": 1e-3}, (1, 2)]}
    files.write_checkpoint(tmp_path / "c", state)
    assert torch.equal(files.read_checkpoint(tmp_path / "c").pop("tensor"), state["tensor"])


def test_tensors_that_share_memory_or_are_strided_are_written(tmp_path: Path) -> None:
    weight = torch.randn(4, 3)
    files.write_tensors(tmp_path / "t", {"one": weight, "tied": weight, "transposed": weight.t()})
    back = files.read_tensors(tmp_path / "t")
    assert torch.equal(back["tied"], weight) and torch.equal(back["transposed"], weight.t())


WRITERS: dict[str, tuple[Any, Any]] = {
    "tensors": (lambda path: files.write_tensors(path, {"a": torch.arange(40.0)}), files.read_tensors),
    "json": (lambda path: files.write_json(path, {"accuracy": 0.98, "name": "lenet"}), files.read_json),
    "checkpoint": (lambda path: files.write_checkpoint(path, {"a": torch.arange(9)}), files.read_checkpoint),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_truncation_is_noticed(tmp_path: Path, kind: str) -> None:
    write, read = WRITERS[kind]
    path = tmp_path / kind
    write(path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, max(1, len(whole) // 60)):  # the last byte of JSON is a line's end
        path.write_bytes(whole[:length])
        with pytest.raises(files.DamagedFile, match=str(path)):
            read(path)


@pytest.mark.parametrize("kind", WRITERS)
def test_altered_bytes_never_give_other_content(tmp_path: Path, kind: str) -> None:
    write, read = WRITERS[kind]
    path = tmp_path / kind
    write(path)
    whole, expected = path.read_bytes(), comparable(read(path))
    noticed = 0
    for place in range(0, len(whole), max(1, len(whole) // 120)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            assert comparable(read(path)) == expected  # spaces between JSON's words may change
        except files.DamagedFile:
            noticed += 1
    assert noticed > 50


def comparable(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in content.items()}


def test_lines_are_appended_and_an_unfinished_last_one_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    records = [{"iteration": n, "val_loss": 0.1 * n} for n in range(3)]
    for record in records:
        files.append_line(path, record)
    assert files.read_lines(path) == records
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    assert files.read_lines(path) == records[:2]
    files.write_lines(path, records)
    assert path.read_bytes() == whole


def test_an_altered_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    for number in range(3):
        files.append_line(path, {"iteration": number})
    path.write_bytes(path.read_bytes().replace(b'"iteration":1', b'"iteration":7'))
    with pytest.raises(files.DamagedFile, match=r"lines\.jsonl: line 2 was altered"):
        files.read_lines(path)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file_and_no_other(
    tmp_path: Path, kind: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read = WRITERS[kind]
    path = tmp_path / kind
    write(path)
    before = path.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left") as raised:
            write(path)
    assert str(raised.value.filename).startswith(str(tmp_path))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    read(path)


def test_a_line_that_does_not_fit_leaves_the_lines_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines.jsonl"
    files.append_line(path, {"iteration": 1})
    real = os.write

    def half(descriptor: int, data: bytes) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[: len(data) - 10])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space left"):
        files.append_line(path, {"iteration": 2})
    assert files.read_lines(path) == [{"iteration": 1}]
    assert path.read_bytes().endswith(b"\n")
