"""Kernels with a planted bug, to see that the tests would catch it."""

from __future__ import annotations

import inspect
import itertools
import linecache
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_number = itertools.count()


@contextmanager
def planted(module: ModuleType, kernel: str, right: str, wrong: str) -> Iterator[None]:
    """While inside, `module.kernel` is compiled from its source with `right`, which must occur, replaced by `wrong`."""
    original = getattr(module, kernel)
    source = inspect.getsource(original.fn)
    if right not in source:
        raise ValueError(f"{kernel} has no {right!r} any more: plant the bug in what it has now")
    source = source.replace(right, wrong)
    name = f"<{kernel} with a bug, {next(_number)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    namespace = dict(vars(module))
    exec(compile(source, name, "exec"), namespace)
    setattr(module, kernel, namespace[kernel])
    try:
        yield
    finally:
        setattr(module, kernel, original)
