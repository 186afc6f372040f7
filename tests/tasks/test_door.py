"""A task that is not ours, with a loss and a metric of its own: from a YAML file to results and a report."""

from __future__ import annotations

import json
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx
from pydantic import Field

from lora_jax.analysis import find_metric, primary_metric, results_table
from lora_jax.config.doors import TASKS
from lora_jax.config.schema import Config, TaskConfig
from lora_jax.data.batching import NO_TARGET, Example
from lora_jax.data.tokens import encoder_ids
from lora_jax.errors import InputError
from lora_jax.models.heads import SequenceClassifier
from lora_jax.sweeps.restore import evaluate_run
from lora_jax.tasks.base import Columns, Encoded, Task, TaskMetrics
from lora_jax.tasks.evaluators import EVALUATORS, Evaluator
from lora_jax.tasks.objectives import OBJECTIVES
from lora_jax.tracking import Progress, read_run
from tests.tiny_hub import call

pytestmark = pytest.mark.usefixtures("compile_cache")


# ---- what a package of someone else's would hold -------------------------------------------------------------------------------------
class RatingConfig(TaskConfig):
    kind: Literal["rating"] = Field(default="rating", description="A number for each text.")
    text: str = Field(description="Text column.")
    value: str = Field(description="Number column.")


class Rater(SequenceClassifier):
    """An encoder with one output, the number itself."""

    def answers(self, features: jax.Array) -> jax.Array:
        return self.readout()(features)


def huber(model: Any, features: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    error = jnp.abs(model.readout()(features) - batch["target_values"])[:, 0]
    return jnp.sum(batch["target_weights"] * jnp.where(error < 1, error**2 / 2, error - 0.5)), jnp.float32(0)


class Rating(Task):
    name, section, objective, targets = "rating", RatingConfig, "huber", 1

    def columns(self, section: RatingConfig) -> Columns:
        return Columns((section.text, section.value), targets=(section.value,))

    def metrics(self, section: RatingConfig, classes: Any) -> TaskMetrics:
        return TaskMetrics(("loss", "mean_absolute_error"), "mean_absolute_error")

    def model(self, section: RatingConfig, base: Any, classes: Any, class_token_ids: Any = None) -> nnx.Module:
        return Rater(base, 1, rngs=nnx.Rngs(0))

    def encode(self, section: RatingConfig, rows: Any, tokenizer: Any, *, decoder: bool, classes: Any) -> Encoded:
        made = []
        for ids, value in zip(encoder_ids(tokenizer, rows.columns["text"], section.max_length), rows.columns[section.value], strict=True):
            targets = np.full(len(ids), NO_TARGET, np.int32)
            targets[0] = 0
            made.append(Example(np.array(ids, np.int32), targets, values=np.array([[float(value)]], np.float32)))
        return Encoded(made)


def mean_absolute_error(answers: Any, wanted: Any) -> float:
    return float(np.mean([np.abs(a - w) for a, w in zip(answers, wanted, strict=True)]))


# --------------------------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def rating():
    """The task, registered for this module alone."""
    doors = {
        TASKS: ("rating", Rating()),
        OBJECTIVES: ("huber", huber),
        EVALUATORS: ("mean_absolute_error", Evaluator("mean_absolute_error", False, from_answers=mean_absolute_error)),
    }
    for door, (name, thing) in doors.items():
        door.all()
        door.register(name, thing)
    yield
    for door, (name, _) in doors.items():
        del door._found[name]
        for told in door._changed:
            told()


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory, rating):
    """A sweep over two learning rates, one of which learns nothing."""
    folder = tmp_path_factory.mktemp("rating")
    rng, rows = np.random.default_rng(0), folder / "rows.jsonl"
    words = [["good" if rng.random() < 0.5 else "bad" for _ in range(4)] for _ in range(120)]
    texts = [" ".join([*w, *(("film", "plot", "story", "people")[k] for k in rng.permutation(4))]) for w in words]
    rows.write_text("".join(json.dumps({"text": t, "stars": 2.0 + w.count("good") / 2}) + "\n" for t, w in zip(texts, words, strict=True)))
    values = hub.values("rating") | {
        "task": {"kind": "rating", "source": str(rows), "text": "text", "value": "stars", "eval_size": 20, "max_length": 24},
        "sweep": {"grid": {"optimizer.learning_rate": [0.02, 1e-20]}},
        "training": {"steps": 30, "batch_size": 8, "eval_every": 10},
    }
    values["tracking"]["dir"] = str(folder / "runs")
    (folder / "rating.yaml").write_text(yaml.safe_dump(values))
    called = call("sweep", folder / "rating.yaml")
    assert called.code == 0, called.err
    return folder / "runs" / "rating"


