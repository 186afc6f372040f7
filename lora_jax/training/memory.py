"""Memory: how much a pack may take, and what of the host's is free but not given back."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import jax

from ..config.schema import Config

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_MAPPED_FROM = 1024 * 1024  # bytes


def release_freed_memory(*, at_once: bool = False) -> None:
    """Gives memory that was freed back to the system, where the C library would keep it.

    Compiling one step leaves a quarter of a gigabyte of freed blocks with glibc, and loading data a tenth: on a CPU that is room for
    activations. Does nothing where the C library is not glibc.

    Args:
        at_once: where the host is the device, blocks of a megabyte and more go back from now on whenever they are freed. Steps would
            else leave those into which matrices are packed for their products: glibc gives back what is larger than some size, but
            raises that, up to 32 MB, whenever such a block is freed, until it is told one. That saves some 20 MB, and costs a tenth of
            a small model's time, for the system clears every block before it gives it out anew.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            if at_once and jax.default_backend() == "cpu":
                library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM)
            library.malloc_trim(0)


def program_bytes(compiled: Any) -> int | None:
    """What a compiled program takes on a device while it runs: arguments, results and temporaries; None where XLA does not say."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    return found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes


def memory_limit(config: Config) -> int | None:
    """Bytes that a pack may take on one device: `sweep.memory_limit`, or what the accelerator has for JAX; None where nobody says."""
    if config.sweep is not None and config.sweep.memory_limit is not None:
        return config.sweep.memory_limit
    known = [(d.memory_stats() or {}).get("bytes_limit") for d in jax.local_devices() if d.platform != "cpu"]
    return min((size for size in known if size), default=None)
