"""Of a conversation, what the assistant said and the token that ends it are learned, and nothing else."""

from __future__ import annotations

import copy

import pytest

from lora_jax.data import tokens as module
from lora_jax.data.tokens import encode_chat
from lora_jax.errors import InputError
from lora_jax.weights.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def smol(smollm2_source):
    return load_tokenizer(smollm2_source)


def said(*turns: str) -> list[dict]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]


def learned(messages, tokenizer) -> list[str]:
    """The stretches that are learned, as text."""
    ids, wanted, _ = encode_chat(messages, tokenizer, 7)
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
    ids, *_ = encode_chat(messages, smol, 1)
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
    with pytest.raises(InputError, match="task.messages: .*no chat template; give texts"):
        encode_chat(said("hi", "hello"), changed(smol, None), 7)
    with pytest.raises(InputError, match="the chat template refuses row 7: users only"):
        encode_chat(said("hi", "hello"), changed(smol, "{{ raise_exception('users only') }}"), 7)


USER = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINKS_LAST = USER + "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}" + END


def test_a_template_that_shows_thinking_in_the_last_turn_only(smol):
    tokenizer = changed(smol, THINKS_LAST)
    messages = said("hi", "hello", "and?", "done")
    assert learned(messages, tokenizer) == ["hello<|im_end|>", "<think></think>done<|im_end|>"]
    ids, _, left_out = encode_chat(messages, tokenizer, 7)
    assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False) and not left_out


def test_a_template_that_takes_the_thoughts_out_of_earlier_turns(smol):
    answer = "{% set parts = m.content.split('</think>') %}{{ m.content if loop.last else parts[-1] }}"
    tokenizer = changed(smol, USER + answer + END)
    messages = said("hi", "<think>greet</think>hello", "and?", "<think>end</think>done")
    assert learned(messages, tokenizer) == ["hello<|im_end|>", "<think>end</think>done<|im_end|>"]


def test_a_template_that_ends_the_last_turn_with_more_tokens(smol):
    tokenizer = changed(smol, USER + "{{ m.content }}<|im_end|>{% if loop.last %}<|endoftext|>{% endif %}{% endfor %}")
    messages = said("hi", "hello", "and?", "done")
    assert learned(messages, tokenizer) == ["hello<|im_end|>", "done<|im_end|><|endoftext|>"]


def test_turns_that_the_template_does_not_show_are_counted(smol):
    rewriting = USER + "{{ m.content if loop.last else '...' }}" + END
    ids, wanted, left_out = encode_chat(said("hi", "hello", "and?", "done"), changed(smol, rewriting), 7)
    assert smol.decode([i for i, w in zip(ids, wanted, strict=True) if w]) == "done<|im_end|>" and left_out == 1


def test_the_marks_of_a_template_are_taken(smol):
    own = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    marked = USER + "{% if m.role == 'assistant' %}" + own + "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    assert learned(said("hi", "hello", "and?", "done"), changed(smol, marked)) == ["hello<|im_end|>", "done<|im_end|>"]


def test_the_date_in_a_template_is_the_one_asked_for(smol):
    tokenizer = changed(smol, "{{ strftime_now('%d %b %Y') }}" + THINKS_LAST)
    ids, *_ = encode_chat(said("hi", "hello"), tokenizer, 7, "2024-07-26")
    assert smol.decode(ids).startswith("26 Jul 2024<|im_start|>user")


def test_a_token_that_a_message_bears_is_not_doubled(smol):
    assert learned(said("hi", "hello<|im_end|>"), smol) == ["hello<|im_end|>"]


def test_contents_that_are_lists_of_parts(smol):
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in said("hi", "hello")]
    assert encode_chat(parts, smol, 7) == encode_chat(said("hi", "hello"), smol, 7)
    for content in ([{"type": "image", "url": "x"}], None, [], [{"type": "text"}], {"text": ["x"]}):
        with pytest.raises(InputError, match="task.messages: row 7: message 1 has"):
            encode_chat([{"role": "user", "content": content}], smol, 7)


def test_a_template_without_end_is_stopped(smol, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 2.0)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for template, reason in ((endless, "more than 2 seconds"), ("{{ 'a' * 10 ** 10 }}", "the memory that a template may have")):
        with pytest.raises(InputError, match=f"the chat template refuses row 7: it takes .*{reason}"):
            encode_chat(said("hi", "hello"), changed(smol, template), 7)
    with pytest.raises(InputError, match="writes more than 8,000,000 characters"):
        encode_chat(said("hi", "hello"), changed(smol, "{{ 'a' * 9000000 }}"), 7)
    assert learned(said("hi", "hello"), smol) == ["hello<|im_end|>"]
