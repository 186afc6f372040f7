"""The trunk cache: equal bits with and without, nothing stale, nothing damaged, and a run that goes on where there is no room."""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false
from __future__ import annotations

import json
import os
import resource
import shutil

import jax
import numpy as np
import pytest

from experiments.fuzz import bits_of_run, differing
from lora_jax.data.batching import Examples
from lora_jax.data.examples import spans
from lora_jax.packing.pack import Pack
from lora_jax.parallel.constraints import place_batch
from lora_jax.sweeps.run import run_sweep
from lora_jax.training import trunk_cache as trunk_cache
from lora_jax.training.setup import set_up
from lora_jax.training.trunk import TrunkFiles, TrunkStore, file_size
from lora_jax.training.trunk_cache import FOLDER, keep_trunk
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")

# Two packs of two members that have two of the three layers in common; 12 steps an epoch, dealt anew in each.
SWEEP = {
    "training.steps": 30,
    "training.eval_every": 10,
    "adapter.layers": "last:1",
    "sweep": {"grid": {"adapter.bias": ["none"], "adapter.rank": [1, 2, 3, 4]}, "max_pack": 2},
}
IN_FILE = {"training.cache_trunk": "on", "training.trunk_memory_gb": 0.0}
WIDTH = 32


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


class Told:
    """What a run printed."""

    enabled = False

    def __init__(self):
        from lora_jax.tracking import Progress

        self._silent = Progress(enabled=False)
        self.lines: list[str] = []

    def print(self, text):
        self.lines.append(text)

    def __getattr__(self, name):
        return getattr(self._silent, name)

    def about_cache(self):
        return [line for line in self.lines if "trunk cache" in line]


def run(hub, folder, changes):
    folder.mkdir(exist_ok=True)
    told = Told()
    outcome = run_sweep(hub.config(folder, SWEEP | changes), progress=told)
    return outcome, told.about_cache()


@pytest.fixture(scope="module")
def without(hub, tmp_path_factory, compile_cache, quick):
    return run(hub, tmp_path_factory.mktemp("without"), {})[0].path


def losses(path):
    return {p.parent.name: json.loads(p.read_text())["final"] for p in path.glob("*/results.json")}


PADDED = {"training.accumulate": 2, "training.batching": "padded"}


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, pytest.param(PADDED, marks=pytest.mark.long)], ids=["packed", "padded"])
def test_equal_bits_in_memory_and_in_a_file(hub, without, tmp_path, more):
    """Over several epochs, evaluations and packs; every batch comes from the cache."""
    plain = without if not more else run(hub, tmp_path / "plain", more)[0].path
    for name, where in (("memory", {"training.cache_trunk": "on"}), ("file", IN_FILE)):
        outcome, told = run(hub, tmp_path / name, where | more)
        assert not differing(bits_of_run(plain), bits_of_run(outcome.path)) and losses(plain) == losses(outcome.path)
        assert len(told) == 3 and "MB in" in told[0], told
        done = 30 + 3 * len(set_up(hub.config(tmp_path, SWEEP | more)).plan.eval_batches())
        assert all(f"{done} of {done} batches" in line for line in told[1:]), told


@pytest.mark.long
def test_language_models_too(hub, tmp_path):
    """Several prompts and answers a row, from a decoder."""
    paths = []
    for name, where in (("plain", {}), ("cached", IN_FILE)):
        (tmp_path / name).mkdir()
        changes = {"training.steps": 12, "adapter.layers": "last:1", **where}
        paths.append(run_sweep(hub.config(tmp_path / name, changes, causal=True)).path)
    assert not differing(bits_of_run(paths[0]), bits_of_run(paths[1])) and losses(paths[0]) == losses(paths[1])
    assert list((tmp_path / "cached" / "runs" / FOLDER).iterdir())


def kept(config, folder):
    """Setup, trunk and what was said, after `keep_trunk`."""
    setup = set_up(config)
    pack = Pack.build(setup.model, [config], setup.steps, setup.mesh)
    trunk = setup.trunk(pack.part, config.training.data_seed)
    told: list[str] = []
    keep_trunk(trunk, setup, config.training, folder, told.append)
    return setup, trunk, told


def one(hub, folder, changes=None, **options):
    return hub.config(folder, {"training.steps": 15, "adapter.layers": "last:1"} | IN_FILE | (changes or {}), **options)


