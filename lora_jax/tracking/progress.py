"""Console progress on stderr: a bar with the time left at a terminal, and a plain line now and then everywhere else."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

PLAIN_SECONDS = 10.0


class Progress:
    """Shows how far something is. Several tracks may be open at once.

    Args:
        stream: Where to write; stderr by default, so that stdout stays clean for results.
        enabled: False shows nothing at all (processes other than the first; `--quiet`).
        interval: Seconds between plain lines where the stream is not a terminal.
        clock: Seconds from any origin; for tests.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        enabled: bool = True,
        interval: float = PLAIN_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # soft_wrap: without a terminal, rich would cut lines at 80 columns. No markup: names of members and paths hold brackets.
        self.console = Console(file=stream or sys.stderr, soft_wrap=True, highlight=False, markup=False, emoji=False, quiet=not enabled)
        self._interval, self._clock = interval, clock
        self._bars: Bars | None = None
        if enabled and self.console.is_terminal:
            times = (TimeElapsedColumn(), TextColumn("<"), TimeRemainingColumn())
            description, metrics = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[metrics]}"))
            columns = (description, BarColumn(), MofNCompleteColumn(), *times, metrics)
            self._bars = Bars(*columns, console=self.console, refresh_per_second=4)

    def print(self, text: str) -> None:
        """Prints a line of plain text above the bars."""
        self.console.print(text)

    @contextmanager
    def track(self, total: int, description: str, *, start: int = 0) -> Iterator[Track]:
        """Opens a track of `total` steps; `start` of them were done before (a resumed run).

        >>> with Progress(enabled=False).track(100, "training") as track:
        ...     track.update(10, loss=0.5)
        """
        if self._bars is None:
            yield Lines(self, total, description, start)
            return
        if not self._bars.tasks:
            self._bars.start()
        task = self._bars.add_task(description, total=total, completed=start, metrics="")
        try:
            yield Bar(self._bars, task)
        finally:
            self._bars.refresh()
            if all(other.id == task for other in self._bars.tasks):
                self._bars.stop()  # leaves the finished bar on the screen
            self._bars.remove_task(task)


class Track(ABC):
    """One thing in progress."""

    @abstractmethod
    def update(self, step: int, **metrics: float) -> None:
        """Says that `step` steps are done, and what the figures are by now (numbers on the host: a device array would block)."""


class Bar(Track):
    """A row of the live display."""

    def __init__(self, bars: Bars, task: TaskID) -> None:
        self._bars, self._task, self._metrics = bars, task, ""

    def update(self, step: int, **metrics: float) -> None:
        self._metrics = describe(metrics) or self._metrics
        self._bars.update(self._task, completed=step, metrics=self._metrics)


class Lines(Track):
    """At most one line every `interval` seconds, and one at the end."""

    def __init__(self, progress: Progress, total: int, description: str, start: int) -> None:
        self._progress, self._total, self._description, self._first = progress, total, description, start
        self._metrics: dict[str, float] = {}
        self._began = self._printed = progress._clock()

    def update(self, step: int, **metrics: float) -> None:
        self._metrics |= metrics
        now = self._progress._clock()
        if step < self._total and now - self._printed < self._progress._interval:
            return
        self._printed = now
        spent = now - self._began
        left = spent / max(1, step - self._first) * (self._total - step)
        when = f"{clock_time(left)} left" if step < self._total else f"in {clock_time(spent)}"
        share = 100 * step // max(1, self._total)
        figures = "".join(f", {text}" for text in [describe(self._metrics)] if text)
        self._progress.print(f"{self._description}: {step}/{self._total} ({share} %){figures}, {when}")


def describe(metrics: dict[str, float]) -> str:
    """The figures as short text.

    >>> describe({"loss": 0.12345, "tokens_per_second": 2130.4})
    'loss 0.1235, tokens per second 2,130'
    """
    return ", ".join(f"{k.replace('_', ' ')} {v:,.0f}" if abs(v) >= 1000 else f"{k.replace('_', ' ')} {v:.4g}" for k, v in metrics.items())


def clock_time(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> clock_time(3725)
    '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
