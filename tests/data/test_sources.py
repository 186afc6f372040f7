"""Rows come whole from every kind of file, without the network, and a bad file is one clear message."""

from __future__ import annotations

import bz2
import gzip
import json
import socket
from pathlib import Path

import pandas
import pytest
from datasets import Dataset

from lora_jax.data.files import as_text
from lora_jax.data.sources import HELD_OUT, ROW, check_tables, load_rows
from lora_jax.errors import InputError

TEXTS = ["a café", 'said "so", twice', "NA"]


def load(path: Path, columns: list[str] | None = None, **options):
    return load_rows(str(path), key="task.source", columns=columns or ["text"], **options)


def written(folder: Path, name: str) -> Path:
    """`TEXTS` in the format that `name` ends with."""
    path = folder / name
    plain = path.with_suffix("") if path.suffix in (".gz", ".bz2") else path
    quoted = ['"' + t.replace('"', '""') + '"' for t in TEXTS]
    if plain.suffix == ".parquet":
        Dataset.from_dict({"text": TEXTS}).to_parquet(str(plain))
        content = plain.read_bytes()
    else:
        content = {
            ".csv": "text,n\n" + "".join(f"{q},1\n" for q in quoted),
            ".tsv": "text\tn\n" + "".join(f"{q}\t1\n" for q in quoted),
            ".jsonl": "".join(json.dumps({"text": t}) + "\n" for t in TEXTS),
            ".json": json.dumps([{"text": t} for t in TEXTS]),
            ".txt": "".join(t + "\n" for t in TEXTS),
        }[plain.suffix].encode()
    pack = {".gz": gzip.compress, ".bz2": bz2.compress}.get(path.suffix, lambda b: b)
    path.write_bytes(pack(content))
    return path


@pytest.mark.parametrize("packed", ["", ".gz", ".bz2"])
@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind, packed):
    rows = load(written(tmp_path, f"rows{kind}{packed}"))
    assert rows["text"][:] == TEXTS
    assert rows[ROW][:] == [1, 2, 3]


