"""Checkpoints in GGUF: llama.cpp's names, layouts and block quantisation turned back into Hugging Face's.

A `GGUFArchitecture` says what differs between architectures. Tensors are dequantised to float32 a few rows at a time, straight into
the array that is returned.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf.quants import dequantize

from ..errors import InputError, hint, warn
from .checkpoint import Checkpoint, GGUFArchitecture, slice_bounds
from .gguf_header import GGUFHeader, GGUFTensor, read_gguf

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# Tensors that say something about the config, or that every program works out for itself.
_NOT_WEIGHTS = ("rope_freqs.weight",)

_CHUNK = 1 << 18  # elements dequantised at once: small beside a tensor, large beside the cost of a call


class GGUFCheckpoint(Checkpoint):
    """A GGUF file under Hugging Face names; every tensor reads as float32.

    Args:
        path: the file.
        architectures: `general.architecture` -> what it maps to.

    Raises:
        InputError: a broken file, or an architecture, tensor or scaling that is not known here (rather than a wrong model).
    """

    def __init__(self, path: Path, architectures: Mapping[str, GGUFArchitecture]):
        header = read_gguf(path)
        self.path = header.path
        self._architecture = _architecture(header, architectures)
        self._tensors = {
            _hf_name(header, self._architecture, name): tensor for name, tensor in header.tensors.items() if name not in _NOT_WEIGHTS
        }
        self.config = gguf_config(header, self._architecture)

    def names(self) -> list[str]:
        return list(self._tensors)

    def file(self, name: str) -> Path:
        return self._tensor(name).file

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> np.dtype:
        self._tensor(name)
        return np.dtype(np.float32)

    def _read_slice(self, name: str, index: Sequence[slice]) -> np.ndarray:
        tensor = self._tensor(name)
        bounds = slice_bounds(tensor.shape, index)
        order = self._row_order(name, tensor)
        if len(tensor.shape) == 1:
            whole = _dequantize(tensor, _raw(tensor, rows=1)).reshape(-1)
            return np.array((whole if order is None else whole[order])[slice(*bounds[0])])
        rows, inner = tensor.shape[0], tuple(slice(*b) for b in bounds[1:])
        raw = _raw(tensor, rows=rows)
        out = np.empty([stop - start for start, stop in bounds], np.float32)
        step = max(1, _CHUNK // math.prod(tensor.shape[1:]))
        first, last = bounds[0]
        for start in range(first, last, step):
            stop = min(start + step, last)
            chosen = slice(start, stop) if order is None else order[start:stop]
            out[start - first : stop - first] = _dequantize(tensor, raw[chosen])[:, *inner]
        return out

    def _tensor(self, name: str) -> GGUFTensor:
        if name not in self._tensors:
            raise self._missing(name)
        return self._tensors[name]

    def _row_order(self, name: str, tensor: GGUFTensor) -> np.ndarray | None:
        """Which stored row is each Hugging Face row; None where they agree.

        Rotary position embedding turns pairs of features. Hugging Face pairs i with i + half a head, llama.cpp's `llama`
        pairs 2i with 2i + 1, so the converter moved the rows of q and k within each head.
        """
        if not self._architecture.interleaved or not re.search(r"\.self_attn\.[qk]_proj\.", name):
            return None
        heads = self.config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
        if tensor.shape[0] % (2 * heads):
            raise InputError(f"{self.path}: '{tensor.name}' has {tensor.shape[0]} rows, which {heads} heads cannot share.")
        return np.arange(tensor.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _raw(tensor: GGUFTensor, *, rows: int) -> np.ndarray:
    """The stored bytes, `(rows, bytes of a row)`, mapped rather than read."""
    return np.memmap(tensor.file, np.uint8, "r", tensor.offset, (rows, tensor.nbytes // rows))


def _dequantize(tensor: GGUFTensor, raw: np.ndarray) -> np.ndarray:
    """float32 values of the leading-axis rows whose bytes are `raw`: `(len(raw), *tensor.shape[1:])`."""
    rest = tensor.shape[1:] if len(tensor.shape) > 1 else tensor.shape
    lines = np.ascontiguousarray(raw).view(np.ndarray).reshape(len(raw) * math.prod(rest[:-1]), -1)
    try:
        values = dequantize(lines, tensor.kind)
    except NotImplementedError:
        kind = tensor.kind.name
        raise InputError(f"{tensor.file}: '{tensor.name}' is stored as {kind}, which the gguf package cannot dequantise.") from None
    return values.reshape(len(raw), *rest)


def _architecture(header: GGUFHeader, known: Mapping[str, GGUFArchitecture]) -> GGUFArchitecture:
    name = header.get("general.architecture", str)
    if name not in known:
        raise InputError(f"{header.path}: the architecture '{name}' is not supported in GGUF. {hint(name, known)}".rstrip())
    if header.get(f"{name}.expert_count", int, 0):
        raise InputError(f"{header.path}: a mixture-of-experts '{name}' is not supported in GGUF; load its safetensors.")
    return known[name]


def _hf_name(header: GGUFHeader, architecture: GGUFArchitecture, name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(?P<layer>0|[1-9]\d{0,5})\.)?(?P<stem>\w+)\.(?P<kind>weight|bias)", name)
    names = {**_LAYER, **architecture.layer} if match and match["layer"] else _TOP
    if match is None or match["stem"] not in names:
        raise InputError(f"{header.path}: the tensor '{name}' is not part of a {architecture.model_type} model as known here.")
    prefix = f"model.layers.{match['layer']}." if match["layer"] else ""
    return f"{prefix}{names[match['stem']]}.{match['kind']}"


def gguf_config(header: GGUFHeader, architecture: GGUFArchitecture) -> dict[str, Any]:
    """The metadata as a Hugging Face config.

    Raises:
        InputError: a needed key is missing, is of the wrong kind, or contradicts the embedding's shape.
    """
    name = architecture.name
    if "token_embd.weight" not in header.tensors:
        raise InputError(f"{header.path}: no 'token_embd.weight': this GGUF file holds no whole model.")
    embedding = header.tensors["token_embd.weight"].shape
    width = header.positive(f"{name}.embedding_length")
    if len(embedding) != 2 or embedding[1] != width:
        raise InputError(f"{header.path}: the embedding is {embedding}, but '{name}.embedding_length' says {width}.")
    heads = header.positive(f"{name}.attention.head_count")
    config = {
        "model_type": architecture.model_type,
        "vocab_size": embedding[0],
        "hidden_size": width,
        "intermediate_size": header.positive(f"{name}.feed_forward_length"),
        "num_hidden_layers": header.positive(f"{name}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": header.positive(f"{name}.attention.head_count_kv", heads),
        "head_dim": header.positive(f"{name}.attention.key_length", header.positive(f"{name}.rope.dimension_count", width // heads)),
        "max_position_embeddings": header.positive(f"{name}.context_length"),
        "rms_norm_eps": _float(header, f"{name}.attention.layer_norm_rms_epsilon"),
        "rope_theta": _float(header, f"{name}.rope.freq_base", 10000.0),
        "hidden_act": "silu",
        # llama.cpp writes the output projection only where it is not the embedding.
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": header.get("tokenizer.ggml.bos_token_id", int, None),
        "eos_token_id": _ends(header),
        "pad_token_id": header.get("tokenizer.ggml.padding_token_id", int, None),
    }
    config |= {key: tensor in header.tensors for key, tensor in architecture.biases.items()}
    config["rope_scaling"] = _rope_scaling(header, name, config)
    unread = [k for k in header.metadata if k.startswith(f"{name}.") and not _KNOWN_SETTINGS.fullmatch(k.removeprefix(f"{name}."))]
    if unread:
        warn(f"{header.path}: settings that are not known here are left out: {', '.join(unread[:6])}{', ...' * (len(unread) > 6)}.")
    return config


def _ends(header: GGUFHeader) -> int | list[int] | None:
    """What ends a text; where turns of a conversation end otherwise (Llama 3), those tokens too, as Hugging Face's configs have it."""
    named = (header.get(f"tokenizer.ggml.{name}_token_id", int, None) for name in ("eos", "eot", "eom"))
    found = list(dict.fromkeys(i for i in named if i is not None))
    return found if len(found) > 1 else next(iter(found), None)


