"""What a CUDA graph does, on the CPU: operators recorded once and called again on the same memory, without the Python
that called them. Asking for a value while recording is an error, as it is in a capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lth.cuda_graph import WARM_UP, CapturedStep


class Recorder(TorchDispatchMode):
    """Records the operators called inside of it. `replay` calls them again and leaves results where they were."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, result in self.calls:
                aliases = [returned.alias_info for returned in function._schema.returns]
                if any(alias is not None and not alias.is_write for alias in aliases):
                    continue  # a view of memory that is written elsewhere
                again = function(*args, **kwargs)
                if not any(aliases):
                    for place, value in zip(tree_leaves(result), tree_leaves(again), strict=True):
                        if isinstance(place, Tensor):
                            place.copy_(value)


class RecordedStep(CapturedStep):
    """A captured step whose graph is a recording on the CPU."""

    def _check_device(self) -> None:
        assert self.device.type == "cpu"

    def _record(self) -> Callable[[], None]:
        for _ in range(WARM_UP):
            self._work()
        recorder = Recorder()
        with recorder:
            self._work()
        return recorder.replay
