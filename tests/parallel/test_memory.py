"""What the host's C library holds of memory that was freed."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")

PROGRAM = """
import ctypes, sys
from pathlib import Path
from lora_jax.parallel.program import release_freed_memory

SIZE = 16 * 2**20
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

library.free(library.malloc(SIZE))  # glibc would keep the next of this size
release_freed_memory(at_once=sys.argv[1] == "at once")
before = resident()
block = library.malloc(SIZE)
library.memset(block, 1, SIZE)
above = library.malloc(64 * 2**10)  # what is freed below it stays in the heap
library.memset(above, 1, 64 * 2**10)
full = resident()
library.free(block)
print(full - before, resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
@pytest.mark.parametrize("at_once", [False, True])
def test_a_large_block_goes_back_to_the_system_when_it_is_freed(at_once: bool) -> None:
    command = [sys.executable, "-c", PROGRAM, "at once" if at_once else "later"]
    full, after = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert full > 15e6
    assert (after < 1e6) is at_once, "without it glibc keeps the block, or this test shows nothing"
