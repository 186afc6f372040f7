"""Text becomes tokens and, where something is to be predicted, targets; rows that will not do are named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_jax.data.batching import NO_TARGET
from lora_jax.errors import InputError, InputWarning
from lora_jax.tasks.base import TaskData, task_section
from lora_jax.tasks.prepare import prepare
from lora_jax.weights.tokenizer import load_tokenizer

WORDS = ["<unk>", "[CLS]", "[SEP]", "<s>", "</s>", "good", "bad", "fine", "a", "b", "c", "d", "Review", "Answer", ":", *map(str, range(30))]
UNK, CLS, SEP, BOS, EOS = range(5)
REVIEWS = [{"text": f"a {i} b", "label": "good" if i % 2 else "bad"} for i in range(6)]
PAIRS = [{"q": f"a {i} :", "r": f"b c {i}"} for i in range(6)]


def tokenizer(*, start: list[str] | None = None, end: list[str] | None = None, metaspace: bool = False) -> PreTrainedTokenizerFast:
    """A token a word, with `start` and `end` put around each text."""
    vocabulary = WORDS if not metaspace else [*WORDS[:5], "▁", *(f"▁{w}" for w in WORDS[5:]), ":"]
    built = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always") if metaspace else pre_tokenizers.Whitespace()
    around = [*(start or []), "$A", *(end or [])]
    special = [(w, WORDS.index(w)) for w in (*(start or []), *(end or []))]
    if special:
        built.post_processor = processors.TemplateProcessing(single=" ".join(around), special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


BERT = tokenizer(start=["[CLS]"], end=["[SEP]"])
GPT = tokenizer()


def rows_at(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def task(tmp_path):
    """`task(rows, tokenizer, decoder=..., **config)`: the data of a task with those rows, two of them held out."""

    def made(
        rows: list[dict], tok=GPT, *, decoder: bool = True, held: list[dict] | None = None, test: list[dict] | None = None, **config
    ) -> TaskData:
        config = {"eval_size": 2, "source": rows_at(tmp_path / "rows.jsonl", rows)} | config
        if held is not None:
            config["eval_source"] = rows_at(tmp_path / "held.jsonl", held)
        if test is not None:
            config["test_source"] = rows_at(tmp_path / "test.jsonl", test)
        return prepare(task_section(**config), tok, decoder=decoder)

    return made


CLASSES = {"kind": "classification", "text": "text", "label": "label"}
REPLIES = {"kind": "causal_lm", "prompt": "q", "response": "r"}


def everything(data: TaskData) -> list[tuple[list[int], list[int]]]:
    """(tokens, targets) of all examples, sorted."""
    parts = (data.train, data.held_out)
    return sorted((t.tolist(), y.tolist()) for p in parts for t, y in zip(p.tokens, p.targets, strict=True))


def ids(text: str) -> list[int]:
    return [WORDS.index(w) for w in text.split()]


def test_an_encoder_predicts_the_class_at_its_first_token(task):
    data = task(REVIEWS, BERT, decoder=False, **CLASSES)
    assert data.classes == ("bad", "good") and data.class_token_ids is None and data.per_example
    assert everything(data) == sorted(([CLS, *ids(f"a {i} b"), SEP], [i % 2, *[NO_TARGET] * 4]) for i in range(6))
    assert (len(data.train.tokens), len(data.held_out.tokens)) == (4, 2)
    assert all(a.dtype == np.int32 for a in (*data.train.tokens, *data.train.targets))
    assert data.train.lengths.tolist() == [5] * 4 and data.train.target_counts.tolist() == [1] * 4


def test_an_encoder_keeps_its_special_tokens_when_it_cuts(task):
    data = task(REVIEWS, BERT, decoder=False, max_length=4, **CLASSES)
    assert everything(data) == sorted(([CLS, *ids(f"a {i}"), SEP], [i % 2, *[NO_TARGET] * 3]) for i in range(6))
    with pytest.raises(InputError, match="task.max_length: 2 leaves no room"):
        task(REVIEWS, BERT, decoder=False, max_length=2, **CLASSES)


def test_a_decoder_predicts_the_class_at_the_end_of_its_prompt(task):
    data = task(REVIEWS, template="Review : {text} Answer :", labels=["good", "bad"], **CLASSES)
    assert data.classes == ("good", "bad") and data.class_token_ids.tolist() == ids("good bad")
    assert data.class_token_ids.dtype == np.int32
    expected = [(ids(f"Review : a {i} b Answer :"), [*[NO_TARGET] * 6, 1 - i % 2]) for i in range(6)]
    assert everything(data) == sorted(expected)


def test_a_long_text_is_cut_and_its_template_is_not(task):
    data = task(REVIEWS, template="Review : {text} Answer :", max_length=5, **CLASSES)
    assert everything(data) == [(ids("Review : a Answer :"), [*[NO_TARGET] * 4, k]) for k in (0, 0, 0, 1, 1, 1)]
    with pytest.raises(InputError, match="task.max_length: 4 leaves no room for text beside the template's 4 tokens"):
        task(REVIEWS, template="Review : {text} Answer :", max_length=4, **CLASSES)


def test_label_words_stand_for_the_classes(task):
    assert task(REVIEWS, label_words=["c", "d"], **CLASSES).class_token_ids.tolist() == ids("c d")
    with pytest.raises(InputError, match="task.label_words: 'fine b' and 'fine a' begin with the same token"):
        task(REVIEWS, label_words=["fine a", "fine b"], **CLASSES)
    with pytest.raises(InputError, match="task.label_words: 3 words for 2 classes \\(bad, good\\)"):
        task(REVIEWS, label_words=["a", "b", "c"], **CLASSES)
    with pytest.raises(InputError, match="the word of class 'good' is empty"):
        task(REVIEWS, label_words=["a", " "], **CLASSES)


def test_label_words_of_a_tokenizer_that_puts_a_space_before_every_text(task):
    # Alone, " good" would begin with the token of a bare space here, and so would " bad".
    tok = tokenizer(metaspace=True)
    words = task(REVIEWS, tok, template="{text} Answer", **CLASSES).class_token_ids
    assert tok.convert_ids_to_tokens(words.tolist()) == ["▁bad", "▁good"]


def test_classes_that_are_numbers_are_in_the_order_of_numbers(task):
    data = task([{"text": f"a {i}", "label": i} for i in range(12)], BERT, decoder=False, **CLASSES)
    assert data.classes == tuple(map(str, range(12)))


def test_text_predicts_every_next_token_and_its_end(task):
    data = task([{"text": f"a {i} b"} for i in range(4)], kind="causal_lm", text="text")
    assert data.classes is None and not data.per_example
    assert everything(data) == sorted(([*ids(f"a {i} b"), EOS], [*ids(f"{i} b"), EOS, NO_TARGET]) for i in range(4))


def test_text_is_cut(task):
    data = task([{"text": f"a {i} b c"} for i in range(4)], kind="causal_lm", text="text", max_length=3)
    assert everything(data) == sorted((ids(f"a {i} b"), [*ids(f"{i} b"), NO_TARGET]) for i in range(4))


def test_only_the_response_is_learned(task):
    data = task(PAIRS, **REPLIES)
    expected = [([*ids(f"a {i} : b c {i}"), EOS], [NO_TARGET, NO_TARGET, *ids(f"b c {i}"), EOS, NO_TARGET]) for i in range(6)]
    assert everything(data) == sorted(expected)


def test_a_decoder_starts_as_its_tokenizer_does(task):
    starting = tokenizer(start=["<s>"])
    assert all(t[0] == BOS and t[1] != BOS for t, _ in everything(task(PAIRS, starting, **REPLIES)))
    assert all(t[0] == BOS and y[0] == WORDS.index("a") for t, y in everything(task(REVIEWS, starting, kind="causal_lm", text="text")))
    assert all(t[0] == BOS and y[0] == NO_TARGET for t, y in everything(task(REVIEWS, starting, **CLASSES)))
    # ... and one that ends texts by itself does not get a second end.
    assert everything(task(PAIRS, tokenizer(end=["</s>"]), **REPLIES)) == everything(task(PAIRS, **REPLIES))


def test_rows_with_nothing_to_learn_are_left_out_and_counted(task):
    long = [{"q": "a " * 9, "r": "b"}, {"q": "c " * 9, "r": "b"}]
    data = task([*PAIRS, *long], max_length=8, **REPLIES)
    assert data.dropped == 2 and len(everything(data)) == 6
    assert task(PAIRS, **REPLIES).dropped == 0
    blank = task([{"text": ""}, {"text": "a"}, {"text": "b"}, {"text": "c"}], kind="causal_lm", text="text", eval_size=1)
    assert blank.dropped == 1
    with pytest.raises(InputError, match="task.source: no example has anything to predict within task.max_length = 2"):
        task(PAIRS, max_length=2, **REPLIES)


def test_held_out_rows_come_from_their_own_file(task):
    held = [{"text": "c", "label": "good"}, {"text": "d", "label": "bad"}, {"text": "fine", "label": "bad"}]
    data = task(REVIEWS, BERT, decoder=False, held=held, eval_size=500, **CLASSES)
    assert sorted(t[1] for t in data.held_out.tokens) == sorted(ids("c d fine"))
    assert len(data.train.tokens) == 6
    assert len(task(REVIEWS, BERT, decoder=False, held=held, **CLASSES).held_out.tokens) == 2


def test_a_folder_gives_its_test_file_to_the_evaluation_alone(tmp_path):
    rows_at(tmp_path / "train.jsonl", REVIEWS)
    rows_at(tmp_path / "test.jsonl", [{"text": "c c", "label": "good"}, {"text": "d d", "label": "bad"}])
    data = prepare(task_section(source=str(tmp_path), eval_source=str(tmp_path), **CLASSES), BERT, decoder=False)
    assert {int(t[1]) for t in data.train.tokens} == set(ids("a"))
    assert {int(t[1]) for t in data.held_out.tokens} == set(ids("c d"))


def test_the_same_text_is_never_trained_on_and_held_out(task):
    rows = [{"text": f"a {i // 2}", "label": "good" if i % 2 else "bad"} for i in range(24)]
    data = task(rows, BERT, decoder=False, eval_size=8, **CLASSES)
    train, held = ({tuple(t.tolist()) for t in p.tokens} for p in (data.train, data.held_out))
    assert held and not train & held


def test_the_split_seed_decides(task):
    def held(seed: int) -> list[list[int]]:
        return [t.tolist() for t in task(PAIRS, split_seed=seed, **REPLIES).held_out.tokens]

    assert held(1) == held(1)
    assert len({str(held(s)) for s in range(5)}) > 1


BAD = {
    "a label that is no class": ({"label": "goood"}, {"labels": ["good", "bad"]}, "row 4 of .*has the label 'goood'. Did you mean 'good'"),
    "no label": ({"label": None}, {}, "task.source: row 4 of .*rows.jsonl has no 'label'"),
    "an empty label": ({"label": ""}, {}, "row 4 of .* has no 'label'"),
    "no text": ({"text": None}, {}, "row 4 of .* has no 'text'"),
}


@pytest.mark.parametrize("change, config, message", BAD.values(), ids=BAD)
def test_a_bad_row_is_named_by_its_place_in_the_file(task, change, config, message):
    rows = [{**r, "kind": "plot" if i == 0 else "review"} for i, r in enumerate(REVIEWS)]
    rows[3] |= change
    with pytest.raises(InputError, match=message):
        task(rows, BERT, decoder=False, drop={"kind": ["plot"]}, **CLASSES, **config)


def test_columns_and_classes_that_will_not_do(task):
    with pytest.raises(InputError, match="no column 'txt'. Did you mean 'text'"):
        task(REVIEWS, BERT, decoder=False, **CLASSES | {"text": "txt"})
    with pytest.raises(InputError, match="row 1 of .*'text' is a list, not a text"):
        task([{**r, "text": [r["text"]]} for r in REVIEWS], BERT, decoder=False, **CLASSES)
    with pytest.raises(InputError, match="task.label: the column 'label' has one value only \\(good\\)"):
        task([{**r, "label": "good"} for r in REVIEWS], BERT, decoder=False, **CLASSES)
    with pytest.raises(InputError, match="task.labels: a class is named twice"):
        task(REVIEWS, BERT, decoder=False, labels=["good", "bad", "good"], **CLASSES)
    with pytest.raises(InputError, match="row 1 of .*held.jsonl has the label 'odd'"):
        task(REVIEWS, BERT, decoder=False, held=[{"text": "c", "label": "odd"}], **CLASSES)
    with pytest.raises(InputError, match="task.eval_size: 6 of 6 rows leaves no row"):
        task(REVIEWS, BERT, decoder=False, **CLASSES | {"eval_size": 6})


def test_real_label_words(smollm2_source, tmp_path):
    source = rows_at(tmp_path / "rows.jsonl", REVIEWS)
    smol = load_tokenizer(smollm2_source)
    task = task_section(source=source, eval_size=2, label_words=["negative", "positive"], **CLASSES)
    data = prepare(task, smol, decoder=True)
    assert smol.convert_ids_to_tokens(data.class_token_ids.tolist()) == ["Ġnegative", "Ġpositive"]
    assert smol.decode(data.train.tokens[0]).endswith("b\nAnswer:")


def test_tokens_that_a_text_bears_are_not_doubled(task):
    tok = tokenizer(start=["<s>"])
    tok.backend_tokenizer.add_special_tokens(["<s>", "</s>"])
    once = [BOS, *ids("a b"), EOS]
    rows = [{"text": "<s>a b</s>"}, {"text": "a b"}, {"text": "<s>a b</s>\n"}, {"text": "c"}]
    found = [t for t, _ in everything(task(rows, tok, kind="causal_lm", text="text", eval_size=1))]
    assert found.count(once) == 3
    pairs = [{"q": "<s>a", "r": "b</s>"}, {"q": "a", "r": "b"}, {"q": "c", "r": "d"}]
    found = [t for t, _ in everything(task(pairs, tok, eval_size=1, **REPLIES))]
    assert found.count([BOS, *ids("a b"), EOS]) == 2


def test_what_is_left_out_and_cut_is_counted_and_said(task):
    rows = [{"q": "a " * (20 if i % 2 else 2), "r": "b " * (20 if i % 4 == 0 else 1) + str(i)} for i in range(16)]
    data = task(rows, max_length=8, eval_size=4, **REPLIES)
    left_out, cut, ends = (sum(getattr(part, name) for part in data.taken) for name in ("left_out", "cut", "ends_cut"))
    assert (left_out, cut, ends, data.dropped) == (8, 4, 4, 8)
    text = "\n".join(data.lines())
    assert "left out (nothing to predict within task.max_length = 8 tokens)" in text and "without their end" in text
    assert "held-out: 4 of 16 rows" in text and "sampled" in text


def test_texts_that_an_encoder_cuts_are_counted(task):
    assert sum(part.cut for part in task(REVIEWS, BERT, decoder=False, max_length=4, **CLASSES).taken) == 6
    assert sum(part.cut for part in task(REVIEWS, BERT, decoder=False, max_length=5, **CLASSES).taken) == 0
    cut = task(REVIEWS, template="Review : {text} Answer :", max_length=5, **CLASSES)
    assert sum(part.cut for part in cut.taken) == 6


def test_values_to_drop_that_are_in_no_row(task):
    rows = [{**r, "kind": "plot" if i == 0 else "review"} for i, r in enumerate(REVIEWS)]
    with pytest.raises(InputError, match="task.drop: no row has 'plots' in the column 'kind'. Did you mean 'plot'"):
        task(rows, BERT, decoder=False, drop={"kind": ["plots"]}, **CLASSES)
    data = task(rows, BERT, decoder=False, drop={"kind": ["plot"]}, **CLASSES)
    assert data.taken[0].dropped == {("kind", "plot"): 1} and "1 more dropped (kind: plot)" in data.lines()[0]
    held = [{"text": "c", "label": "good", "kind": "other"}]  # in one of the two is enough
    assert task(rows, BERT, decoder=False, drop={"kind": ["other", "plot"]}, held=[*held, rows[2]], **CLASSES).taken[1].dropped


def test_a_held_out_source_that_is_trained_on(task, tmp_path):
    with pytest.raises(InputError, match="task.eval_source: .*rows.jsonl is also in task.source"):
        task(REVIEWS, BERT, decoder=False, eval_source=str(tmp_path / "." / "rows.jsonl"), **CLASSES)
    data = task(REVIEWS, BERT, decoder=False, held=[REVIEWS[0], {"text": "c", "label": "bad"}], **CLASSES | {"eval_size": "all"})
    assert data.taken[1].others == 1 and data.lines()[1].startswith("held-out: all 2 rows")
    with pytest.raises(ValueError, match="needs 'eval_source'"):
        task(REVIEWS, BERT, decoder=False, **CLASSES | {"eval_size": "all"})


def test_labels_are_read_as_they_are_written(task):
    rows = [{"text": f"a {i}", "label": ("01", "1", "2", "10")[i % 4]} for i in range(8)]
    assert task(rows, BERT, decoder=False, **CLASSES).classes == ("01", "1", "2", "10")
    rows = [{"text": f"a {i}", "label": i % 2 == 0} for i in range(8)]
    assert task(rows, BERT, decoder=False, **CLASSES).classes == ("false", "true")


def test_labels_that_differ_in_spaces_or_case_alone_are_said(task):
    rows = [{"text": f"a {i}", "label": ("yes", "no", "no ")[i % 3]} for i in range(9)]
    with pytest.warns(InputWarning, match=r"has the classes 'no' and 'no ', which differ in spaces or case alone"):
        assert task(rows, BERT, decoder=False, **CLASSES).classes == ("no", "no ", "yes")


@pytest.mark.parametrize("column", ["text", "messages"])
def test_half_of_a_character_in_a_row_is_named(task, column):
    value = "a \ud83d" if column == "text" else [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\ud83d"}]
    rows = [{column: value}] * 4
    with pytest.raises(InputError, match=rf"task.source: row 1 of .*rows.jsonl: '{column}': holds '\\ud83d' at character"):
        task(rows, kind="causal_lm", **{column: column})


def test_a_tokenizer_without_an_end_is_said(task):
    bare = PreTrainedTokenizerFast(tokenizer_object=GPT.backend_tokenizer, unk_token="<unk>")
    assert any("no EOS token" in line for line in task(PAIRS, bare, **REPLIES).lines())
    assert not any("EOS" in line for line in task(PAIRS, GPT, **REPLIES).lines())


def test_the_date_of_a_template_is_the_config_s(task):
    tok = tokenizer()
    tok.chat_template = "{{ strftime_now('%d') }} {% for m in messages %}{{ m.content }} {% endfor %}"
    rows = [{"m": [{"role": "user", "content": f"a {i}"}, {"role": "assistant", "content": "b"}]} for i in range(4)]
    chats = {"kind": "causal_lm", "messages": "m", "eval_size": 1}
    for config, day in (({}, 26), ({"date": "2025-01-11"}, 11)):
        data = task(rows, tok, **chats, **config)
        assert {t[0] for t, _ in everything(data)} == {WORDS.index(str(day))}
        assert any("task.date" in line for line in data.lines())
    with pytest.raises(ValueError, match="must be a day such as"):
        task(rows, tok, **chats, date="today")


def texts_of(examples) -> set[tuple[int, ...]]:
    return {tuple(t.tolist()) for t in examples.tokens}


def test_test_rows_of_the_same_source(task):
    rows = [{"text": f"a {i} b", "label": "good" if i % 2 else "bad"} for i in range(12)]
    plain = task(rows, BERT, decoder=False, **CLASSES)
    data = task(rows, BERT, decoder=False, test_size=3, **CLASSES)
    assert plain.test is None and len(plain.parts) == len(plain.taken) == 2
    assert [len(p.tokens) for p in data.parts] == [7, 2, 3] and len(set.union(*map(texts_of, data.parts))) == 12
    assert texts_of(data.held_out) == texts_of(plain.held_out) and texts_of(data.train) < texts_of(plain.train)
    assert [line.split(" of ")[0] for line in data.lines()] == ["training: 7", "held-out: 2", "test: 3"]
    assert data.lines()[0].endswith("rows.jsonl") and data.lines()[2].endswith(", sampled")
    with pytest.raises(InputError, match="task.test_size: 10 of 12 rows, of which 2 are held out, leaves no row"):
        task(rows, BERT, decoder=False, test_size=10, **CLASSES)


def test_test_rows_of_a_file_of_their_own(task):
    rows = [{"text": f"a {i} b", "label": "good" if i % 2 else "bad"} for i in range(12)]
    held, test = ([{"text": f"{word} {i}", "label": "good"} for i in range(4)] for word in "bc")
    data = task(rows, BERT, decoder=False, held=held, eval_size="all", test=[*test, rows[0], held[1]], **CLASSES)
    assert [len(p.tokens) for p in data.parts] == [12, 4, 6]
    assert data.lines()[2].endswith("test.jsonl; 2 are among the training or held-out rows too")
    assert [len(p.tokens) for p in task(rows, BERT, decoder=False, test=test, test_size=3, **CLASSES).parts] == [10, 2, 3]
    # Held-out rows of their file, test rows of the source.
    both = task(rows, BERT, decoder=False, held=held, eval_size=3, test_size=5, **CLASSES)
    assert [len(p.tokens) for p in both.parts] == [7, 3, 5] and len(texts_of(both.train) | texts_of(both.test)) == 12
    with pytest.raises(InputError, match="task.labels: row 1 of .*test.jsonl has the label 'fine'"):
        task(rows, BERT, decoder=False, test=[{"text": "a", "label": "fine"}], **CLASSES)


def test_a_test_source_that_was_chosen_or_trained_by_is_refused(task, tmp_path):
    rows = [{"text": f"a {i} b", "label": "good" if i % 2 else "bad"} for i in range(12)]
    with pytest.raises(InputError, match="task.test_source: .*rows.jsonl is also in task.source, which is trained on"):
        task(rows, BERT, decoder=False, test_source=str(tmp_path / "rows.jsonl"), **CLASSES)
    with pytest.raises(InputError, match="task.test_source: .*held.jsonl is also in task.eval_source, by which rates and steps are chosen"):
        task(rows, BERT, decoder=False, held=rows[:4], test_source=str(tmp_path / "held.jsonl"), **CLASSES)
    with pytest.raises(ValueError, match="'test_size: all' needs 'test_source'"):
        task(rows, BERT, decoder=False, test_size="all", **CLASSES)
