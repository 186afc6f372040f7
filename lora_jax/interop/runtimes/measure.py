"""Run as a script by `interop/bench.py`: loads an export, calls it, and prints what that took as a line of JSON.

    python measure.py RUNTIME EXPORT BATCH LENGTH REPEATS

RUNTIME is a file that defines `load(path)` -> ([(name, dims, dtype)], function of a dict of arrays). What stands at the top of that
file (its imports) is timed apart from `load`.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any


def peak_bytes() -> int:
    """The most memory that this process had in use. (`ru_maxrss` would begin at what its parent had.)"""
    try:
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource  # macOS, in bytes there

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what it gave."""
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def arrays_of(inputs: list[tuple[str, list[Any], str]], batch: int, length: int) -> dict[str, Any]:
    """An array an input: tokens of small numbers, all real and of the first type, or pixels."""
    import numpy as np

    found = {}
    for name, dims, dtype in inputs:
        shape = [dim if isinstance(dim, int) else batch if dim == "batch" else length for dim in dims]
        if np.issubdtype(np.dtype(dtype), np.floating):
            found[name] = np.random.default_rng(0).standard_normal(shape).astype(dtype)
        elif name == "input_ids":
            found[name] = (np.arange(batch * length).reshape(shape) % 29).astype(dtype)
        else:
            found[name] = np.full(shape, int(name == "attention_mask"), dtype)
    return found


def main() -> None:
    """See the file."""
    script, path = sys.argv[1:3]
    batch, length, repeats = map(int, sys.argv[3:6])
    spec = importlib.util.spec_from_file_location("runtime", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    imports, _ = timed(lambda: spec.loader and spec.loader.exec_module(module))
    load, (inputs, run) = timed(lambda: module.load(path))
    arrays = arrays_of(inputs, batch, length)
    first, _ = timed(lambda: run(arrays))
    seconds = sorted(timed(lambda: run(arrays))[0] for _ in range(repeats))
    result = {
        "import_s": imports,
        "load_s": load,
        "first_s": first,
        "median_s": statistics.median(seconds),
        "fastest_s": seconds[0],
        "slowest_s": seconds[-1],
        "peak_bytes": peak_bytes(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its files are no modules of the runtimes
    main()
