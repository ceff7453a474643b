"""Kernels with a planted bug, to see that the tests would catch it."""

from __future__ import annotations

import inspect
import itertools
import linecache
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from triton.runtime.jit import JITFunction

_number = itertools.count()


@contextmanager
def planted(module: ModuleType, kernel: str, right: str, wrong: str) -> Iterator[None]:
    """While inside, `module.kernel` is compiled from its source with `right`, which must occur, replaced by `wrong`,
    and so are the module's kernels that call it or hand it on, directly or not."""
    source = inspect.getsource(getattr(module, kernel).fn)
    if right not in source:
        raise ValueError(f"{kernel} has no {right!r} any more: plant the bug in what it has now")
    functions = {name: item for name, item in vars(module).items() if isinstance(item, JITFunction)}
    others = {name: inspect.getsource(item.fn) for name, item in functions.items() if name != kernel}
    sources = {kernel: source.replace(right, wrong)}
    called = [kernel]
    for inner in called:  # grows while it is walked: callers of callers too, behind what they call
        callers = [name for name, text in others.items() if re.search(rf"\b{inner}\b", text) and name not in called]
        called += callers
        sources |= {name: others[name] for name in callers}
    try:
        for name, text in sources.items():
            setattr(module, name, _compiled(functions[name].fn.__globals__ | vars(module), name, text))
        yield
    finally:
        for name in sources:
            setattr(module, name, functions[name])


def _compiled(namespace: dict[str, Any], kernel: str, source: str) -> JITFunction:
    name = f"<{kernel} with a bug, {next(_number)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    exec(compile(source, name, "exec"), namespace)
    return namespace[kernel]
