"""Scripts that run an export, each in a process of its own where nothing else is imported (`interop/bench.py`)."""
