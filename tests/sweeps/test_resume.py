"""A run that was stopped, killed or lost its disk goes on, and ends with the bits it would have had."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pydoc
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.fuzz import bits_of_run, differing
from lora_jax.config.load import load_config
from lora_jax.errors import InputError, Stopped
from lora_jax.models.load import load_model
from lora_jax.sweeps.restore import evaluate_run, restore_member, run_members
from lora_jax.sweeps.run import run_sweep
from lora_jax.tracking import Progress, read_state
from lora_jax.weights.provenance import fingerprint
from tests import tiny
from tests.stopping import stop_at
from tests.tiny_hub import call

pytestmark = pytest.mark.usefixtures("compile_cache")

# Two packs (dropout's presence is no static key, biases are): ranks, targets, dropout and learning rates differ.
SWEEP = {
    "training.steps": 6,
    "training.eval_every": 3,
    "tracking.log_every": 4,
    "tracking.checkpoint_every": 2,
    "adapter.dropout": 0.2,
    "model.dropout": 0.1,
    "sweep": {"grid": {"adapter.bias": ["none", "all"], "adapter.rank": [2, 3]}},
}


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of every member as TensorBoard shows it, but those of time."""
    found = {}
    for member in (p.parent for p in run.glob("*/results.json")):
        events = EventAccumulator(str(member)).Reload()
        for tag in events.Tags()["scalars"]:
            if "second" not in tag:
                found[f"{member.name} {tag}"] = [(e.step, e.value) for e in events.Scalars(tag)]
    return found


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


@pytest.fixture(scope="module")
def whole(hub, tmp_path_factory, compile_cache, quick):
    """The run that nobody stops."""
    return run_sweep(hub.config(tmp_path_factory.mktemp("whole"), SWEEP)).path


@pytest.mark.long
def test_a_stopped_run_ends_with_the_same_bits(hub, whole, tmp_path, monkeypatch, capfd):
    """Stopped between log lines, between evaluations, at a checkpoint, in the second pack."""
    config = hub.config(tmp_path, SWEEP)
    for step in (1, 3, 4):
        stop_at(monkeypatch, step)
        with pytest.raises(Stopped) as stopped:
            run_sweep(config)
        assert (stopped.value.step, stopped.value.signal) == (step, signal.SIGTERM)
    stop_at(monkeypatch, 5)
    with pytest.raises(Stopped):
        run_sweep(config, progress=Progress())
    assert "continues after step 4" in capfd.readouterr().err
    outcome = run_sweep(config)
    assert not differing(bits_of_run(whole), bits_of_run(outcome.path))
    assert curves(outcome.path) == curves(whole) and curves(whole)
    assert run_sweep(config).compiled_programs == 0


@pytest.mark.parametrize("where", ["csv.reader", "transformers.PreTrainedTokenizerFast.from_pretrained", "jax.jit"])
def test_a_signal_while_it_loads_or_compiles_is_a_stop(hub, tmp_path, monkeypatch, where):
    """And no wrong input, whatever handles failures of files there; the same command then trains."""
    config = hub.write(tmp_path, {"training.steps": 2, "training.eval_every": 0})
    with monkeypatch.context() as patch:
        original = pydoc.locate(where)

        def signalled(*args, **options):
            signal.raise_signal(signal.SIGTERM)
            return original(*args, **options)

        patch.setattr(where, signalled)
        stopped = call("train", config)
    assert stopped.code == 75 and stopped.err.splitlines()[-1].startswith("stopped after step 0; everything is saved"), stopped
    if where == "csv.reader":
        assert call("train", config).code == 0


