"""A trace of a few steps for TensorBoard's profiler."""

from __future__ import annotations

from pathlib import Path

import jax


class StepTrace:
    """Traces `steps` steps, after two that compile and warm up; `tensorboard --logdir RUN` shows them with tensorboard-plugin-profile.

    Args:
        folder: where the trace goes.
        steps: how many; 0 traces nothing.
    """

    def __init__(self, folder: Path, steps: int):
        self._folder, self._steps = folder, steps
        self._seen, self._open = 0, False

    def after_step(self, result: object) -> None:
        """Called after each step with what it returned, which may still be under way."""
        self._seen += 1
        if self._steps and self._seen == 2:
            jax.block_until_ready(result)
            jax.profiler.start_trace(str(self._folder))
            self._open = True
        elif self._open and self._seen == 2 + self._steps:
            self.close(result)

    def close(self, result: object) -> None:
        """Ends the trace, if it is open: after the last step of a short run too."""
        if self._open:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self._open = False
