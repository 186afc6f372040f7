"""Of a conversation, what the assistant said and the token that ends it are learned, and nothing else."""

from __future__ import annotations

import copy

import pytest

from lora_jax.errors import InputError
from lora_jax.tasks.causal_lm import encode_chat
from lora_jax.weights.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def smol(smollm2_source):
    return load_tokenizer(smollm2_source)


def said(*turns: str) -> list[dict]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]


def learned(messages, tokenizer) -> list[str]:
    """The stretches that are learned, as text."""
    ids, wanted = encode_chat(messages, tokenizer, 7)
    assert len(ids) == len(wanted)
    stretches: list[list[int]] = []
    for i, (token, want) in enumerate(zip(ids, wanted, strict=True)):
        if want:
            if i == 0 or not wanted[i - 1]:
                stretches.append([])
            stretches[-1].append(token)
    return [tokenizer.decode(s) for s in stretches]


def test_every_turn_of_the_assistant_with_its_end(smol):
    messages = said("hi", "hello there", "and?", "done")
    assert learned(messages, smol) == ["hello there<|im_end|>", "done<|im_end|>"]
    ids, _ = encode_chat(messages, smol, 1)
    assert ids == smol.apply_chat_template(messages, tokenize=True, return_dict=False)


def test_words_that_also_stand_in_the_question(smol):
    assert learned(said("yes", "yes", "yes yes", "yes"), smol) == ["yes<|im_end|>", "yes<|im_end|>"]


def test_text_of_many_bytes_a_letter(smol):
    assert learned(said("grüße", "日本 🙂 naïve"), smol) == ["日本 🙂 naïve<|im_end|>"]


def test_a_system_message_and_an_unanswered_question_are_not_learned(smol):
    messages = [{"role": "system", "content": "Be brief."}, *said("hi", "hello", "and?")]
    assert learned(messages, smol) == ["hello<|im_end|>"]
    assert learned(said("hi"), smol) == []


def test_a_conversation_that_the_assistant_opens(smol):
    assert learned([{"role": "assistant", "content": "hello"}], smol) == ["hello<|im_end|>"]


def changed(smol, template: str | None):
    tokenizer = copy.deepcopy(smol)
    tokenizer.chat_template = template
    return tokenizer


def test_bad_rows_and_templates(smol):
    for messages in ("hi", [], [{"role": "user"}], ["hi"]):
        with pytest.raises(InputError, match="task.messages: row 7 is not a list of messages"):
            encode_chat(messages, smol, 7)
    with pytest.raises(InputError, match="task.messages: .*no chat template; use 'prompt' and 'response'"):
        encode_chat(said("hi", "hello"), changed(smol, None), 7)
    with pytest.raises(InputError, match="the chat template refuses row 7: users only"):
        encode_chat(said("hi", "hello"), changed(smol, "{{ raise_exception('users only') }}"), 7)
    rewriting = "{% for m in messages %}[{{ m.content if loop.last else '...' }}]{% endfor %}"
    with pytest.raises(InputError, match="rewrites earlier messages"):
        encode_chat(said("hi", "hello", "and?", "done"), changed(smol, rewriting), 7)
