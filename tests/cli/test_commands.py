"""A sweep from the command line, from its first call to its export: what is written, resumed, refused, reproduced and taken away."""

from __future__ import annotations

import csv
import json
import shutil
import types

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_jax import load_model, load_peft
from lora_jax.adapters.partition import partition
from lora_jax.config.load import load_config
from lora_jax.models.add_head import add_head
from lora_jax.sweeps.restore import restore_member, run_members
from tests import tiny
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
    assert json.loads((run / "state.json").read_text())["summary"]["compiled_programs"] == 2
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
        for metric in ("loss", "accuracy"):
            assert events.Scalars(f"train/{metric}")[-1].value == pytest.approx(results(run)[name]["train"][metric], rel=1e-6)
        # Linear decay from 0.01 over 6 steps: the last of the steps 0 .. 5.
        assert events.Scalars("train/learning_rate")[-1].value == pytest.approx(0.01 / 6, rel=1e-5)


def test_called_again_it_trains_nothing(copied):
    path, run, where = copied
    before = {p: p.stat().st_mtime_ns for p in run.glob("*/*") if p.is_file()}
    summary = (run / "state.json").read_text()
    result = call("sweep", path, where)
    assert result.code == 0 and "resumed, 4 of 4 members are done" in result.err
    assert {p: p.stat().st_mtime_ns for p in run.glob("*/*") if p.is_file()} == before
    assert (run / "state.json").read_text() == summary


def test_only_what_is_missing_is_trained(copied):
    path, run, where = copied
    before = results(run)
    # A run killed while its last member was being written.
    (run / NAMES[3] / "results.json").unlink()
    (run / NAMES[3] / "best" / "adapter.json").unlink()
    (run / "results.csv").unlink()
    result = call("sweep", path, where)
    assert result.code == 0 and "3 of 4 members are done" in result.err and "pack 1/1: continues after step 6" in result.err
    after = results(run)
    assert [after[n] for n in NAMES[:3]] == [before[n] for n in NAMES[:3]]
    assert after[NAMES[3]]["final"]["loss"] == pytest.approx(before[NAMES[3]]["final"]["loss"], rel=1e-5)
    assert len(list(csv.DictReader((run / "results.csv").open()))) == 4


@pytest.mark.slow
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
    from lora_jax.sweeps import restore as evaluate
    from lora_jax.tracking import Progress

    got = evaluate.evaluate_run(run, member=None, split="eval", progress=Progress(enabled=False))
    for name, recorded in results(run).items():
        assert got[name] == pytest.approx(recorded["best"], abs=1e-6)


def test_evaluate_marks_the_member_that_export_takes(swept):
    from lora_jax.analysis.compare import choose_member

    _, run, _ = swept
    _, best, why = choose_member(run, None)
    for split in ("eval", "train"):
        shown = call("evaluate", run, "--split", split).out
        starred = [line for line in shown.splitlines() if " * " in line]
        assert len(starred) == 1 and best.name in starred[0], shown
        assert f"* {why}" in " ".join(shown.split())
    assert "*" not in call("evaluate", run, "--member", best.name).out  # of one member there is no choice


def test_evaluate_marks_none_where_none_has_finished(copied):
    _, run, _ = copied
    for name in NAMES:
        file = run / name / "results.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "diverged"}))
    result = call("evaluate", run)
    assert result.code == 0 and " * " not in result.out and "No member has finished: none is marked as best." in result.out


def test_evaluate_prints_one_member_of_either_split(swept):
    _, run, _ = swept
    held_out, training = call("evaluate", run, "--member", NAMES[0]), call("evaluate", run, "--member", NAMES[0], "--split", "train")
    assert held_out.code == training.code == 0
    assert NAMES[0] in held_out.out and NAMES[1] not in held_out.out
    best = results(run)[NAMES[0]]["best"]
    assert f"{best['loss']:.4f}" in held_out.out
    assert "accuracy (%)" in held_out.out and f" {100 * best['accuracy']:.1f} " in held_out.out  # as tables have it
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


def last(result):
    """The lines of an error message, whole."""
    lines = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
    assert result.code == 2 and lines[0].startswith("error: ") and "Traceback" not in result.err and result.out == "", result
    return "\n".join(lines)


def test_the_winner_is_taken_away(copied, tmp_path):
    """The best member, its adapter merged: loaded as any checkpoint, it computes what the member computed."""
    _, run, _ = copied
    result = call("export", run)
    assert result.code == 0, result.err
    outcomes = results(run)
    best = max(NAMES, key=lambda name: outcomes[name]["best"]["accuracy"])  # the first of equals
    folder = run / best / "hf"
    assert result.out.startswith(f"{best} (best of 4 by accuracy (%): ") and f": {folder}\n" in result.out
    assert {p.name for p in folder.iterdir()} == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"] and config["id2label"] == {"0": "neg", "1": "pos"}
    member = next(m for m in run_members(run) if m.name == best)
    tokens = np.array([[2, 5, 20, 7, 3], [2, 9, 3, 0, 0]], np.int32)
    with tiny.quick_compile():
        trained = tiny.outputs(restore_member(run, member).model, tokens, tokens > 0)
        merged = load_model(str(folder), head="classification")
        assert merged.class_names == ("neg", "pos")
        assert np.abs(tiny.outputs(merged, tokens, tokens > 0) - trained).max() < 1e-5
    card = (folder / "README.md").read_text()
    rank, targets = outcomes[best]["settings"]["adapter.rank"], outcomes[best]["settings"]["adapter.targets"]
    for told in (f"| rank, alpha | {rank}, 16 |", f"`{json.dumps(targets)}`", "| classes | neg, pos |", "jax ", "| data | `reviews.csv` |"):
        assert told in card
    assert f"| accuracy | {outcomes[best]['best']['accuracy']:.4f} |" in card and str(tmp_path) not in card
    assert "already exists and is not overwritten" in last(call("export", run))


