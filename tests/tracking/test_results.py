import csv
import json
import math

import pytest

from lora_jax.errors import InputError
from lora_jax.tracking import MemberResult, read_run, write_results_csv


def member(name="m", rank=4, accuracy=0.5, **more):
    settings = {"adapter.rank": rank, "adapter.targets": ["q_proj", "v_proj"]}
    return MemberResult(name, settings, 100, more.pop("status", "finished"), {"accuracy": accuracy}, **more)


def test_results_come_back_as_they_went(tmp_path):
    result = member(best={"accuracy": 0.6}, best_step=7, steps=10, seconds=1.5, tokens=3, history=[{"step": 1, "loss": 2.0}])
    result.write(tmp_path)
    assert MemberResult.read(tmp_path) == result


def test_nan_is_null_on_disk_and_nan_again(tmp_path):
    path = member(accuracy=math.nan, tokens_per_second=math.inf, status="diverged").write(tmp_path)
    assert json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(c))["final"] == {"accuracy": None}
    back = MemberResult.read(path)
    assert math.isnan(back.final["accuracy"]) and math.isnan(back.tokens_per_second)


@pytest.mark.parametrize(
    "text, word",
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ("{}", "'name'"),
        (json.dumps({"name": "m", "settings": {}, "parameters": "many", "status": "finished", "final": {}}), "'parameters'"),
        (json.dumps({"name": "m", "settings": {}, "parameters": 1, "status": "done", "final": {}}), "'status'"),
        (json.dumps({"name": "m", "settings": {}, "parameters": 1, "status": "finished", "final": {"a": "b"}}), "'final'"),
    ],
)
def test_damaged_results_are_named(tmp_path, text, word):
    (tmp_path / "m").mkdir()
    (tmp_path / "config.yaml").write_text("name: a\n")
    (tmp_path / "m" / "results.json").write_text(text)
    with pytest.raises(InputError) as error:
        read_run(tmp_path)
    assert "results.json" in str(error.value) and word in str(error.value)


def test_read_run_orders_ranks_by_size_and_wants_a_run(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError):
            read_run(path)
    (tmp_path / "config.yaml").write_text("name: a\n")
    with pytest.raises(InputError, match="no member"):
        read_run(tmp_path)
    for rank in (16, 4, 128):
        member(f"rank={rank}", rank).write(tmp_path / f"rank={rank}")
    assert [r.settings["adapter.rank"] for r in read_run(tmp_path)] == [4, 16, 128]


def test_csv_has_a_row_a_member_and_a_column_a_key(tmp_path):
    other = MemberResult("n", {"optimizer.learning_rate": 1e-4}, 5, "diverged", {"accuracy": math.nan, "loss": 1.0})
    path = write_results_csv(tmp_path / "results.csv", [member(best={"accuracy": 0.6}, best_step=3), other])
    first, second = csv.DictReader(path.open())
    assert first["adapter.rank"] == "4" and json.loads(first["adapter.targets"]) == ["q_proj", "v_proj"]
    assert (first["final_accuracy"], first["best_accuracy"], first["best_step"], first["final_loss"]) == ("0.5", "0.6", "3", "")
    assert (second["optimizer.learning_rate"], second["adapter.rank"], second["final_accuracy"]) == ("0.0001", "", "")
