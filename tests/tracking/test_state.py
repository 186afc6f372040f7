"""`state.json`: kept, shared by processes, mended where it can be, and read from the files of earlier versions."""

from __future__ import annotations

import json
import multiprocessing

import pytest

from lora_jax.errors import InputError
from lora_jax.tracking import RunState, read_state, update_state
from lora_jax.tracking.state import Rungs, Split

FULL = RunState(
    plan=[[["a", "b"], ["c"]], [["a"]]],
    splits=[Split(["a", "b"], [["a"], ["b"]], "too large")],
    halving=Rungs(["a", "b", "c"], [2], [["a"]]),
    execution={"0123456789ab": {"kind": "k", "mode": "scan", "width": 1}},
    summary={"compiled_programs": 2, "seconds": 1.5},
)


def fill(state):
    for name in ("plan", "splits", "halving", "execution", "summary"):
        setattr(state, name, getattr(FULL, name))


def test_what_is_written_is_read(tmp_path):
    assert read_state(tmp_path) == RunState()
    assert update_state(tmp_path, fill) == FULL == read_state(tmp_path)
    update_state(tmp_path, lambda state: state.summary.update(packs=3))
    assert read_state(tmp_path).summary == FULL.summary | {"packs": 3} and read_state(tmp_path).splits == FULL.splits


def _note(folder, name):
    for number in range(20):
        update_state(folder, lambda state, number=number: state.execution.update({f"{name}{number}": {}}))


@pytest.mark.slow
def test_processes_lose_nothing_of_each_other(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_note, args=(tmp_path, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert len(read_state(tmp_path).execution) == 40


@pytest.mark.parametrize("section", ["plan", "execution", "summary"])
def test_a_section_that_can_be_made_again_is_dropped(tmp_path, section):
    update_state(tmp_path, fill)
    path = tmp_path / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {section: "?"}))
    found = read_state(tmp_path)
    assert found.dropped == [section] and not getattr(found, section) and found.splits == FULL.splits
    update_state(tmp_path, lambda state: None)
    assert read_state(tmp_path).dropped == []


@pytest.mark.parametrize("text", ["{", "[]", '{"splits": [{"pack": 1}]}', '{"halving": {"members": []}}'])
def test_what_cannot_be_made_again_is_an_error(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(InputError, match="state.json"):
        read_state(tmp_path)


def test_the_files_of_earlier_versions(tmp_path):
    mode = FULL.execution["0123456789ab"]
    files = {
        "plan.json": {"stages": FULL.plan},
        "pieces.json": {"cuts": [{"pack": ["a", "b"], "pieces": [["a"], ["b"]], "why": "too large"}]},
        "halving.json": {"members": ["a", "b", "c"], "steps": [2], "kept": [["a"]]},
        "checkpoints/0123456789ab/mode.json": mode,
        "summary.json": FULL.summary,
    }
    for name, facts in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(facts))
    assert read_state(tmp_path) == FULL
    for name in ("plan.json", "checkpoints/0123456789ab/mode.json"):
        (tmp_path / name).write_text("{")
    found = read_state(tmp_path)
    assert found.plan == [] and found.execution == {} and found.dropped == ["plan"]
    (tmp_path / "pieces.json").write_text("{")
    with pytest.raises(InputError, match="pieces.json"):
        read_state(tmp_path)
    update = {"format": 1, "summary": {}}
    (tmp_path / "state.json").write_text(json.dumps(update))
    assert read_state(tmp_path) == RunState()  # theirs are not read any more
