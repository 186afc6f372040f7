"""Compiled programs are kept on disk: a plan, its run and a resume compile once; damage costs a compilation and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import pytest

from experiments.fuzz import bits_of_run, differing
from lora_jax.packing.execution import CACHE_FOLDER, compile_cache

CHANGES = {
    "training.steps": 2,
    "training.eval_every": 0,
    "training.pack": "vmap",
    "tracking.tensorboard": False,
    "sweep": {"grid": {"adapter.rank": [2, 3]}},
}
# Prints how many of the pack's programs came from the cache, and how many did not.
CODE = """
import collections, json, logging, sys
import jax
jax.config.update("jax_disable_most_optimizations", True)
from lora_jax.cli import main
found = collections.Counter()
class Count(logging.Handler):
    def emit(self, record):
        text = record.getMessage()
        if "jit_train'" in text or "jit_evaluate'" in text:
            found["hit"] += "cache hit" in text
            found["miss"] += "CACHE MISS" in text
logger = logging.getLogger("jax._src.compiler")
logger.addHandler(Count()); logger.setLevel(logging.DEBUG); logger.propagate = False
sys.argv[0] = "lora-jax"
try:
    main.main()
finally:
    print(json.dumps(found))
"""


def run(*arguments):
    """`lora-jax ARGUMENTS` in a process of its own: (hits, misses, what it printed)."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}
    command = [sys.executable, "-c", CODE, *map(str, arguments)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    return found.get("hit", 0), found.get("miss", 0), ended.stderr


@pytest.mark.long
def test_a_plan_its_run_and_a_resume_compile_once(hub, tmp_path):
    config, folder = hub.write(tmp_path, CHANGES), tmp_path / "runs"
    hits, misses, _ = run("sweep", config, "--plan")
    assert (hits, misses) == (0, 2) and [p.name for p in folder.iterdir()] == [CACHE_FOLDER]
    hits, misses, said = run("sweep", config)
    assert (hits, misses) == (2, 0) and "compiling" in said
    # The same bits as compiled anew, without a cache, and with one whose entries are damaged.
    without = hub.write(tmp_path / "runs", CHANGES | {"tracking.compile_cache": False}, name="without")
    assert run("sweep", without)[0] == 0
    entries = [p for p in (folder / CACHE_FOLDER).rglob("*-cache") if p.is_file()]
    assert entries
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    hits, misses, _ = run("sweep", hub.write(tmp_path, CHANGES, name="damaged"))
    assert hits == 0
    paths = [folder / "tiny", tmp_path / "runs" / "runs" / "without", folder / "damaged"]
    bits = [bits_of_run(p) for p in paths]
    assert not differing(bits[0], bits[1]) and not differing(bits[0], bits[2])


def test_a_cache_that_jax_has_already_stays(hub, tmp_path, monkeypatch):
    config = hub.config(tmp_path)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    try:
        with compile_cache(config):
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
        jax.config.update("jax_compilation_cache_dir", None)
        with pytest.raises(ZeroDivisionError), compile_cache(config):
            assert str(tmp_path / "runs" / CACHE_FOLDER) in str(jax.config.jax_compilation_cache_dir)
            assert jax.config.jax_compilation_cache_max_size > 0
            raise ZeroDivisionError
        assert jax.config.jax_compilation_cache_dir is None and jax.config.jax_compilation_cache_max_size == -1
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