def test_an_adapter_is_taken_away_by_name(copied, tmp_path):
    _, run, _ = copied
    result = call("export", run / NAMES[3], "--format", "peft", "--out", tmp_path / "peft")
    assert result.code == 0 and result.out.startswith(f"{NAMES[3]}, the best adapter: "), result
    assert {p.name for p in (tmp_path / "peft").iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    member = next(m for m in run_members(run) if m.name == NAMES[3])
    restored = restore_member(run, member).model
    base = add_head(load_model(member.config.model.source), "classification", rngs=nnx.Rngs(0))
    again = load_peft(base, tmp_path / "peft")
    assert tiny.arrays_equal(partition(again).trainable, partition(restored).trainable)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.slow
def test_what_cannot_be_taken_away_is_told(copied, tmp_path):
    path, run, _ = copied
    before = set(tmp_path.rglob("*"))
    out = tmp_path / "out"
    assert "--format: there is no exporter 'hg'. Did you mean 'hf'?" in last(call("export", run, "--format", "hg"))
    assert "not a run directory" in last(call("export", tmp_path, "--out", out))
    assert f"no member 'rank=3'. Valid choices: {', '.join(NAMES)}." in last(call("export", run / "rank=3"))
    assert "--member: no member 'nobody'" in last(call("export", run, "--member", "nobody"))
    assert "--max-shard-size: must be bytes or a size such as 8GB" in last(call("export", run, "--max-shard-size", "much"))
    assert "--dtype: unknown value 'int8'." in last(call("export", run, "--dtype", "int8"))
    for option, value in (("--dtype", "float32"), ("--max-shard-size", "1GB")):  # of another exporter
        assert f"{option}: --format peft has no such option" in last(call("export", run, "--format", "peft", option, value))
    assert "already exists" in last(call("export", run, "--out", run))
    # The same run, had it been trained otherwise.
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("pooling: cls", "pooling: mean"))
    assert "the head reads the mean of the tokens" in last(call("export", run, "--out", out))
    bare = tmp_path / "bare"
    shutil.copytree(load_config(path).model.source, bare)
    tensors = load_file(bare / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "pooler" not in k}, bare / "model.safetensors")
    (run / "config.yaml").write_text(text.replace(load_config(path).model.source, str(bare)))
    assert "What changed: the base" in last(call("export", run, "--out", out))
    (run / "state.json").unlink()  # as of an older version, which did not say what its base was
    for file in run.glob("*/*/adapter.json"):
        facts = json.loads(file.read_text())
        file.write_text(json.dumps({"format": 1, "arrays": facts["arrays"], "classes": facts["classes"]}))
    assert "was saved without a pooler" in last(call("export", run, "--out", out))
    (run / "config.yaml").write_text(text)
    shutil.rmtree(bare)
    (run / NAMES[0] / "best" / "adapter.json").write_text("{")
    assert "adapter.json: damaged" in last(call("export", run, "--member", NAMES[0], "--out", out))
    assert set(tmp_path.rglob("*")) == before - {run / "state.json"}


def test_a_full_disk_leaves_no_half_of_an_export(copied, tmp_path, monkeypatch):
    _, run, _ = copied

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_jax.interop.hf.shutil.copyfile", full)
    result = call("export", run, "--out", tmp_path / "out")
    assert result.code == 1 and "out: cannot be written (No space left on device)" in result.err
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("answer", [True, False])
def test_a_sweep_of_very_many_members_is_asked_about(hub, tmp_path, monkeypatch, answer):
    """On a terminal; elsewhere it takes --yes, which asks nothing."""
    from lora_jax.cli import sweep

    asked, run = [], []
    monkeypatch.setattr(sweep.typer, "confirm", lambda text: asked.append(text) or answer)
    monkeypatch.setattr(sweep, "run_and_report", lambda config, *, many, **_: run.append(many))
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: True))
    config = hub.write(tmp_path, {"sweep": {"grid": {"adapter.rank": list(range(1, 102)), "training.seed": list(range(100))}}})
    assert call("sweep", config).code == 0
    assert run == [answer] and len(asked) == 1 and "more than 10,000 members" in asked[0]
    assert call("sweep", config, "--yes").code == 0 and call("sweep", config, "sweep.where=rank < 3").code == 0
    assert run[1:] == [True, False] and len(asked) == 1
