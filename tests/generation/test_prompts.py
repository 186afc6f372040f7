"""Prompts of each kind to tokens, and tokens back to text as they come."""

from __future__ import annotations

import pytest

from lora_jax.errors import InputError
from lora_jax.generation.generate import TextStream, encode_prompt
from lora_jax.weights.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def smollm2(smollm2_source):
    return load_tokenizer(smollm2_source)


def test_kinds_of_prompts(smollm2):
    assert encode_prompt("Hello there", smollm2) == smollm2("Hello there")["input_ids"]
    assert encode_prompt([5, 6], None) == [5, 6]
    chat = [{"role": "user", "content": "Hi"}]
    ids = encode_prompt(chat, smollm2)
    assert smollm2.decode(ids) == smollm2.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert smollm2.decode(ids).endswith("<|im_start|>assistant\n")
    halves = ("a\ud83d", r"prompt 3: holds '\\ud83d' at character 1, half of a character")
    for bad, told in (halves, ("", "prompt 3: it is empty"), ([], "empty"), ([{"role": "user"}], "neither"), ([1, "x"], "neither")):
        with pytest.raises(InputError, match=told):
            encode_prompt(bad, smollm2, 3)


@pytest.mark.parametrize("text", ["Plain words, and more.", "naïve café 日本語 🤖👩‍🔬!", "  spaces\n\tand\n\nlines  ", "ab"])
def test_pieces_make_the_text(smollm2, text):
    """However the tokens come, no piece ends within a character and together they are the whole."""
    ids = smollm2(text)["input_ids"]
    for step in (1, 3):
        stream = TextStream(smollm2, [smollm2.eos_token_id])
        pieces = [stream.add(ids[i : i + step]) for i in range(0, len(ids), step)]
        assert not any("\ufffd" in piece for piece in pieces)
        assert stream.add([smollm2.eos_token_id]) == ""
        assert "".join(pieces) + stream.rest() == smollm2.decode(ids, skip_special_tokens=True) == text


def test_what_never_becomes_a_character_is_told_at_the_end(smollm2):
    ids = smollm2("🤖")["input_ids"][:-1]
    stream = TextStream(smollm2)
    assert [stream.add([i]) for i in ids] == [""] * len(ids)
    assert "\ufffd" in stream.rest() and stream.rest() == ""