def test_the_file_is_as_large_as_forecast_and_found_again(hub, tmp_path, monkeypatch):
    config = one(hub, tmp_path)
    setup, trunk, told = kept(config, tmp_path / "kept")
    (file,) = (tmp_path / "kept").iterdir()
    texts = [{e.tobytes(): len(e) for e in examples.tokens} for examples in (setup.plan.seen(), setup.data.held_out)]
    tokens = sum(sum(t.values()) for t in texts)
    assert file.stat().st_size == file_size((tokens, WIDTH), 4) == 128 + tokens * WIDTH * 4
    assert f"{tokens * WIDTH * 4 / 1e6:,.1f} MB" in told[0]
    # Found again by another rank, learning rate and name; what it holds is what is computed.
    monkeypatch.setattr(trunk_cache, "_fill", lambda *_: pytest.fail("it was filled again"))
    _, again, told = kept(one(hub, tmp_path, {"adapter.rank": 7, "optimizer.learning_rate": 0.5}, name="other"), tmp_path / "kept")
    assert "found in" in told[0] and again.compiled == 0
    batch = setup.plan.batch(14)
    computed = np.asarray(trunk.of_step(14, place_batch(setup.mesh, batch, row_axis=1)))
    real = batch["segment_ids"] > 0
    np.testing.assert_array_equal(np.asarray(again.of_step(14, {}, batch))[real], computed[real])


def test_a_stale_file_is_never_used(hub, tmp_path, monkeypatch):
    """Other weights, tokenizer, data, depth, shape, dtype: each a file of its own, beside the old one."""
    from safetensors.numpy import load_file, save_file

    monkeypatch.setattr(trunk_cache, "_fill", lambda trunk, setup, stores, rows: True)  # which file is meant follows without it
    folder = tmp_path / "kept"
    model = tmp_path / "model"
    shutil.copytree(hub.bert, model)
    start = {"model.source": str(model)}
    kept(one(hub, tmp_path, start), folder)

    def files_after(changes):
        _, trunk, told = kept(one(hub, tmp_path, start | changes), folder)
        assert trunk.stores is not None and "found in" not in told[0], told
        return len(list(folder.iterdir()))

    reviews = hub.reviews.read_text().splitlines()
    other = tmp_path / "other.csv"
    other.write_text("\n".join([reviews[0], "a good film " + reviews[1], *reviews[2:]]))
    changes = {
        "data": {"task.source": str(other)},
        "depth": {"adapter.layers": "last:2"},
        "shape": {"training.batch_size": 12},
        "dtype": {"model.dtype": "bfloat16"},
        "length": {"task.max_length": 8},
    }
    counts = {name: files_after(change) for name, change in changes.items()}
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["film"], words["plot"] = words["plot"], words["film"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    counts["tokenizer"] = files_after({})
    weights = load_file(model / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    weights[name] = weights[name].copy()
    weights[name][0, 0] += 1e-6
    save_file(weights, model / "model.safetensors")
    counts["base"] = files_after({})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    counts["base's config"] = files_after({})
    assert list(counts.values()) == list(range(2, 2 + len(counts))), counts


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "bit"])
def test_a_damaged_file_is_found_out(hub, tmp_path, damage):
    config = one(hub, tmp_path)
    kept(config, tmp_path)
    (file,) = tmp_path.glob("*.npy")
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[:-4])
    else:
        file.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    _, trunk, told = kept(config, tmp_path)
    assert "found in" not in told[0] and trunk.stores is not None
    (file,) = tmp_path.glob("*.npy")
    assert file.read_bytes() == whole


