"""Files that are either wholly there or not there, and that show it when their bytes were changed.

Whole files are written beside their place, flushed to the disk and renamed. Each carries a checksum of what it holds:
JSON documents under the key ``sha256``, safetensors files in their metadata, lines of a JSON-lines file under
``crc32``, training checkpoints in a header line. Reading verifies it and raises :class:`DamagedFile`, which names the
file.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

_CHECKPOINT_HEADER = b"lth checkpoint 1 sha256 "


class DamagedFile(RuntimeError):
    """A file of a run is truncated, altered, or of an unknown format; the message names it."""


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` so that a crash at any moment leaves the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        try:
            _write_all(descriptor, data, temporary)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if error.filename is None:
            error.filename = str(path)
        raise
    _sync_folder(path.parent)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one JSON line with its CRC. A crash may leave part of it, which :func:`read_lines` drops."""
    line = _canonical({**record, "crc32": zlib.crc32(_canonical(record))}) + b"\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        length = os.fstat(descriptor).st_size
        try:
            _write_all(descriptor, line, path)
        except OSError:
            os.ftruncate(descriptor, length)  # a full disk leaves the lines before whole
            raise
    finally:
        os.close(descriptor)


def sync_lines(path: Path) -> None:
    """Makes appended lines durable, before something is written that relies on them."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, [] if there is none. An unfinished last line is dropped; a bad line raises."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    records = []
    *lines, _unfinished = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        record = _parse(path, line, f"line {number} ")
        crc = record.pop("crc32", None)
        if crc != zlib.crc32(_canonical(record)):
            raise DamagedFile(f"{path}: line {number} was altered (its checksum does not match)")
        records.append(record)
    return records


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Replaces a JSON-lines file by these records."""
    lines = [_canonical({**record, "crc32": zlib.crc32(_canonical(record))}) + b"\n" for record in records]
    write_atomically(path, b"".join(lines))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    digest = hashlib.sha256(_canonical(content)).hexdigest()
    write_atomically(path, json.dumps({**content, "sha256": digest}, indent=1, allow_nan=True).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    content = _parse(path, path.read_bytes())
    digest = content.pop("sha256", None)
    if digest != hashlib.sha256(_canonical(content)).hexdigest():
        raise DamagedFile(f"{path}: was altered (its checksum does not match)")
    return content


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes named tensors as safetensors, with a checksum over names, types, shapes and bytes."""
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, tensors_to_bytes(stored, metadata={"sha256": digest_of(stored)}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors that :func:`write_tensors` wrote, on the CPU."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFile(f"{path}: truncated or altered ({error})") from error
    if metadata.get("sha256") != digest_of(tensors):
        raise DamagedFile(f"{path}: was altered (its checksum does not match)")
    return tensors


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes tensors and plain values as `torch.save` does, behind a line with their checksum."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    data = buffer.getvalue()
    header = _CHECKPOINT_HEADER + hashlib.sha256(data).hexdigest().encode() + b"\n"
    write_atomically(path, header + data)


def read_checkpoint(path: Path) -> dict[str, Any]:
    header, _, data = path.read_bytes().partition(b"\n")
    if header != _CHECKPOINT_HEADER + hashlib.sha256(data).hexdigest().encode():
        raise DamagedFile(f"{path}: truncated or altered (its checksum does not match)")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def remove(path: Path) -> None:
    """Removes a file, if it is there, for good."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        _sync_folder(path.parent)


def _write_all(descriptor: int, data: bytes, path: Path) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError as error:
        error.filename = str(path)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _parse(path: Path, data: bytes, where: str = "") -> dict[str, Any]:
    try:
        content = json.loads(data)
    except ValueError as error:
        raise DamagedFile(f"{path}: {where}is truncated or altered ({error})") from error
    if not isinstance(content, dict):
        raise DamagedFile(f"{path}: {where}is not an object")
    return content
