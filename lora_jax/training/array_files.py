"""Orbax's checkpointer, as one process or several use it."""

from __future__ import annotations

import orbax.checkpoint as ocp

from ..parallel.processes import process_count


def checkpointer(*, alone: bool = False) -> ocp.StandardCheckpointer:
    """A checkpointer; to be closed.

    Of several processes each writes what lies on its own devices, and they meet at the coordinator. (Left to itself Orbax has them
    meet on the devices, where a training step may be under way: the two then wait for each other.)

    Args:
        alone: for process 0 by itself, and arrays it holds whole.
    """
    count = process_count()
    if count == 1:
        return ocp.StandardCheckpointer()
    active = {0} if alone else set(range(count))
    options = ocp.options.MultiprocessingOptions(active_processes=active, barrier_sync_key_prefix="alone" if alone else "all")
    return ocp.StandardCheckpointer(multiprocessing_options=options)
