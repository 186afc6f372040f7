"""The comparison of methods: sizes and grids, findings from made-up results, and a run of two methods that is stopped and goes on."""

from __future__ import annotations

import json
import math
import sys
from unittest import mock

import numpy as np
import pytest

from experiments import compare_methods as experiment
from lora_jax.packing.recorder import Recorder
from lora_jax.tracking import MemberResult
from tests import tiny


def test_sizes_are_those_of_the_reference_where_a_method_can_have_them():
    sized = experiment.sizes(tiny.encoder(3), ["dora", "ia3", "loha"])
    assert list(sized) == ["lora", "dora", "ia3", "loha"]
    wanted = sized["lora"]["parameters"]
    assert wanted == 2 * 4 * 8 * (32 + 32) and sized["loha"]["rank"] == 4
    for own in sized.values():
        assert own["matched"] == (1 / 1.1 <= own["parameters"] / wanted <= 1.1)
    assert [name for name, own in sized.items() if not own["matched"]] == ["ia3"]


def test_grids_are_geometric_around_their_centre():
    assert experiment.rates_of("lora", 5) == [0.00025, 0.001, 0.004, 0.016, 0.064]
    assert experiment.rates_of("ia3", 3) == [0.004, 0.016, 0.064]
    points = experiment.members({"lora": {"settings": {"adapter.method": "lora"}}}, 2, 3)
    assert len(points) == 6 and points[0] == {"adapter.method": "lora", "optimizer.learning_rate": 0.004, "training.seed": 0}


def made_up(better: float) -> list[MemberResult]:
    """LoRA and DoRA at two rates; DoRA is right on `better` more of 640 test rows, and LoRA's other rate diverges once."""
    rng = np.random.default_rng(0)
    results = []
    for method, gain in (("lora", 0.0), ("dora", better)):
        for rate, valid in ((0.004, 0.7), (0.016, 0.75)):
            for seed in range(3):
                right = (22 + 32 * gain + rng.integers(-1, 2, 20) + 0.1 * seed).tolist()
                point = {"adapter.method": method, "adapter.rank": 8, "optimizer.learning_rate": rate, "training.seed": seed}
                diverged = method == "lora" and rate == 0.016 and seed == 2
                results.append(
                    MemberResult(
                        json.dumps(point),
                        point,
                        1,
                        "diverged" if diverged else "finished",
                        {"accuracy": math.nan if diverged else valid},
                        test={"accuracy": sum(right) / 640},
                        tested="best",
                        test_batches={"targets": [32.0] * 20, "right": right, "loss": [0.0] * 20},
                    )
                )
    return results


def test_findings_of_made_up_results(tmp_path):
    sized = {name: {"rank": 8, "parameters": 100, "matched": name == "lora", "settings": {}} for name in ("lora", "dora")}
    found = experiment.findings(made_up(0.1), sized, 5)
    lora, dora = found["methods"]["lora"], found["methods"]["dora"]
    assert lora["rate"] == 0.004 and lora["validation"]["0.016"] is None  # a rate at which a seed diverged is not chosen
    assert dora["rate"] == 0.016 and dora["difference"]["holds"] and dora["difference"]["mean"] == pytest.approx(0.1, abs=0.02)
    assert not experiment.findings(made_up(0.0), sized, 5)["methods"]["dora"]["difference"]["holds"]
    found["run"] = {"base": "minilm", "rates": 2, "seeds": 3, "steps": 4, "rows": 640, "reference": "lora"}
    page = experiment.written(found, "figure.png")
    assert "- Better than LoRA: dora." in page and "no fair comparison: dora (100)." in page
    experiment.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
@pytest.mark.usefixtures("compile_cache", "minilm_source", "reviews_source")
def test_a_small_run_that_is_stopped_and_goes_on(tmp_path, monkeypatch):
    words = ["--methods", "lora", "ia3", "--rates", "2", "--seeds", "2", "--steps", "3", "--rows", "40"]
    words += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", *words])
    real, calls = Recorder.finish, []

    def finish(self, *args, **kwargs):
        calls.append([m.name for m in self.members])
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(self, *args, **kwargs)

    with mock.patch.object(Recorder, "finish", finish), pytest.raises(KeyboardInterrupt):
        experiment.main()
    experiment.main()
    assert [len(names) for names in calls] == [4, 4] and calls[0] != calls[1]  # a pack a method
    found = json.loads((tmp_path / "results" / "compare_methods.json").read_text())["methods"]
    assert found["lora"]["matched"] and not found["ia3"]["matched"] and 0 < found["ia3"]["difference"]["p_holm"] <= 1
    assert "ia3 (3,072)" in (tmp_path / "results" / "compare_methods.md").read_text()
    assert (tmp_path / "figures" / "compare_methods.png").exists()