@pytest.mark.slow
def test_a_full_disk_costs_the_cache_alone(hub, without, tmp_path):
    """A file may be 20 kB large, which all but the cache's are."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        outcome, told = run(hub, tmp_path / "full", IN_FILE | {"tracking.tensorboard": False, "tracking.checkpoint_every": 0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(told) == 1 and told[0].startswith("warning: trunk cache: off") and "the trunk is computed for each batch" in told[0]
    assert losses(outcome.path) == losses(without)
    assert not list((outcome.path.parent / FOLDER).iterdir())


def test_where_there_is_no_cache_a_run_says_so(hub, tmp_path):
    def said(changes):
        _, trunk, (line,) = kept(one(hub, tmp_path, changes), tmp_path / "kept")
        assert trunk.stores is None and not (tmp_path / "kept").exists()
        return line

    assert "model.dropout" in said({"model.dropout": 0.1})
    assert "training.trunk_disk_gb" in said({"training.trunk_disk_gb": 1e-5})
    few = {"training.cache_trunk": "on", "adapter.layers": None, "training.steps": 2, "sweep": {"grid": {"adapter.rank": [2]}}}
    outcome, (line,) = run(hub, tmp_path / "run", few)
    assert "the pack has no trunk" in line and not (outcome.path.parent / FOLDER).exists()


def test_numbers_that_depend_on_the_place_are_not_kept(hub, tmp_path, monkeypatch):
    """As on a device whose sums run another way for another row."""
    config = one(hub, tmp_path)
    setup = set_up(config)
    trunk = setup.trunk(Pack.build(setup.model, [config], setup.steps, setup.mesh).part, 0)
    whole = trunk.of_step
    place = np.linspace(1, 1 + 1e-5, setup.plan.rows * setup.plan.length, dtype=np.float32).reshape(setup.plan.rows, -1, 1)
    monkeypatch.setattr(trunk, "of_step", lambda *args: whole(*args) * place)
    told: list[str] = []
    for limits in ({}, {"trunk_memory_gb": 1.0}):
        trunk.asked_to_keep = False
        keep_trunk(trunk, setup, config.training.model_copy(update=limits), tmp_path / "kept", told.append)
        assert trunk.stores is None and "its place in the batch" in told[-1]
    assert not list((tmp_path / "kept").iterdir())


def test_the_folder_stays_within_its_limit(tmp_path):
    """Those used longest ago go; what is mapped stays readable."""
    files = TrunkFiles(tmp_path)
    size = file_size((10, 4), 4)
    arrays = {}
    for number, key in enumerate("abc"):
        with files.write(key, (10, 4), 4, limit=3 * size) as rows:
            rows[:] = number
        arrays[key] = files.open(key, (10, 4), 4)
        (path,) = tmp_path.glob(f"{key}-*")
        os.utime(path, (number, number))
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) == 3 * size
    files.open("a", (10, 4), 4)  # used just now
    with files.write("d", (10, 4), 4, limit=3 * size) as rows:
        rows[:] = 9
    assert sorted(p.name[0] for p in tmp_path.iterdir()) == ["a", "c", "d"]
    assert (arrays["b"] == 1).all()
    assert files.open("a", (11, 4), 4) is None


def test_two_processes_write_one_file(tmp_path, monkeypatch):
    """Each under a name of its own; a reader sees nothing or a whole one. What a killed process left goes."""
    left = tmp_path / f".a.{os.uname().nodename}.999999999.part"
    left.write_bytes(b"half")
    one, two = TrunkFiles(tmp_path), TrunkFiles(tmp_path)
    with one.write("a", (10, 4), 4, limit=10**6) as first:
        assert not left.exists()
        first[:5] = 1
        assert two.open("a", (10, 4), 4) is None
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", os.getppid)
            with two.write("a", (10, 4), 4, limit=10**6) as second:
                second[:] = 1
        assert (two.open("a", (10, 4), 4) == 1).all()
        first[5:] = 1
    (file,) = tmp_path.iterdir()
    assert (one.open("a", (10, 4), 4) == 1).all() and file.stat().st_size == file_size((10, 4), 4)
    with pytest.raises(ZeroDivisionError), one.write("b", (10, 4), 4, limit=10**6):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == [file]


def test_a_store_by_tokens():
    """Segments of one number in two rows are two examples; equal examples are kept once; an unknown one is a miss."""
    tokens = np.array([[[5, 6, 7, 0], [5, 6, 8, 9]]], np.int32)
    segments = np.array([[[1, 1, 2, 0], [2, 2, 3, 3]]], np.int32)
    batch = {"tokens": tokens, "segment_ids": segments}
    assert [(a, b) for a, b, _ in spans(batch)] == [(0, 2), (2, 3), (4, 6), (6, 8)]
    texts = [np.array(e) for e in ([5, 6], [7], [5, 6], [8, 9])]
    store = TrunkStore(Examples(texts, texts), 2, np.dtype(jax.numpy.bfloat16))
    assert (store.tokens, store.nbytes) == (5, 20)
    store.use(np.zeros((5, 2), np.uint16))
    store.put(batch, np.arange(16, dtype=np.float32).reshape(1, 2, 4, 2))
    moved = {"tokens": np.array([[8, 9, 5, 6]], np.int32), "segment_ids": np.array([[1, 1, 2, 2]], np.int32)}
    found = store.get(moved)
    assert found is not None and found.astype(int).tolist() == [[[12, 13], [14, 15], [8, 9], [10, 11]]]
    assert store.get(moved | {"tokens": moved["tokens"] + 1}) is None
    assert (store.hits, store.misses) == (1, 1)
    # Of a pair, the same tokens cut elsewhere are another example.
    pairs = TrunkStore(Examples(texts[:1], texts[:1], [np.array([0, 1])]), 2, np.dtype(np.float32))
    pairs.use(np.zeros((2, 2), np.uint32))
    one = {"tokens": np.array([[5, 6]], np.int32), "segment_ids": np.ones((1, 2), np.int32)}
    assert pairs.get(one | {"token_types": np.array([[0, 1]], np.int32)}) is not None
    assert pairs.get(one | {"token_types": np.array([[1, 1]], np.int32)}) is None