@pytest.mark.slow
def test_a_pack_recorded_in_part_is_recorded_whole(hub, whole, tmp_path):
    """As if killed between two members' results."""
    copy = tmp_path / "runs" / "tiny"
    shutil.copytree(whole, copy)
    config = hub.config(tmp_path, SWEEP)
    victim = next(copy.glob("*rank=2*"))
    before = (victim / "results.json").read_bytes()
    (victim / "results.json").unlink()
    shutil.rmtree(victim / "final")
    (copy / "results.csv").unlink()
    run_sweep(config)
    assert not differing(bits_of_run(whole), bits_of_run(copy))
    times = ("seconds", "tokens_per_second")
    left, right = (json.loads(b) for b in (before, (victim / "results.json").read_bytes()))
    assert {k: v for k, v in left.items() if k not in times} == {k: v for k, v in right.items() if k not in times}


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(hub, whole, tmp_path, monkeypatch, capfd):
    config = hub.config(tmp_path, SWEEP)
    stop_at(monkeypatch, 4)
    with pytest.raises(Stopped):
        run_sweep(config)
    (newest,) = (tmp_path / "runs" / "tiny" / "checkpoints").glob("*/4")
    for file in (newest / "arrays" / "ocdbt.process_0" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    capfd.readouterr()
    outcome = run_sweep(config, progress=Progress())
    told = capfd.readouterr().err
    assert "damaged; it is passed over" in told and "continues after step 2" in told
    assert not differing(bits_of_run(whole), bits_of_run(outcome.path)) and curves(outcome.path) == curves(whole)


@pytest.mark.slow
def test_more_steps_take_a_finished_run_further(hub, tmp_path):
    """As far as a run that was asked for all of them at once, where the schedule does not depend on the end."""
    constant = {"optimizer.schedule": "constant", "training.steps": 4}
    config = hub.write(tmp_path, constant)
    assert call("train", config).code == 0
    further = call("train", config, "--extend-steps", "2")
    assert further.code == 0, further.err
    assert "continues after step 4" in further.err
    assert call("train", config, "--extend-steps", "2").code == 0  # nothing is left to do
    refused = call("train", config)
    assert refused.code == 2 and "training.extend_steps" in refused.err
    (tmp_path / "once").mkdir()
    once = run_sweep(hub.config(tmp_path / "once", constant | {"training.steps": 6})).path
    assert not differing(bits_of_run(once), bits_of_run(tmp_path / "runs" / "tiny"))
    assert json.loads((tmp_path / "runs" / "tiny" / "main" / "results-4.json").read_text())["steps"] == 4


def change_weights(model):
    weights = load_file(model / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    weights[name] = weights[name].copy()
    weights[name][0, 0] += 1e-6
    save_file(weights, model / "model.safetensors")


def change_tokenizer(model):
    text = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(text.replace('"yes":', '"no_":').replace('"no":', '"yes":').replace('"no_":', '"no":'))


def flip_labels(data):
    text = data.read_text()
    data.write_text(text.replace(",pos,", ",?,").replace(",neg,", ",pos,").replace(",?,", ",neg,"))


@pytest.fixture(scope="module")
def two_ranks(hub, tmp_path_factory, quick, compile_cache):
    """A folder with a copy of a base, a copy of a data file, and a finished run of them."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(hub.bert, folder / "model")
    shutil.copy(hub.reviews, folder / "reviews.csv")
    run_sweep(inputs_config(hub, folder))
    return folder


def inputs_config(hub, folder, **more):
    changes = {"model.source": str(folder / "model"), "task.source": str(folder / "reviews.csv"), "training.steps": 2}
    return hub.config(folder, changes | {"sweep": {"grid": {"adapter.rank": [2]}}} | more)


@pytest.mark.parametrize(
    ("change", "what", "named"),
    [
        ("model", change_weights, "the base (model.source has other weights)"),
        ("model", change_tokenizer, "the tokenizer or its chat template"),
        ("reviews.csv", flip_labels, "task data: other training rows; task data: other held-out rows"),
    ],
)
def test_changed_inputs_are_refused_by_name(hub, two_ranks, tmp_path, change, what, named):
    """By a sweep that grows, by more steps, by an evaluation, and, where it matters, by an export."""
    folder = tmp_path / "copy"
    shutil.copytree(two_ranks, folder)
    run = folder / "runs" / "tiny"
    for file in (run / "state.json", run / "config.yaml"):
        file.write_text(file.read_text().replace(str(two_ranks), str(folder)))
    grown = inputs_config(hub, folder, **{"sweep": {"grid": {"adapter.rank": [2, 3]}}})
    before = bits_of_run(run)
    member = run_members(run)[0]
    restore_member(run, member)
    what(folder / change)
    told = f"member 'rank=2' was trained on something else than is there now. What changed: {named}"
    for call_of in (
        lambda: run_sweep(grown),
        lambda: run_sweep(inputs_config(hub, folder, **{"training.extend_steps": 2})),
        lambda: evaluate_run(run, member=None, split="train", progress=Progress(enabled=False)),
    ):
        with pytest.raises(InputError) as refused:
            call_of()
        assert told.partition(";")[0] in str(refused.value)
    if change == "model":
        with pytest.raises(InputError) as refused:
            restore_member(run, member)
        assert told in str(refused.value)
    assert not differing(before, bits_of_run(run)) and (run / "rank=2" / "results.json").exists()


@pytest.mark.slow
def test_a_run_without_an_identity_gets_todays_and_says_so(hub, two_ranks, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(two_ranks, folder)
    run = folder / "runs" / "tiny"
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(two_ranks), str(folder)))
    (run / "state.json").unlink()
    run_sweep(inputs_config(hub, folder, **{"sweep": {"grid": {"adapter.rank": [2, 3]}}}), progress=Progress())
    assert "1 of its members are from an older version" in capsys.readouterr().err
    assert read_state(run).identity.keys() == {"rank=2", "rank=3"}


def test_the_fingerprint_of_a_rounded_base_is_known_from_the_whole_one(hub):
    whole, rounded = load_model(str(hub.bert)), load_model(str(hub.bert), dtype="bfloat16")
    assert fingerprint(whole, like=rounded) == fingerprint(rounded) != fingerprint(whole)


@pytest.mark.long
def test_checkpoints_move_between_meshes(hub, whole, tmp_path, monkeypatch):
    """Stopped on one mesh, ended on another: the same losses. Without dropout, whose noise follows the batch's padded shape."""
    one = {"sweep": {"grid": {"adapter.rank": [2, 3]}}, "adapter.dropout": 0.0, "model.dropout": 0.0}
    alone = run_sweep(hub.config(tmp_path, SWEEP | one, name="alone")).results
    stop_at(monkeypatch, 3)
    with pytest.raises(Stopped):
        run_sweep(hub.config(tmp_path, SWEEP | one | {"mesh": {"data": 2, "fsdp": 2}}))
    moved = run_sweep(hub.config(tmp_path, SWEEP | one | {"mesh": {"fsdp": 4, "tensor": 2}})).results
    for a, b in zip(alone, moved, strict=True):
        assert a.final["loss"] == pytest.approx(b.final["loss"], rel=1e-5)


def start(config: Path, *, stdout=None) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "lora_jax.cli.main", "sweep", str(config)], stdout=stdout, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_sigterm_saves_and_says_so(hub, tmp_path):
    """The real command, the real signal."""
    config = hub.write(
        tmp_path, SWEEP | {"training.steps": 3000, "training.eval_every": 0, "tracking.checkpoint_every": 0, "training.pack": "vmap"}
    )
    process = start(config, stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"
    until(lambda: any((tmp_path / "runs" / "tiny").glob("*/*tfevents*")))
    time.sleep(1)
    process.terminate()
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 75, told
    assert "everything is saved" in told and "Traceback" not in told
    (step,) = (int(p.name) for p in checkpoints.glob("*/*") if p.name.isdecimal())
    assert f"stopped after step {step}" in told and step > 0


def until(true, seconds=120.0):
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.0005)


# When the process is killed: once a path that matches exists, and so many milliseconds later.
KILLS = [
    ("config.yaml", 0), ("*/*tfevents*", 0), ("*/*tfevents*", 400), ("checkpoints/*/.2.part", 0), ("checkpoints/*/.2.part", 20),
    ("checkpoints/*/2", 0), ("checkpoints/*/.best-3.part", 0), ("checkpoints/*/.best-3.part", 40), ("checkpoints/*/best-3", 0),
    ("checkpoints/*/.4.part", 10), ("checkpoints/*/4", 0), ("checkpoints/*/.6.part", 0), ("checkpoints/*/6", 0), ("*/.final.part", 0),
    ("*bias=none*/final", 0), ("*bias=none*/results.json", 0), ("*bias=all*/*tfevents*", 0), ("checkpoints/*/4", 30),
    ("*bias=all*/.best.part", 0), ("*bias=all*/results.json", 0),
]  # fmt: skip


def _child(config: str, cache: str) -> None:
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    with tiny.quick_compile():  # as in the run that is compared with: other passes, other bits
        run_sweep(load_config(config))


@pytest.mark.parametrize(
    "kills", [pytest.param(KILLS[1::5], marks=pytest.mark.slow), pytest.param(KILLS, marks=pytest.mark.long)], ids=["four", "twenty"]
)
def test_kills_change_no_bit(hub, whole, tmp_path, kills):
    """SIGKILL at a fixed list of moments of one sweep, resumed each time."""
    config = hub.write(tmp_path, SWEEP)
    run = tmp_path / "runs" / "tiny"
    # Forked from a server that has imported everything and started nothing: a child begins in no time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_jax.sweeps.run", "lora_jax.models.load", "tests.sweeps.test_resume", "grain", "datasets"])
    killed = 0
    for pattern, milliseconds in kills:
        seen = set(run.glob(pattern)) if run.exists() else set()
        process = context.Process(target=_child, args=(str(config), jax.config.jax_compilation_cache_dir))
        process.start()
        while process.is_alive():
            if set(run.glob(pattern)) - seen or (pattern == "config.yaml" and (run / pattern).exists()):
                time.sleep(milliseconds / 1000)
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.0005)
        process.join(120)
        killed += process.exitcode == -signal.SIGKILL
        if (run / "results.csv").exists():
            shutil.rmtree(run)  # it was too quick: from the start again, so that every moment is met
    assert killed >= 0.7 * len(kills), f"{killed} of {len(kills)} moments were met"
    process = context.Process(target=_child, args=(str(config), jax.config.jax_compilation_cache_dir))
    process.start()
    process.join(240)
    assert process.exitcode == 0
    assert not differing(bits_of_run(whole), bits_of_run(run))
    assert curves(run) == curves(whole)


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_leaves_what_was_saved(hub, tmp_path):
    """A disk of 1.5 MB: the run ends with a clear word, and goes on from its last checkpoint once there is room."""
    disk = tmp_path / "runs"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        config = hub.write(tmp_path, {"training.steps": 8, "tracking.checkpoint_every": 2, "adapter.rank": 16})
        filler = disk / "filler"
        assert call("train", config, "training.steps=1", "name=probe").code == 0
        size = sum(p.stat().st_size for p in (disk / "probe").rglob("*") if p.is_file())
        free = os.statvfs(disk)
        filler.write_bytes(b"x" * max(0, free.f_bavail * free.f_frsize - size // 2))
        full = call("train", config)
        assert full.code == 1 and "no space left" in full.err and "Traceback" not in full.err, full
        with warnings.catch_warnings():
            # Orbax leaves a coroutine that nobody awaits. Its warning goes here: within another test's import Python 3.11 fails of it.
            warnings.simplefilter("ignore")
            gc.collect()
        filler.unlink()
        again = call("train", config)
        assert again.code == 0, again.err
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


@pytest.mark.long
def test_a_diverged_member_stays_out_of_the_others_way_through_a_resume(hub, tmp_path, monkeypatch):
    grid = {"sweep": {"grid": {"optimizer.learning_rate": [0.01, 1e30]}}}
    config = hub.config(tmp_path, SWEEP | grid)
    stop_at(monkeypatch, 4)
    with pytest.raises(Stopped):
        run_sweep(config)
    good, bad = run_sweep(config).results
    assert (good.status, bad.status) == ("finished", "diverged")
    (tmp_path / "alone").mkdir()
    alone = run_sweep(hub.config(tmp_path / "alone", SWEEP | {"sweep": {"grid": {"optimizer.learning_rate": [0.01, 0.02]}}})).results[0]
    assert np.isfinite(good.final["loss"]) and good.final == alone.final
