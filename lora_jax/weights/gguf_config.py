"""What a GGUF file's metadata says of the model, as the Hugging Face config that its family reads.

`gguf_config` makes what most families share; a family's own function (`GGUFArchitecture.config`) adds or renames the rest. Settings that
nobody reads are named, and of rotary positions refused: a model with other positions is another model.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InputError, warn
from .checkpoint import GGUFArchitecture
from .gguf_header import GGUFHeader, dequantized, stored_rows

# Tables of rotary positions, which become part of the config.
_FREQUENCIES, _SHORT, _LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
NOT_WEIGHTS = (_FREQUENCIES, _SHORT, _LONG)

# Settings that follow from the tensors, or are none of the model's.
_FOLLOW = ("vocab_size", "tensor_data_layout", "expert_count", "expert_used_count")

_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}


class GGUFSettings:
    """The settings of a model's architecture in a GGUF file, and which of them were read.

    Args:
        header: of the file.
        name: of the architecture, which all keys start with.

    Every reader raises `InputError` where the value is of another kind, or missing while no default is given.
    """

    def __init__(self, header: GGUFHeader, name: str):
        self.header, self._name = header, name
        self._read: set[str] = set(_FOLLOW)

    def key(self, setting: str) -> str:
        """The setting's key in the metadata."""
        return f"{self._name}.{setting}"

    def has(self, setting: str) -> bool:
        """Whether the file has it."""
        return self.key(setting) in self.header.metadata

    def get(self, setting: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """The value, of one of these types."""
        self._read.add(setting)
        return self.header.get(self.key(setting), kind, default)

    def size(self, setting: str, default: Any = ...) -> Any:
        """A whole number above 0."""
        self._read.add(setting)
        return self.header.positive(self.key(setting), default)

    def number(self, setting: str, default: Any = ...) -> Any:
        """A number: of those that are stored as float32, the shortest decimal that means it, which is what the original config said
        (1e-05, not 9.99999974e-06)."""
        value = self.get(setting, (float, int), default)
        return value if value is default else float(str(np.float32(value)))

    def table(self, name: str) -> list[float]:
        """The numbers of a tensor of the file, as `number` gives them."""
        tensor = self.header.tensors[name]
        return [float(str(value)) for value in dequantized(tensor, stored_rows(tensor, 1)).reshape(-1)]

    def unread(self) -> list[str]:
        """The settings in the file that were not read."""
        start = f"{self._name}."
        given = (key.removeprefix(start) for key in self.header.metadata if key.startswith(start))
        return [setting for setting in given if setting not in self._read]


def gguf_config(header: GGUFHeader, architecture: GGUFArchitecture) -> dict[str, Any]:
    """The metadata as a Hugging Face config.

    Raises:
        InputError: a needed key is missing, is of the wrong kind, contradicts the embedding's shape, or says something of the model that
            is not known here.
    """
    settings = GGUFSettings(header, architecture.name)
    if "token_embd.weight" not in header.tensors:
        raise InputError(f"{header.path}: no 'token_embd.weight': this GGUF file holds no whole model.")
    embedding = header.tensors["token_embd.weight"].shape
    width = settings.size("embedding_length")
    if len(embedding) != 2 or embedding[1] != width:
        raise InputError(f"{header.path}: the embedding is {embedding}, but '{settings.key('embedding_length')}' says {width}.")
    heads = settings.size("attention.head_count")
    norm = "layer_norm" if architecture.layer_norms else "layer_norm_rms"
    config = {
        "model_type": architecture.model_type,
        "vocab_size": embedding[0],
        "hidden_size": width,
        "intermediate_size": settings.size("feed_forward_length"),
        "num_hidden_layers": settings.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.size("attention.head_count_kv", heads),
        "head_dim": _head_dim(settings, architecture, width, heads),
        "max_position_embeddings": settings.size("context_length"),
        "layer_norm_eps" if architecture.layer_norms else "rms_norm_eps": settings.number(f"attention.{norm}_epsilon"),
        "hidden_act": "silu",
        # llama.cpp writes the output projection only where it is not the embedding.
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": header.get("tokenizer.ggml.bos_token_id", int, None),
        "eos_token_id": _ends(header),
        "pad_token_id": header.get("tokenizer.ggml.padding_token_id", int, None),
    }
    if architecture.rotary != "none":
        config["rope_theta"] = settings.number("rope.freq_base", 10000.0)
    config |= {key: tensor in header.tensors for key, tensor in architecture.biases.items()}
    if architecture.rotary != "none":
        config |= _rotary(settings, architecture, config)
    if not settings.get("attention.causal", bool, True):
        raise InputError(
            f"{header.path}: '{settings.key('attention.causal')}' is false: its tokens see those after them, as no decoder's do."
        )
    if architecture.config is not None:
        config = architecture.config(settings, config)
    unread = settings.unread()
    rotary = sorted(setting for setting in unread if setting.startswith("rope."))
    if rotary:
        raise InputError(f"{header.path}: the rotary setting '{settings.key(rotary[0])}' is not supported in GGUF.")
    if unread:
        shown = ", ".join(map(settings.key, unread[:6]))
        warn(f"{header.path}: settings that are not known here are left out: {shown}{', ...' * (len(unread) > 6)}.")
    return config


def _head_dim(settings: GGUFSettings, architecture: GGUFArchitecture, width: int, heads: int) -> int:
    """The width of a head. Files without it say how many of its features are turned with the position, which are mostly all."""
    turned = settings.size("rope.dimension_count", width // heads) if architecture.rotary == "whole" else width // heads
    size = settings.size("attention.key_length", turned)
    values = settings.size("attention.value_length", size)
    if values != size:
        path, key = settings.header.path, settings.key("attention.value_length")
        raise InputError(f"{path}: '{key}' = {values} should be the keys' size, {size}.")
    return size


def _ends(header: GGUFHeader) -> int | list[int] | None:
    """What ends a text; where turns of a conversation end otherwise (Llama 3), those tokens too, as Hugging Face's configs have it."""
    named = (header.get(f"tokenizer.ggml.{name}_token_id", int, None) for name in ("eos", "eot", "eom"))
    found = list(dict.fromkeys(i for i in named if i is not None))
    return found if len(found) > 1 else next(iter(found), None)


def _rotary(settings: GGUFSettings, architecture: GGUFArchitecture, config: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face's `rope_scaling`, and which part of a head is turned where that is not all of it."""
    path, size = settings.header.path, config["head_dim"]
    turned = settings.size("rope.dimension_count", size)
    if turned == size:
        part = {}
    elif architecture.rotary == "part" and turned < size:
        part = {"partial_rotary_factor": turned / size}
    else:
        raise InputError(f"{path}: '{settings.key('rope.dimension_count')}' = {turned} should be the heads' size, {size}.")
    return {"rope_scaling": _scaling(settings, {**config, "turned": turned})} | part


def _scaling(settings: GGUFSettings, config: dict[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling`, from the scaling keys, or from tables: Llama 3's frequency divisors, or two factors for each pair (longrope)."""
    path = settings.header.path
    # llama.cpp reads the factor under either key (the second is the older one), and takes it for linear where no type is given.
    factor = settings.number("rope.scaling.factor", settings.number("rope.scale_linear", 0.0))
    tables = [name for name in NOT_WEIGHTS if name in settings.header.tensors]
    usual = "longrope" if _LONG in tables else "linear" if factor not in (0.0, 1.0) else "none"
    kind = settings.get("rope.scaling.type", str, usual)
    kind = usual if kind == "none" and usual == "longrope" else kind  # what some converters write beside the tables
    wanted = [_SHORT, _LONG] if kind == "longrope" else [_FREQUENCIES] if kind == "none" and tables else []
    if sorted(tables) != sorted(wanted):
        said = f"needs the tensors {' and '.join(wanted)}" if wanted else f"beside the tensor {tables[0]} is not supported in GGUF"
        raise InputError(f"{path}: the rotary scaling '{kind}' {said}.")
    settings.get("rope.scaling.finetuned", bool, True)  # how it was trained, and nothing that is computed
    original = settings.size("rope.scaling.original_context_length", None)
    of_context = {} if original is None else {"original_max_position_embeddings": original}
    if kind in ("linear", "yarn"):
        if factor <= 0:
            raise InputError(f"{path}: the rotary scaling '{kind}' needs '{settings.key('rope.scaling.factor')}', a number above 0.")
        given = {ours: f"rope.scaling.{theirs}" for theirs, ours in _YARN.items()} if kind == "yarn" else {}
        more = {ours: settings.number(setting) for ours, setting in given.items() if settings.has(setting)}
        return {"rope_type": kind, "factor": factor} | more | of_context
    if kind == "longrope":
        given = {ours: settings.table(name) for ours, name in (("short_factor", _SHORT), ("long_factor", _LONG))}
        more = {"attention_factor": settings.number("rope.scaling.attn_factor")} if settings.has("rope.scaling.attn_factor") else {}
        return {"rope_type": kind} | given | more | of_context
    if kind != "none":
        raise InputError(f"{path}: the rotary scaling '{kind}' is not supported in GGUF.")
    if factor not in (0.0, 1.0):
        warn(f"{path}: the rotary scaling's factor {factor} is not used: '{settings.key('rope.scaling.type')}' says none.")
    return _llama3(settings, np.array(settings.table(_FREQUENCIES)), config) if tables else None


def _llama3(settings: GGUFSettings, divisors: np.ndarray, config: dict[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling: the table follows from one factor and three numbers that are the same in every Llama 3.1, 3.2 and 3.3."""
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    # Turns within the original context, and how far along the ramp from slow pairs (divided by the factor) to fast ones (left) each is.
    pairs = np.arange(0, config["turned"], 2) / config["turned"]
    turns = scaling["original_max_position_embeddings"] * config["rope_theta"] ** -pairs / (2 * np.pi)
    ramp = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1.0 / ((1.0 - ramp) / scaling["factor"] + ramp)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise InputError(f"{settings.header.path}: '{_FREQUENCIES}' is not Llama 3's rotary scaling, the only kind known here.")
    return scaling
