"""Where commands print their results."""

from __future__ import annotations

import sys

from rich.console import Console


def results_console() -> Console:
    """Standard output, as wide as the terminal; wide enough for a table where it is a file or a pipe (rich would take 80)."""
    return Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 160)
