"""Checkpoints in GGUF: llama.cpp's names, layouts and block quantisation turned back into Hugging Face's.

The header is parsed here, not by `gguf.GGUFReader`: that one keeps several NumPy views per vocabulary entry (for SmolLM2 4.3 s and
156 MB) and believes every length it reads, so that a broken file can make it loop for ever. A `GGUFArchitecture` says what differs
between architectures. Tensors are dequantised to float32 a few rows at a time, straight into the array that is returned.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from ..errors import InputError, hint
from .checkpoint import Checkpoint, GGUFArchitecture, slice_bounds

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_VERSIONS = (2, 3)
_MAX_AXES = 4


@dataclass(frozen=True)
class GGUFTensor:
    """One stored tensor. `shape` is in NumPy's order (the file lists axes the other way round); `offset` is in the file."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata keys to values (arrays as lists), and tensors by GGUF name, in file order."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """The value at `key`, checked to be of `kind`.

        Raises:
            InputError: it is of another kind, or missing while no default is given.
        """
        if key not in self.metadata:
            if default is ...:
                raise InputError(f"{self.path}: the metadata lacks '{key}'.")
            return default
        value = self.metadata[key]
        wanted = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            shown = f"a {type(value).__name__}" if isinstance(value, (list, str)) else repr(value)
            raise InputError(f"{self.path}: '{key}' should be {' or '.join(k.__name__ for k in wanted)}, not {shown}.")
        return value

    def positive(self, key: str, default: Any = ...) -> Any:
        """`get` for a whole number above zero."""
        value = self.get(key, int, default)
        if value is not default and value <= 0:
            raise InputError(f"{self.path}: '{key}' should be positive, not {value}.")
        return value


def read_gguf_header(path: Path) -> GGUFHeader:
    """Parse `path`, checking every count and offset against the file's length before using it.

    Raises:
        InputError: the file is cut short, is not GGUF, or is of a version or byte order that cannot be read.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{path}: not a GGUF file (it does not start with 'GGUF').")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Cursor(data, path).header()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None


