"""SQuAD's own rows through a real tokenizer: what the targets say is what the answers are. Needs `../shared/data/squad`."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from lora_jax.tasks.base import task_section
from lora_jax.tasks.prepare import prepare
from lora_jax.tasks.text_metrics import exact_match, f1
from lora_jax.weights.tokenizer import load_tokenizer
from tests.tasks.test_squad import official

SQUAD = Path(__file__).parents[3] / "shared" / "data" / "squad"

pytestmark = pytest.mark.skipif(not SQUAD.is_dir(), reason="needs ../shared/data/squad")


def test_targets_say_what_the_answers_are(minilm_source):
    columns = {"question": "question", "context": "context", "answers": "answers"}
    files = {"source": str(SQUAD / "train.jsonl.gz"), "eval_source": str(SQUAD / "validation.jsonl.gz"), "train_size": 8, "eval_size": 600}
    task = task_section(**({"kind": "question_answering", "max_length": 160, "stride": 48} | columns | files))
    held_out = prepare(task, load_tokenizer(minilm_source), decoder=False).held_out
    assert held_out.score is not None and len(held_out.tokens) > 900  # a third of the contexts are longer than a window
    logits = []
    for tokens, targets in zip(held_out.tokens, held_out.targets, strict=True):
        one = np.zeros((2, len(tokens)), np.float32)
        one[[0, 1], targets[:2]] = 1.0
        logits.append(one)
    scores = held_out.score(logits)
    # A few answers are parts of words, or longer than `max_answer`, or are cut by every window.
    assert scores["exact_match"] > 0.97 and scores["f1"] > 0.98
    assert held_out.score([np.zeros_like(one) for one in logits])["exact_match"] < 0.1


def test_the_official_script_gives_the_same_scores_on_all_validation_rows():
    """10,570 questions; what is given is a right answer, a piece of the context around it, or some other piece."""
    with gzip.open(SQUAD / "validation.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rng, given = np.random.default_rng(0), []
    for row in rows:
        context, texts, starts = row["context"], row["answers"]["text"], row["answers"]["answer_start"]
        one = int(rng.integers(len(texts)))
        wide = context[max(0, starts[one] - int(rng.integers(20))) : starts[one] + len(texts[one]) + int(rng.integers(20))]
        at = int(rng.integers(len(context)))
        given.append((texts[one], wide, context[at : at + 25])[int(rng.integers(3))])
    found = [(exact_match(g, row["answers"]["text"]), f1(g, row["answers"]["text"])) for g, row in zip(given, rows, strict=True)]
    ours = tuple(float(np.mean(one)) for one in zip(*found, strict=True))
    assert ours == pytest.approx(official(rows, given), abs=1e-12) and 0.3 < ours[0] < ours[1] < 0.9
