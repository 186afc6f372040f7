"""A sweep in parts, one after the other: who writes what, and when the whole is written."""

from __future__ import annotations

import csv

import pytest

from tests.tiny_hub import call

GRID = {"sweep": {"grid": {"adapter.rank": [2, 3]}}, "training.steps": 2, "training.eval_every": 0}


@pytest.mark.slow
def test_the_last_part_writes_the_whole(hub, tmp_path, compile_cache):
    path, run = hub.write(tmp_path, GRID), tmp_path / "runs" / "tiny"
    first = call("sweep", path, "--part", "1/2")
    assert first.code == 0, first.err
    assert "part 1/2 is done; unfinished members of other parts: 1." in first.err and first.out == ""
    assert (run / "rank=2" / "results.json").exists() and not (run / "rank=3").exists()
    assert not any((run / name).exists() for name in ("results.csv", "report.html"))
    again = call("sweep", path, "--part", "1/2")
    assert again.code == 0 and "resumed, 1 of 1 members are done" in again.err
    last = call("sweep", path, "--part", "2/2")
    assert last.code == 0 and "rank=2" in (run / "results.csv").read_text() and (run / "report.html").exists()
    assert [row["status"] for row in csv.DictReader((run / "results.csv").open())] == ["finished"] * 2
    whole = call("sweep", path)
    assert whole.code == 0 and "resumed, 2 of 2 members are done" in whole.err


def test_a_part_with_nothing_to_do(hub, tmp_path):
    path = hub.write(tmp_path, GRID)
    result = call("sweep", path, "--part", "3/3")
    assert result.code == 0 and "part 3/3 is done; unfinished members of other parts: 2." in result.err


def test_words_that_do_not_go_together(hub, tmp_path):
    path = hub.write(tmp_path, GRID)
    fresh = call("sweep", path, "--part", "1/2", "--fresh")
    assert fresh.code == 2 and "--fresh: not with --part" in fresh.err
    wrong = call("sweep", path, "--part", "half")
    assert wrong.code == 2 and "--part: 'half' is not NUMBER/COUNT" in wrong.err
    assert not (tmp_path / "runs").exists()