class _Cursor:
    """Reads values one after another, never past the end."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at = data, path, 4

    def header(self) -> GGUFHeader:
        version = self.number("I")
        if version not in _VERSIONS:
            swapped = version & 0xFFFF == 0 and version != 0
            reason = "big-endian" if swapped else f"version {version}"
            raise InputError(f"{self.path}: a GGUF file of {reason}; readable: little-endian, version 2 or 3.")
        tensor_count, key_count = self.number("Q"), self.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(self.count(key_count, smallest=13)):
            key = self.string()
            if key in metadata:
                raise self.broken(f"the key '{key}' appears twice")
            metadata[key] = self.value(self.number("I"))
        rows = [self.tensor() for _ in range(self.count(tensor_count, smallest=24))]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self.broken(f"alignment {alignment!r}")
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, kind, shape, offset in rows:
            if name in tensors:
                raise self.broken(f"the tensor '{name}' appears twice")
            tensors[name] = self.placed(name, kind, shape, start + offset)
        return GGUFHeader(self.path, metadata, tensors)

    def placed(self, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...], offset: int) -> GGUFTensor:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise self.broken(f"the rows of '{name}' ({shape[-1]}) are no whole number of {kind.name} blocks ({block})")
        nbytes = math.prod(shape) // block * block_bytes
        if offset + nbytes > len(self.data):
            raise InputError(f"{self.path}: cut short: '{name}' should end at byte {offset + nbytes}, the file at {len(self.data)}.")
        return GGUFTensor(name, kind, shape, offset, nbytes)

    def tensor(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self.string()
        axes = self.number("I")
        if not 1 <= axes <= _MAX_AXES:
            raise self.broken(f"'{name}' has {axes} axes")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        kind = self.number("I")
        if 0 in shape:
            raise self.broken(f"'{name}' is empty")
        if kind not in GGMLQuantizationType._value2member_map_:
            raise InputError(f"{self.path}: '{name}' is of tensor type {kind}, which this version of the gguf package does not know.")
        return name, GGMLQuantizationType(kind), shape, self.number("Q")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            # A vocabulary may hold pieces of characters; they are replaced, not refused.
            return self.string(errors="replace")
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise self.broken(f"a value of unknown type {kind}")
        value = self.number(_SCALARS[kind])
        return bool(value) if kind == _BOOL else value

    def array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            return [self.string(errors="replace") for _ in range(self.count(count, smallest=8))]
        if kind not in _SCALARS:
            raise self.broken(f"an array of unknown or nested type {kind}")
        dtype = np.dtype(bool if kind == _BOOL else "<" + _SCALARS[kind])
        count = self.count(count, smallest=dtype.itemsize)
        values = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        return values.tolist()

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self, errors: str = "strict") -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8", errors)
        except UnicodeDecodeError:
            raise self.broken("a key or tensor name that is not UTF-8") from None

    def count(self, value: int, *, smallest: int) -> int:
        """`value`, a count of items of at least `smallest` bytes each, if that many can be left in the file."""
        if value * smallest > len(self.data) - self.at:
            raise InputError(f"{self.path}: cut short: at byte {self.at} the header announces {value} items.")
        return value

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise InputError(f"{self.path}: cut short: the header wants {count} bytes at {self.at}, the file ends at {len(self.data)}.")
        self.at += count
        return self.data[self.at - count : self.at]

    def broken(self, what: str) -> InputError:
        return InputError(f"{self.path}: a broken GGUF header: {what}.")


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
        self.path = path
        header = read_gguf_header(path)
        self._architecture = _architecture(header, architectures)
        self._tensors = {
            _hf_name(header, self._architecture, name): tensor for name, tensor in header.tensors.items() if name not in _NOT_WEIGHTS
        }
        self.config = gguf_config(header, self._architecture)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> np.dtype:
        self._tensor(name)
        return np.dtype(np.float32)

    def read(self, name: str) -> np.ndarray:
        return self.read_slice(name, ())

    def read_slice(self, name: str, index: Sequence[slice]) -> np.ndarray:
        tensor = self._tensor(name)
        bounds = slice_bounds(tensor.shape, index)
        order = self._row_order(name, tensor)
        if len(tensor.shape) == 1:
            whole = _dequantize(self.path, tensor, _raw(self.path, tensor, rows=1)).reshape(-1)
            return np.array((whole if order is None else whole[order])[slice(*bounds[0])])
        rows, inner = tensor.shape[0], tuple(slice(*b) for b in bounds[1:])
        raw = _raw(self.path, tensor, rows=rows)
        out = np.empty([stop - start for start, stop in bounds], np.float32)
        step = max(1, _CHUNK // math.prod(tensor.shape[1:]))
        first, last = bounds[0]
        for start in range(first, last, step):
            stop = min(start + step, last)
            chosen = slice(start, stop) if order is None else order[start:stop]
            out[start - first : stop - first] = _dequantize(self.path, tensor, raw[chosen])[:, *inner]
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


def _raw(path: Path, tensor: GGUFTensor, *, rows: int) -> np.ndarray:
    """The stored bytes, `(rows, bytes of a row)`, mapped rather than read."""
    return np.memmap(path, np.uint8, "r", tensor.offset, (rows, tensor.nbytes // rows))


def _dequantize(path: Path, tensor: GGUFTensor, raw: np.ndarray) -> np.ndarray:
    """float32 values of the leading-axis rows whose bytes are `raw`: `(len(raw), *tensor.shape[1:])`."""
    rest = tensor.shape[1:] if len(tensor.shape) > 1 else tensor.shape
    lines = np.ascontiguousarray(raw).view(np.ndarray).reshape(len(raw) * math.prod(rest[:-1]), -1)
    try:
        values = dequantize(lines, tensor.kind)
    except NotImplementedError:
        raise InputError(f"{path}: '{tensor.name}' is stored as {tensor.kind.name}, which the gguf package cannot dequantise.") from None
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
        "eos_token_id": header.get("tokenizer.ggml.eos_token_id", int, None),
        "pad_token_id": header.get("tokenizer.ggml.padding_token_id", int, None),
    }
    config |= {key: tensor in header.tensors for key, tensor in architecture.biases.items()}
    config["rope_scaling"] = _rope_scaling(header, name, config)
    return config


def _float(header: GGUFHeader, key: str, default: Any = ...) -> float:
    # Stored as float32: the shortest decimal that means it is what the original config said (1e-05, not 9.99999974e-06).
    return float(str(np.float32(header.get(key, (float, int), default))))


def _rope_scaling(header: GGUFHeader, name: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """Hugging Face's `rope_scaling`, from the scaling keys or from Llama 3's table of frequency divisors."""
    kind = header.get(f"{name}.rope.scaling.type", str, "none")
    if kind in ("linear", "yarn"):
        scaling: dict[str, Any] = {"rope_type": kind, "factor": _float(header, f"{name}.rope.scaling.factor")}
        original = header.get(f"{name}.rope.scaling.original_context_length", int, None)
        return scaling | ({"original_max_position_embeddings": original} if original is not None else {})
    if kind != "none":
        raise InputError(f"{header.path}: the rotary scaling '{kind}' is not supported in GGUF.")
    if "rope_freqs.weight" not in header.tensors:
        return None
    tensor = header.tensors["rope_freqs.weight"]
    divisors = _dequantize(header.path, tensor, _raw(header.path, tensor, rows=1)).reshape(-1)
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