def _float(header: GGUFHeader, key: str, default: Any = ...) -> float:
    # Stored as float32: the shortest decimal that means it is what the original config said (1e-05, not 9.99999974e-06).
    return float(str(np.float32(header.get(key, (float, int), default))))


_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}

# Settings of an architecture that are read, or follow from what is; of the others a word is said.
_KNOWN_SETTINGS = re.compile(
    r"context_length|embedding_length|block_count|feed_forward_length|vocab_size|tensor_data_layout|expert_(used_)?count|rope\..*"
    r"|attention\.(head_count(_kv)?|key_length|value_length|layer_norm_rms_epsilon|causal)"
)


def _rope_scaling(header: GGUFHeader, name: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """Hugging Face's `rope_scaling`, from the scaling keys or from Llama 3's table of frequency divisors."""
    # llama.cpp reads the factor under either key (the second is the older one), and takes it for linear where no type is given.
    factor = _float(header, f"{name}.rope.scaling.factor", _float(header, f"{name}.rope.scale_linear", 0.0))
    kind = header.get(f"{name}.rope.scaling.type", str, "linear" if factor not in (0.0, 1.0) else "none")
    of_scaling = ["type", "factor", "original_context_length", "finetuned", *(_YARN if kind == "yarn" else ())]
    known = ["scale_linear", "freq_base", "dimension_count", *(f"scaling.{key}" for key in of_scaling)]
    unknown = sorted(k for k in header.metadata if k.startswith(f"{name}.rope.") and k.removeprefix(f"{name}.rope.") not in known)
    if unknown:
        raise InputError(f"{header.path}: the rotary setting '{unknown[0]}' is not supported in GGUF.")
    turned = header.get(f"{name}.rope.dimension_count", int, config["head_dim"])
    if turned != config["head_dim"]:
        raise InputError(f"{header.path}: '{name}.rope.dimension_count' = {turned} should be the heads' size, {config['head_dim']}.")
    if kind in ("linear", "yarn"):
        if factor <= 0:
            raise InputError(f"{header.path}: the rotary scaling '{kind}' needs '{name}.rope.scaling.factor', a number above 0.")
        scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
        given = {ours: f"{name}.rope.scaling.{theirs}" for theirs, ours in _YARN.items()}
        scaling |= {ours: _float(header, key) for ours, key in given.items() if key in header.metadata}
        original = header.get(f"{name}.rope.scaling.original_context_length", int, None)
        return scaling | ({"original_max_position_embeddings": original} if original is not None else {})
    if kind != "none":
        raise InputError(f"{header.path}: the rotary scaling '{kind}' is not supported in GGUF.")
    if factor not in (0.0, 1.0):
        warn(f"{header.path}: the rotary scaling's factor {factor} is not used: '{name}.rope.scaling.type' says none.")
    if "rope_freqs.weight" not in header.tensors:
        return None
    tensor = header.tensors["rope_freqs.weight"]
    divisors = _dequantize(tensor, _raw(tensor, rows=1)).reshape(-1)
    # The table follows from one factor and three numbers that are the same in every Llama 3.1, 3.2 and 3.3.
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    # Turns within the original context, and how far along the ramp from slow pairs (divided by the factor) to fast ones (left) each is.
    pairs = np.arange(0, config["head_dim"], 2) / config["head_dim"]
    turns = scaling["original_max_position_embeddings"] * config["rope_theta"] ** -pairs / (2 * np.pi)
    ramp = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1.0 / ((1.0 - ramp) / scaling["factor"] + ramp)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise InputError(f"{header.path}: 'rope_freqs.weight' is not Llama 3's rotary scaling, the only kind known here.")
    return scaling
