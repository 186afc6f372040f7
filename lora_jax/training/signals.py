"""Being told to stop: SIGTERM (a preempted job) or Ctrl-C ends a run at the next step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from ..errors import Stopped
from ..parallel.processes import process_count

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """While it is entered, the two signals are noted in place of ending the process; a second one ends it at once.

    Outside the main thread, where Python allows no handlers, nothing is changed. Of several processes each leaves SIGTERM to JAX,
    which tells the others; Ctrl-C is made one.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.training = False  # before the first step there is nothing to save, and no reason to wait
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            noted = _SIGNALS if process_count() == 1 else (signal.SIGINT,)
            self._before = {number: signal.signal(number, self._on_signal) for number in noted}
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, Stopped) and self.received is not None:
            error.signal = self.received

    def asked(self, step: int) -> bool:
        """Whether to stop after `step` steps: of several processes, all say so after the same step."""
        if process_count() == 1:
            return self.received is not None
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.received is not None, number
        if again:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if process_count() > 1:
            signal.raise_signal(signal.SIGTERM)
        elif not self.training:
            raise Stopped(0)
