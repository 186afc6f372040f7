"""Test rows are scored once, when a member ends, with what it saves; nothing is chosen by them, and without them nothing changes."""

from __future__ import annotations

import csv
import json

import pytest

from lora_jax.analysis import report_run, write_summary_csv
from lora_jax.cli.evaluate import evaluate as evaluate_command
from lora_jax.errors import InputError
from lora_jax.packing.planner import Part
from lora_jax.packing.recorder import Recorder
from lora_jax.sweeps.restore import evaluate_run
from lora_jax.sweeps.run import run_sweep
from lora_jax.tracking import MemberResult, Progress

pytestmark = pytest.mark.usefixtures("compile_cache")

SWEEP = {"grid": {"optimizer.learning_rate": [0.001, 0.03], "adapter.rank": [1, 3]}}
ROWS = "text,label\n" + "".join(f"a {'good' if i % 3 else 'bad'} film about people {i},{'pos' if i % 3 else 'neg'}\n" for i in range(30))


@pytest.fixture
def test_file(tmp_path):
    (tmp_path / "test.csv").write_text(ROWS)
    return tmp_path / "test.csv"


def scored(run, split, **options):
    return evaluate_run(run, member=None, split=split, progress=Progress(enabled=False), **options)


@pytest.mark.slow
def test_scores_of_a_file_of_its_own(hub, tmp_path, test_file):
    plain = run_sweep(hub.config(tmp_path, {"sweep": SWEEP}, name="plain"))
    outcome = run_sweep(hub.config(tmp_path, {"sweep": SWEEP, "task.test_source": str(test_file)}, name="tested"))
    assert outcome.compiled_programs == 2  # the test is one more call of the evaluation
    # Training, validation and files are what they are without a test, to the bit.
    for a, b in zip(plain.results, outcome.results, strict=True):
        assert (a.final, a.best, a.best_step, a.test, a.tested) == (b.final, b.best, b.best_step, {}, "")
    assert not {"test", "tested", "test_batches"} & json.loads((plain.path / plain.results[0].name / "results.json").read_text()).keys()
    assert "test" not in (plain.path / "results.csv").read_text()
    # What was saved scores the same.
    again = scored(outcome.path, "test")
    for result in outcome.results:
        assert result.tested == "best" and again[result.name] == pytest.approx(result.test, rel=1e-5)
        batches = result.test_batches
        assert sum(batches["targets"]) == 30 and sum(batches["right"]) / 30 == pytest.approx(result.test["accuracy"])
        assert MemberResult.read(outcome.path / result.name) == result
    rows = list(csv.DictReader((outcome.path / "results.csv").open()))
    assert [float(row["test_accuracy"]) for row in rows] == [r.test["accuracy"] for r in outcome.results]
    assert {row["tested"] for row in rows} == {"best"}
    with pytest.raises(InputError, match="--split: .* has no test rows"):
        scored(plain.path, "test")
    page = report_run(outcome.path).read_text()
    assert "test accuracy (%)" in page and "final validation accuracy (%)" in page and "test: all 30 rows of" in page
    assert "test_accuracy_low" in write_summary_csv(tmp_path / "summary.csv", outcome.results).read_text()
    assert "validation" not in report_run(plain.path).read_text()


@pytest.mark.slow
def test_rows_of_the_source(hub, tmp_path, capsys):
    config = hub.config(tmp_path, {"task.test_size": 30, "tracking.save": "final", "training.steps": 4})
    outcome = run_sweep(config)
    (result,) = outcome.results
    assert result.tested == "final" and sum(result.test_batches["targets"]) == 30
    assert scored(outcome.path, "test")["main"] == pytest.approx(result.test, rel=1e-5)
    assert scored(outcome.path, "eval")["main"] == pytest.approx(result.final, rel=1e-5)
    evaluate_command(outcome.path, split="test")
    assert "(test)" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.long
def test_alone_in_parts_and_stopped_between(hub, tmp_path, test_file, monkeypatch):
    def config(name):
        return hub.config(tmp_path, {"sweep": SWEEP, "task.test_source": str(test_file)}, name=name)

    def tests(outcome):
        return {r.name: (r.test, r.tested) for r in outcome.results}

    whole = run_sweep(config("whole"))
    solo = run_sweep(config("solo"), solo=True)
    for name, (test, _) in tests(whole).items():
        assert tests(solo)[name][0] == pytest.approx(test, rel=1e-5)
    for index in (1, 2):
        parts = run_sweep(config("parts"), part=Part(index, 2))
    for name, (test, _) in tests(whole).items():
        assert tests(parts)[name][0] == pytest.approx(test, rel=1e-5)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(config("resumed"))
    assert tests(run_sweep(config("resumed"))) == tests(whole)


@pytest.mark.long
def test_halving_chooses_without_them(hub, tmp_path, test_file):
    sweep = SWEEP | {"halving": {"rungs": [3]}}
    changes = {"sweep": sweep, "task.test_source": str(test_file), "training.pack": "scan"}
    outcome = run_sweep(hub.config(tmp_path, changes))
    ended = {r.status: r for r in outcome.results}
    assert ended["stopped"].test == {} and ended["stopped"].tested == "" and set(ended["finished"].test) == {"loss", "accuracy", "macro_f1"}
    plain = run_sweep(hub.config(tmp_path, changes | {"task.test_source": None}, name="plain"))
    assert [(r.status, r.final) for r in plain.results] == [(r.status, r.final) for r in outcome.results]


@pytest.mark.slow
def test_other_test_rows_are_another_run(hub, tmp_path, test_file):
    outcome = run_sweep(hub.config(tmp_path, {"task.test_source": str(test_file), "training.steps": 4}))
    test_file.write_text(ROWS.replace("people", "it"))
    with pytest.raises(InputError, match="What changed: task data: other test rows"):
        scored(outcome.path, "test")
    scored(outcome.path, "eval")