@pytest.mark.slow
def test_members_are_compared_by_the_tasks_own_metric(run):
    results = sorted(read_run(run), key=lambda r: -r.settings["optimizer.learning_rate"])
    assert [list(r.final) for r in results] == [["loss", "mean_absolute_error"]] * 2
    assert {r.metric for r in results} == {"mean_absolute_error"}
    assert primary_metric(results).name == "mean_absolute_error" and not primary_metric(results).larger_is_better
    learned, still = results
    assert learned.final["mean_absolute_error"] < 0.7 * still.final["mean_absolute_error"]
    # The best step is the one of the smallest error.
    assert learned.best["mean_absolute_error"] <= learned.final["mean_absolute_error"]
    assert "final_mean_absolute_error" in (run / "results.csv").read_text().splitlines()[0]
    report = (run / "report.html").read_text()
    assert "final mean_absolute_error" in report and "accuracy" not in report
    assert [c.header for c in results_table(results).columns if "mean_absolute_error" in str(c.header)]


def test_its_loss_and_metric_are_what_the_task_says(run, hub):
    found = evaluate_run(run, member=None, split="eval", progress=Progress(enabled=False))
    for result in read_run(run):
        assert found[result.name]["mean_absolute_error"] == pytest.approx(result.best["mean_absolute_error"], rel=1e-5)
    # Errors of at least 1 cost error - 0.5, smaller ones no more than that: so the losses bound one another.
    still = next(r.final for r in read_run(run) if r.settings["optimizer.learning_rate"] == 1e-20)
    assert still["mean_absolute_error"] - 0.5 <= still["loss"] + 1e-6


@pytest.mark.slow
def test_halving_by_it_keeps_the_smaller_error(run, tmp_path):
    values = yaml.safe_load((run.parents[1] / "rating.yaml").read_text())
    values["sweep"] = {"grid": {"optimizer.learning_rate": [1e-20, 0.02]}, "halving": {"rungs": 1, "metric": "mean_absolute_error"}}
    values |= {"name": "halved", "tracking": values["tracking"] | {"dir": str(tmp_path)}}
    (tmp_path / "halved.yaml").write_text(yaml.safe_dump(values))
    assert call("sweep", tmp_path / "halved.yaml").code == 0
    assert {r.settings["optimizer.learning_rate"]: r.status for r in read_run(tmp_path / "halved")} == {1e-20: "stopped", 0.02: "finished"}
    for metric, told in (("mean_absolut_error", "mean_absolute_error"), ("accuracy", "loss")):
        refused = call("sweep", tmp_path / "halved.yaml", f"sweep.halving.metric={metric}", f"name=other{metric}")
        assert refused.code == 2 and "sweep.halving.metric" in refused.err and told in refused.err


def test_keys_belong_to_their_task(run, hub, tmp_path):
    config = Config.model_validate(yaml.safe_load((run / "config.yaml").read_text()))
    assert isinstance(config.task, RatingConfig)
    with pytest.raises(InputError, match="'task.value' belongs to .*rating"):
        hub.config(tmp_path, {"task.value": "stars"})
    with pytest.raises(InputError, match="task.value: missing"):
        hub.config(tmp_path, {"task": {"kind": "rating", "source": "x", "text": "t"}})


def test_a_metric_without_an_evaluator_is_refused():
    from lora_jax.tracking import MemberResult

    with pytest.raises(InputError, match="no metric 'score'"):
        find_metric("score", [MemberResult("a", {}, 1, "finished", {"score": 1.0})])
