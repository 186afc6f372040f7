"""Tokens in mapped files: what is kept is what would be made, a second run makes nothing, and what is damaged or stale is never used."""

from __future__ import annotations

import csv
import json
import os
import socket
from unittest import mock

import numpy as np
import pytest

from lora_jax.data import columns, files
from lora_jax.data.batching import BatchPlan
from lora_jax.data.store import Ragged, TokenFiles, counts_of, largest, lengths_of
from lora_jax.errors import InputError, InputWarning
from lora_jax.tasks import prepare as preparing
from lora_jax.tasks.base import task_section
from lora_jax.tasks.prepare import prepare
from lora_jax.weights.provenance import arrays_digest
from lora_jax.weights.tokenizer import load_tokenizer
from tests.tiny_hub import WORDS, call

KEYS = {"kind": "causal_lm", "text": "text", "eval_size": 7, "test_size": 5, "max_length": 12, "token_cache": "on"}


@pytest.fixture(scope="module")
def tokenizer(hub):
    return load_tokenizer(str(hub.llama))


@pytest.fixture
def lines(tmp_path):
    """A text file of 90 lines, some of them blank, some twice, some too long."""
    rng = np.random.default_rng(0)
    found = [" ".join(rng.choice(WORDS, rng.integers(0, 15))) for _ in range(80)]
    (tmp_path / "lines.txt").write_text("\n".join([*found, *found[:10]]) + "\n")
    return tmp_path / "lines.txt"


@pytest.fixture
def made(lines, tokenizer, tmp_path, monkeypatch):
    """`made(**keys)`: the data of the file's lines, through files, a few rows at a time; and how often it was tokenised."""
    for module in (preparing, columns, files):
        monkeypatch.setattr(module, "AT_ONCE", 9)
    store = TokenFiles(tmp_path / "cache")

    def data(*, kept=True, **keys):
        section = task_section(**KEYS | ({} if "sources" in keys else {"source": str(lines)}) | keys)
        with mock.patch.object(preparing, "_make", side_effect=preparing._make) as make:
            found = prepare(section, tokenizer, decoder=True, store=store if kept else None)
        return found, make.call_count

    return data


