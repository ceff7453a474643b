"""What a CUDA graph does, on the CPU: operators recorded once and called again on the same memory, without the Python
that called them. Asking for a value while recording is an error, as it is in a capture."""

from __future__ import annotations

from collections.abc import Callable

from lottery_kernels.replay import Recorder
from lth.cuda_graph import WARM_UP, CapturedStep


class RecordedStep(CapturedStep):
    """A captured step whose graph is a recording on the CPU."""

    def _record(self) -> Callable[[], None]:
        for _ in range(WARM_UP):
            self._work()
        recorder = Recorder(())
        with recorder:
            self._work()
        if recorder.refusal is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {recorder.refusal}")
        return recorder.program(None)
