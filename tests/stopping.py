"""A run that is asked to stop, as by a scheduler's SIGTERM."""

from __future__ import annotations

import signal

from lora_jax.parallel.processes import StopSignals


def stop_at(monkeypatch, step):
    """Makes the next run stop after a step of whichever pack it is in."""
    left = [step]

    def asked(self, done):
        if left and left[0] == done:
            left.clear()
            self.received = signal.SIGTERM
            return True
        return False

    monkeypatch.setattr(StopSignals, "asked", asked)