def entries(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_what_is_kept_is_what_would_be_made(made):
    plain, _ = made(kept=False)
    for count in (1, 0):  # the second run tokenises nothing
        found, tokenised = made()
        assert tokenised == count
        for own, other in zip(found.parts, plain.parts, strict=True):
            assert isinstance(own.tokens, Ragged) and len(own.tokens) == len(other.tokens)
            for name in ("tokens", "targets"):
                assert all(np.array_equal(a, b) for a, b in zip(getattr(own, name), getattr(other, name), strict=True))
                assert arrays_digest([getattr(own, name)]) == arrays_digest([getattr(other, name)])
            for name in ("lengths", "sizes", "target_counts"):
                np.testing.assert_array_equal(getattr(own, name), getattr(other, name))
        assert found.taken == plain.taken and found.taken[0].left_out and found.taken[0].cut
        assert found.lines()[:-1] == plain.lines() and "mapped into memory" in found.lines()[-1]
        plans = [BatchPlan(d.train, d.held_out, batch_size=8, per_example=False, steps=9, test=d.test) for d in (plain, found)]
        for step in (0, 8):
            for a, b in zip(*(plan.batch(step).values() for plan in plans), strict=True):
                np.testing.assert_array_equal(a, b)


def test_other_content_options_and_tokenizers_are_other_entries(made, lines, tmp_path, tokenizer, hub):
    made()
    assert made(max_length=11)[1] == made(eval_size=8)[1] == 1
    assert made()[1] == 0
    before = lines.stat()
    text = lines.read_text()
    lines.write_text(text.replace("good", "poor", 1) if "good" in text else text.replace("bad", "fine", 1))
    os.utime(lines, ns=(before.st_atime_ns, before.st_mtime_ns))  # neither size nor date need change
    assert made()[1] == 1
    changed = load_tokenizer(str(hub.llama))
    changed.add_special_tokens({"pad_token": "<unk>"})
    with mock.patch.object(preparing, "_make", side_effect=preparing._make) as make:
        prepare(task_section(**KEYS, source=str(lines)), changed, decoder=True, store=TokenFiles(tmp_path / "cache"))
    assert make.call_count == 1 and len(entries(tmp_path)) == 5


@pytest.mark.parametrize("what", ["cut", "flipped", "missing", "facts", "other"])
def test_a_damaged_entry_is_made_anew(made, tmp_path, what):
    first = arrays_digest([made()[0].train.targets])
    (entry,) = (tmp_path / "cache").iterdir()
    path = entry / "training.targets.numbers.npy"
    whole = bytearray(path.read_bytes())
    if what == "cut":
        path.write_bytes(whole[:-40])
    elif what == "flipped":
        whole[-3] ^= 4
        path.write_bytes(whole)
    elif what == "missing":
        path.unlink()
    elif what == "facts":
        (entry / "facts.json").write_text((entry / "facts.json").read_text()[:50])
    else:
        np.save(entry / "training.tokens.ends.npy", np.arange(3))
    with pytest.warns(InputWarning, match="are damaged"):
        again, tokenised = made()
    assert tokenised == 1 and arrays_digest([again.train.targets]) == first
    assert made()[1] == 0


def test_one_that_was_being_written_is_never_used(made, tmp_path):
    """Neither by another run, nor by the next one, which clears away what a process that is gone has left."""
    with pytest.raises(KeyboardInterrupt), TokenFiles(tmp_path / "cache").write("0" * 32) as writer:
        writer.add({"training.tokens": [np.arange(3, dtype=np.int32)]})
        raise KeyboardInterrupt
    assert entries(tmp_path) == []
    left = tmp_path / "cache" / f".{'0' * 32}.{socket.gethostname()}.{2**22 + 1}.part"
    left.mkdir()
    (left / "training.tokens.raw").write_bytes(b"1234")
    assert TokenFiles(tmp_path / "cache").open("0" * 32) is None
    assert made()[1] == 1 and not left.exists() and len(entries(tmp_path)) == 1


def test_files_that_used_longest_ago_make_room(made, tmp_path):
    made()
    (old,) = entries(tmp_path)
    os.utime(tmp_path / "cache" / old, (0, 0))
    with mock.patch("lora_jax.data.store._MOST_BYTES", 1):
        made(max_length=11)
    assert len(entries(tmp_path)) == 1 and entries(tmp_path) != [old]


def test_small_files_are_kept_where_the_config_says_so(made, tmp_path):
    assert made(token_cache="auto")[1] == made(token_cache="off")[1] == 1
    assert not (tmp_path / "cache").exists()
    with mock.patch.object(preparing, "KEPT_FROM", 10):
        assert isinstance(made(token_cache="auto")[0].train.tokens, Ragged)


def of_kinds(hub, folder):
    """Sections over CSV, JSON lines and Parquet, with columns renamed, rows dropped and sources mixed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "parts").mkdir()
    rows = [json.loads(line) for line in hub.questions.read_text().splitlines()]
    for name, part in (("a", rows[:35]), ("b", rows[35:])):
        (folder / "parts" / f"train-{name}.jsonl").write_text(
            "".join(json.dumps(row | {"kind": row["response"][:3]}) + "\n" for row in part)
        )
    pq.write_table(pa.table({"text": [row["prompt"] for row in rows], "n": range(60)}), folder / "rows.parquet")
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("q", "a"), *((row["prompt"] + "\nand", row["response"]) for row in rows)])
    pairs = {"prompt": "prompt", "response": "response"}
    written = {"source": str(folder / "pairs.csv"), "columns": {"q": "prompt", "a": "response"}}
    mixed = [{"source": str(hub.questions), "weight": 1.0}, written | {"weight": 2.0}]
    return {
        "csv": written | pairs,
        "folder": {"source": str(folder / "parts"), "drop": {"kind": ["red"]}, **pairs},
        "chats": {"source": str(hub.questions), "messages": "messages", "max_length": 64},
        "parquet": {"source": str(folder / "rows.parquet"), "text": "text"},
        "mixture": {"sources": mixed, **pairs},
    }


@pytest.mark.parametrize("which", ["csv", "folder", "chats", "parquet", "mixture"])
def test_rows_of_every_kind_are_read_in_pieces(made, hub, tmp_path, which):
    keys = {"text": None, "max_length": 24} | of_kinds(hub, tmp_path)[which]
    found, plain = (made(kept=kept, **keys)[0] for kept in (True, False))
    assert isinstance(found.train.tokens, Ragged) and found.taken == plain.taken and found.notes[:-1] == plain.notes
    for own, other in zip(found.parts, plain.parts, strict=True):
        assert arrays_digest([own.tokens, own.targets]) == arrays_digest([other.tokens, other.targets])


def test_a_column_in_a_file_is_the_list_that_it_was_given(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "AT_ONCE", 3)
    values = [
        "a",
        "",
        None,
        "\ud800 \u00e9\x00",
        [{"role": "user", "content": "x"}],
        {"n": [1, True, None]},
        2.5,
        files.WrittenNumber("1e3"),
        b"x",
    ]
    column = columns.FileColumn(tmp_path)
    column.extend(iter(values[:4]))
    column.extend(values[4:])
    assert list(column) == values == [column[i] for i in range(9)] and column[-1] == b"x" and column[2:4] == values[2:4]
    assert str(column[7]) == "1e3" and type(column[5]["n"][1]) is bool and not list(tmp_path.iterdir())
    with pytest.raises(IndexError):
        column[9]
    again = columns.chained([column, column])
    assert isinstance(again, columns.FileColumn) and list(again) == values * 2


def test_a_wrong_row_is_told_in_whatever_piece_it_is(made, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a film"}\n' * 25 + '{"text": 3.50}\n' + '{"txt": "a"}\n')
    for kept in (True, False):
        with pytest.raises(InputError, match="row 27 of .* has no 'text'"):
            made(kept=kept, source=str(tmp_path / "rows.jsonl"))
        with pytest.raises(InputError, match="no column 'texts'. Did you mean 'text'"):
            made(kept=kept, source=str(tmp_path / "rows.jsonl"), text="texts")
    assert not entries(tmp_path)


def test_what_cannot_be_kept_is_told(hub, tmp_path):
    result = call("train", hub.write(tmp_path, {"task.token_cache": "on"}))
    assert result.code == 2 and "task.token_cache: on, but the rows of task.kind 'classification' are more than tokens" in result.err


def test_arrays_one_after_the_other():
    arrays = [np.arange(n, dtype=np.int32) for n in (3, 1, 0, 5)]
    ragged = Ragged(np.concatenate(arrays), np.cumsum([3, 1, 0, 5]))
    assert [a.tolist() for a in ragged] == [a.tolist() for a in arrays] and ragged[-1].tolist() == [0, 1, 2, 3, 4]
    assert [a.tolist() for a in ragged[1:3]] == [[0], []] and largest(ragged) == largest([arrays[0], arrays[3]]) == 4
    for function in (lengths_of, lambda column: counts_of(column, 0)):
        np.testing.assert_array_equal(function(ragged), function(arrays))
    with pytest.raises(IndexError):
        ragged[4]


@pytest.mark.slow
def test_a_run_with_kept_tokens_has_the_bits_of_one_without(hub, tmp_path):
    (tmp_path / "runs").mkdir()
    results = []
    for kept in ("on", "off"):
        changes = {"task.token_cache": kept, "tracking.dir": str(tmp_path / kept), "training.steps": 3, "training.eval_every": 0}
        result = call("train", hub.write(tmp_path, changes, causal=True, name=f"run-{kept}"))
        assert result.code == 0, result
        (path,) = (tmp_path / kept).glob("run-*/*/results.json")
        results.append(json.loads(path.read_text())["final"])
    assert results[0] == results[1] and (tmp_path / "on" / ".token-cache").is_dir() and not (tmp_path / "off" / ".token-cache").exists()
