"""Prompts of each kind to tokens, and tokens back to text as they come."""

from __future__ import annotations

import copy
import itertools

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_jax.data.tokens import encode_chat, plain_ids, start_ids, with_start
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
    for bad, told in (halves, ("", "prompt 3: is empty"), ([], "empty"), ([{"role": "user"}], "neither"), ([1, "x"], "neither")):
        with pytest.raises(InputError, match=told):
            encode_prompt(bad, smollm2, 3)


TURNS = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


@pytest.fixture(scope="module")
def framed():
    """A tokenizer that frames each text, as Llama's does with what begins it; this one with what ends it too."""
    words = ["<unk>", "<s>", "</s>", "<user>", "<a>", "hi", "there"]
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.add_special_tokens([AddedToken(word, special=True) for word in words[:5]])
    built.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=built, chat_template=TURNS, **names)


@pytest.mark.parametrize("text", ["hi there", "<s>hi there", "<s> hi there"])
def test_a_prompt_begins_once_and_has_no_end(framed, text):
    """Also where it bears the token that begins it already; and what would end it is not put before what is generated."""
    assert framed.convert_ids_to_tokens(encode_prompt(text, framed)) == ["<s>", "hi", "there"]


def test_a_prompt_is_the_one_that_was_trained_on(framed):
    for text in ("hi there", "<s>hi there"):
        assert encode_prompt(text, framed) == with_start(plain_ids(framed, [text])[0], start_ids(framed))
    assert framed.convert_ids_to_tokens(encode_prompt("", framed)) == ["<s>"]


@pytest.mark.parametrize(
    "contents", [("hi", "there", "hi"), ("<s>hi", "there</s>", "hi"), ("hi</s>", "there", "hi</s>")], ids=["plain", "begun", "ended"]
)
def test_a_chat_whose_messages_bear_what_the_template_adds(framed, contents):
    roles = ("user", "a", "user")
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    ids = encode_prompt(messages, framed)
    shown = framed.convert_ids_to_tokens(ids)
    assert not any(a == b for a, b in itertools.pairwise(shown)), shown
    if "<s>" not in contents[0]:  # there the template's own marks stand between the two
        assert shown == ["<s>", "<user>", "hi", "</s>", "<a>", "there", "</s>", "<user>", "hi", "</s>", "<a>"]
    answered = encode_chat([*messages, {"role": "a", "content": "there"}], framed, 1).ids
    assert answered[: len(ids)] == ids  # as in training


def test_a_template_after_what_the_text_begins_with_already(framed):
    tokenizer = copy.deepcopy(framed)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert tokenizer.convert_ids_to_tokens(encode_prompt([{"role": "user", "content": "<s>hi"}], tokenizer)) == ["<s>", "hi"]


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