@pytest.mark.parametrize("name", ["rows.csv", "rows.txt", "rows.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_rows(tmp_path, name):
    path = written(tmp_path, name)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(path)["text"][:] == TEXTS


def test_local_files_are_read_without_the_network(tmp_path, monkeypatch):
    def refuse(*where, **_):
        asked.append(where)
        raise OSError("no network")

    asked: list[tuple] = []
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    load(written(tmp_path, "rows.csv"))
    assert asked == []


def test_a_file_that_changed_is_read_anew_and_nothing_is_left_behind(tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(f"datasets.config.{name}", work / name)
    path = tmp_path / "rows.csv"
    path.write_text("text\nold\n")
    assert load(path)["text"][:] == ["old"]
    path.write_text("text\nnew\n")
    assert load(path)["text"][:] == ["new"]
    assert list(work.iterdir()) == []


def test_dropped_rows_are_gone_and_the_others_keep_their_numbers(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,kind,n\na,plot,1\nb,review,2\nc,review,3\nd,review,1\n")
    rows = load(path, drop={"kind": ["plot"], "n": ["3"]})  # numbers compare as text
    assert rows["text"][:] == ["b", "d"]
    assert rows[ROW][:] == [2, 4]


def test_the_film_reviews(reviews_source):
    rows = load_rows(reviews_source, key="task.source", columns=["text", "category"], drop={"category": ["plot"]})
    categories = rows["category"][:]
    assert (len(categories), categories.count("fresh"), categories.count("rotten")) == (12808, 7403, 5405)
    assert any("’" in t for t in rows["text"][:])


def test_a_folder_is_read_file_by_file(tmp_path):
    (tmp_path / "a.csv").write_text("text\nx\n")
    (tmp_path / "b.csv").write_text("text\ny\n")
    (tmp_path / "notes.md").write_text("no data")
    assert load(tmp_path)["text"][:] == ["x", "y"]


def test_a_folder_gives_the_split_asked_for_and_never_test_rows_to_train_on(tmp_path):
    for name in ("train-00.csv", "train-01.csv", "test.csv"):
        (tmp_path / name).write_text(f"text\n{name}\n")
    assert load(tmp_path)["text"][:] == ["train-00.csv", "train-01.csv"]
    assert load(tmp_path, splits=HELD_OUT)["text"][:] == ["test.csv"]
    for name in ("train-00.csv", "train-01.csv"):
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match="no train file, only test.csv"):
        load(tmp_path)


def test_what_looks_like_a_date_or_a_number_is_text_as_it_is_written(tmp_path):
    written = ["2024-03-10", "01", "1.0", "1e3", "NaN", "true", ""]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{w},x\n" for w in written))
    assert load(tmp_path / "a.csv")["text"] == written
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": w}) + "\n" for w in written))
    assert load(tmp_path / "a.jsonl")["text"] == written
    (tmp_path / "b.jsonl").write_text('{"text": 1.0}\n{"text": 1e3}\n{"text": 7}\n{"text": true}\n')
    assert [as_text(v) for v in load(tmp_path / "b.jsonl")["text"]] == ["1.0", "1e3", "7", "true"]


def test_a_type_that_changes_far_into_a_file_changes_nothing(tmp_path):
    count = 11_000
    (tmp_path / "a.csv").write_text("text,n\n" + "".join(f"t{i},{i if i < 10_500 else 'other'}\n" for i in range(count)))
    assert load(tmp_path / "a.csv", ["n"])["n"][-1] == "other"
    rows = ({"text": "w" * 1000, "n": i if i < 10_900 else {"a": 1}} for i in range(count))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load(tmp_path / "a.jsonl").num_rows == count


def test_quotation_marks_in_a_tsv_file_are_text_unless_they_quote_a_whole_field(tmp_path):
    texts = ["plain", '"So it goes, he said', '"So it goes" was cut here', 'a "b" c', '"', '""']
    lines = [*texts, '"a ""quoted"" field"']
    (tmp_path / "a.tsv").write_text("text\tn\n" + "".join(f"{line}\t1\n" for line in lines))
    assert load(tmp_path / "a.tsv")["text"] == [*texts[:-1], "", 'a "quoted" field']


def test_parquet_columns_have_the_types_the_file_says(tmp_path):
    frame = pandas.DataFrame({"text": ["a", "b", "c", "d"], "n": [1, 2, 3, 4], "raw": [b"caf\xc3\xa9", b"\xff", b"x", b"y"]})
    frame["day"] = pandas.to_datetime(["2024-03-10"] * 4)
    frame[frame.n != 2].to_parquet(tmp_path / "a.parquet")  # pandas keeps the index of the rows that are left as a column
    rows = load(tmp_path / "a.parquet", ["text", "n", "raw", "day"])
    assert rows["text"] == ["a", "c", "d"]
    assert rows["n"] == [1, 3, 4]
    assert as_text(rows["raw"][0]) == "café"
    assert as_text(b"\xff") is None
    assert rows["day"][0].startswith("2024-03-10")


def test_numbers_have_the_digits_of_their_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": {n}}}\n' for n in ("NaN", "-Infinity", "1E5", "-0.0", "36893488147419103232")))
    assert [as_text(v) for v in load(tmp_path / "a.jsonl")["text"]] == ["NaN", "-Infinity", "1E5", "-0.0", "36893488147419103232"]
    pandas.DataFrame({"text": pandas.array([0.1, 2.0, None], dtype="Float32")}).to_parquet(tmp_path / "a.parquet")
    assert [as_text(v) for v in load(tmp_path / "a.parquet")["text"]] == ["0.1", "2.0", None]


def test_a_column_or_a_key_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,n,text\na,1,b\n")
    with pytest.raises(InputError, match="two columns are called 'text'"):
        load(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "text": "b"}\n')
    with pytest.raises(InputError, match="line 1 .*'text' stands there twice"):
        load(tmp_path / "a.jsonl")


def test_what_was_dropped_is_counted(tmp_path):
    (tmp_path / "a.csv").write_text("text,kind\na,1\nb,01\nc,1\n")
    rows = load(tmp_path / "a.csv", drop={"kind": ["1", "plot"]})
    assert rows["text"] == ["b"]  # 01 is not 1
    assert rows.dropped == {("kind", "1"): 2}


def test_a_local_folder_is_not_taken_for_a_hub_data_set(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="the local folder 'org/name' hides"):
        load_rows("hf://org/name", key="task.source", columns=["text"])


@pytest.mark.parametrize(("there", "said"), [("train", True), ("validation", False)])
def test_a_hub_data_set_without_a_held_out_split_is_said_to_have_none(monkeypatch, there, said):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda name, revision: {there: Dataset.from_dict({"text": ["a", "b"]})})
    rows = load_rows("hf://org/name", key="task.eval_source", columns=["text"], splits=HELD_OUT)
    assert rows.files == (f"hf://org/name, {there}",) and rows["text"] == ["a", "b"]
    assert (rows.note == "task.eval_source: hf://org/name has no validation split; 'train' was taken.") == said and bool(rows.note) == said
    if said:  # what is trained on is no held-out split
        with pytest.raises(InputError, match="which is trained on"):
            check_tables({"task.source": load_rows("hf://org/name", key="task.source", columns=["text"]), "task.eval_source": rows}, {})


BAD = {
    "unknown suffix": ("rows.xml", b"<a/>", "task.source: rows.xml: cannot tell what kind.*Known: .csv"),
    "empty": ("rows.csv", b"", "task.source: .*rows.csv is empty"),
    "empty inside": ("rows.csv.gz", gzip.compress(b""), "is empty"),
    "only a header": ("rows.csv", b"text,label\n", "rows.csv has no rows"),
    "only blank lines": ("rows.csv", b"\n\n", "has no columns"),
    "not UTF-8": ("rows.csv", "text\ncafé\n".encode("latin-1"), "cannot read .*rows.csv as csv: 'utf-8' codec can't decode"),
    "text not UTF-8": ("rows.txt", "café\n".encode("latin-1"), "cannot read .*rows.txt as txt: 'utf-8' codec can't decode"),
    "a field too many": ("rows.csv", b"text,n\na,1\nb,2,3\n", "line 3 has 3 fields, and the header names 2"),
    "a field too many in all": ("rows.csv", b"text,n\na,1,2\nb,2,3\n", "line 2 has 3 fields"),
    "an open quote": ("rows.csv", b'text,n\n"a,1\n', "row at line 2 is broken"),
    "broken JSON": ("rows.jsonl", b'{"text": "a"}\n{"text": \n', "rows.jsonl: line 2 is not JSON"),
    "not parquet": ("rows.parquet", b"junk", "cannot read .*as parquet"),
    "not gzip": ("rows.csv.gz", b"junk", "Not a gzipped file"),
    "cut short": ("rows.csv.bz2", bz2.compress(b"text\n" + b"a b c\n" * 99)[:-8], "cannot read .*rows.csv.bz2 as csv"),
    "missing column": ("rows.csv", b"txt,label\na,b\n", "no column 'text'. Did you mean 'txt'\\? Columns: txt, label"),
}


@pytest.mark.parametrize("name, content, message", BAD.values(), ids=BAD)
def test_a_bad_file_is_one_message(tmp_path, capfd, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # nor do the libraries below say it a second time


def test_dropping_every_row_or_by_a_column_that_is_not_there(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,kind\na,plot\n")
    with pytest.raises(InputError, match="task.drop: drops every row"):
        load(path, drop={"kind": ["plot"]})
    with pytest.raises(InputError, match="task.drop: .*no column 'knd'. Did you mean 'kind'"):
        load(path, drop={"knd": ["plot"]})


def test_folders_that_will_not_do(tmp_path):
    with pytest.raises(InputError, match="holds no data file"):
        load(tmp_path)
    (tmp_path / "a.csv").write_text("text,n\nx,1\n")
    (tmp_path / "b.csv").write_text("txt,n\ny,one\n")
    with pytest.raises(InputError, match="differ in their columns"):
        load(tmp_path)
    (tmp_path / "b.csv").rename(tmp_path / "b.txt")
    with pytest.raises(InputError, match="several kinds"):
        load(tmp_path)


def test_sources_that_are_not_there(tmp_path):
    (tmp_path / "rows.csv").write_text("text\na\n")
    with pytest.raises(InputError, match="task.source: no file or folder .*nearby: rows.csv"):
        load(tmp_path / "row.csv")
    with pytest.raises(InputError, match="is not hf://org/name"):
        load_rows("hf://nothing", key="task.source", columns=["text"])
