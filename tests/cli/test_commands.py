"""A sweep from the command line, from its first call to its evaluation: what is written, resumed, refused and reproduced."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_jax.config.load import load_config
from tests.tiny_hub import call

GRID = {"adapter.rank": [2, 4], "adapter.targets": [["q_proj"], ["v_proj", "down_proj"]]}
NAMES = ["rank=2,targets=q_proj", "rank=2,targets=v_proj+down_proj", "rank=4,targets=q_proj", "rank=4,targets=v_proj+down_proj"]


@pytest.fixture(scope="module")
def swept(hub, tmp_path_factory, compile_cache):
    """(config file, run directory, the call's result) of a sweep over 2 ranks and 2 targets."""
    folder = tmp_path_factory.mktemp("swept")
    path = hub.write(folder, {"sweep": {"grid": GRID}})
    return path, folder / "runs" / "tiny", call("sweep", path)


@pytest.fixture
def copied(swept, tmp_path):
    """The same in a place of its own, to be changed."""
    path, run, _ = swept
    shutil.copytree(run, tmp_path / "runs" / "tiny")
    return path, tmp_path / "runs" / "tiny", f"tracking.dir={tmp_path / 'runs'}"


def results(run):
    return {name: json.loads((run / name / "results.json").read_text()) for name in NAMES if (run / name / "results.json").exists()}


def test_a_sweep_is_one_training_and_one_evaluation_program(swept):
    _, run, result = swept
    assert result.code == 0, result.err
    assert "compiled programs: 2" in result.out
    assert json.loads((run / "summary.json").read_text())["compiled_programs"] == 2
    assert "pack 1/1: 4 members" in result.err and "Traceback" not in result.err and "Warning" not in result.err


def test_a_row_a_member(swept):
    _, run, _ = swept
    rows = list(csv.DictReader((run / "results.csv").open()))
    assert [r["name"] for r in rows] == NAMES
    assert [r["adapter.rank"] for r in rows] == ["2", "2", "4", "4"]
    assert [json.loads(r["adapter.targets"]) for r in rows[:2]] == [["q_proj"], ["v_proj", "down_proj"]]
    # 3 layers of rank * (in + out), and the classifier's 32 * 2 + 2.
    assert [int(r["parameters"]) - 66 for r in rows] == [3 * 2 * 64, 3 * 2 * (64 + 96), 3 * 4 * 64, 3 * 4 * (64 + 96)]
    for row in rows:
        assert row["status"] == "finished" and row["steps"] == "6" and row["best_step"] in ("3", "6")
        assert float(row["final_loss"]) > 0 and 0 <= float(row["best_accuracy"]) <= 1 and "seconds" not in row
        assert float(row["best_accuracy"]) >= float(row["final_accuracy"]) and 0 <= float(row["padding_share"]) < 0.2


def test_what_each_member_leaves(swept):
    path, run, _ = swept
    for name in NAMES:
        assert {p.name for p in (run / name).iterdir() if not p.name.startswith("events")} == {"best", "final", "results.json"}
    assert {p.name for p in run.iterdir() if p.is_file()} >= {
        "config.yaml",
        "environment.json",
        "results.csv",
        "report.html",
        "heatmap.png",
    }
    assert not list(run.rglob("*.part")) and not list(run.rglob("*.tmp"))
    assert load_config(run / "config.yaml") == load_config(path)
    assert (run / "heatmap.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_reads_the_events(swept):
    _, run, _ = swept
    for name in NAMES:
        events = EventAccumulator(str(run / name)).Reload()
        tags = set(events.Tags()["scalars"])
        assert {
            "train/loss",
            "train/accuracy",
            "train/grad_norm",
            "train/learning_rate",
            "train/tokens_per_second",
            "eval/loss",
            "eval/accuracy",
        } <= tags
        assert [e.step for e in events.Scalars("train/loss")] == [2, 4, 6]
        assert [e.step for e in events.Scalars("eval/loss")] == [3, 6]
        assert events.Scalars("eval/loss")[-1].value == pytest.approx(results(run)[name]["final"]["loss"], rel=1e-6)
        # Linear decay from 0.01 over 6 steps: the last of the steps 0 .. 5.
        assert events.Scalars("train/learning_rate")[-1].value == pytest.approx(0.01 / 6, rel=1e-5)


def test_called_again_it_trains_nothing(copied):
    path, run, where = copied
    before = {p: p.stat().st_mtime_ns for p in run.glob("*/*") if p.is_file()}
    summary = (run / "summary.json").read_text()
    result = call("sweep", path, where)
    assert result.code == 0 and "resumed, 4 of 4 members are done" in result.err
    assert {p: p.stat().st_mtime_ns for p in run.glob("*/*") if p.is_file()} == before
    assert (run / "summary.json").read_text() == summary


def test_only_what_is_missing_is_trained(copied):
    path, run, where = copied
    before = results(run)
    # A run killed while its last member was being written.
    (run / NAMES[3] / "results.json").unlink()
    (run / NAMES[3] / "best" / "adapter.json").unlink()
    (run / "results.csv").unlink()
    result = call("sweep", path, where)
    assert result.code == 0 and "3 of 4 members are done" in result.err and "pack 1/1: goes on after step 6" in result.err
    after = results(run)
    assert [after[n] for n in NAMES[:3]] == [before[n] for n in NAMES[:3]]
    assert after[NAMES[3]]["final"]["loss"] == pytest.approx(before[NAMES[3]]["final"]["loss"], rel=1e-5)
    assert len(list(csv.DictReader((run / "results.csv").open()))) == 4


def test_fresh_sets_the_old_run_aside(copied):
    path, run, where = copied
    before = results(run)
    result = call("sweep", path, where, "--fresh")
    assert result.code == 0 and "resumed" not in result.err
    assert results(run.with_name("tiny.old-1")) == before
    for name in NAMES:  # the same config trains to the same numbers, bit for bit
        assert results(run)[name]["final"] == before[name]["final"]


def test_fresh_keeps_the_old_run_where_the_config_is_wrong(copied):
    path, run, where = copied
    result = call("sweep", path, where, "--fresh", "task.text=txt")
    assert result.code == 2
    assert [p.name for p in run.parent.iterdir()] == ["tiny"] and len(results(run)) == 4


def test_evaluate_reproduces_the_best_metrics(swept, monkeypatch):
    _, run, _ = swept
    from lora_jax.sweeps import evaluate
    from lora_jax.tracking import Progress

    got = evaluate.evaluate_run(run, member=None, split="eval", progress=Progress(enabled=False))
    for name, recorded in results(run).items():
        assert got[name] == pytest.approx(recorded["best"], abs=1e-6)


def test_evaluate_prints_one_member_of_either_split(swept):
    _, run, _ = swept
    held_out, training = call("evaluate", run, "--member", NAMES[0]), call("evaluate", run, "--member", NAMES[0], "--split", "train")
    assert held_out.code == training.code == 0
    assert NAMES[0] in held_out.out and NAMES[1] not in held_out.out
    assert f"{results(run)[NAMES[0]]['best']['loss']:.4f}" in held_out.out
    assert held_out.out.splitlines()[-2:] != training.out.splitlines()[-2:]


def test_a_damaged_adapter_is_told(copied):
    _, run, _ = copied
    for file in (run / NAMES[0] / "best" / "arrays").rglob("*"):
        if file.is_file() and file.stat().st_size:
            file.write_bytes(file.read_bytes()[:-7])
    damaged = call("evaluate", run, "--member", NAMES[0])
    assert damaged.code == 2 and "damaged" in damaged.err and len(damaged.err.splitlines()) <= 3
    shutil.rmtree(run / NAMES[1] / "best")
    shutil.copytree(run / NAMES[2] / "best", run / NAMES[1] / "best")
    other = call("evaluate", run, "--member", NAMES[1])
    assert other.code == 2 and "does not fit this model and adapter config" in other.err


def test_compare_shows_all_members(swept):
    _, run, _ = swept
    result = call("compare", run)
    assert result.code == 0
    assert all(targets in result.out for targets in ("│ q ", "│ v+down "))
