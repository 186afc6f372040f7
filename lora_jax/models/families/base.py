"""What a family's file is written with: where parameters come from (`Weight`), heads, and readers of a Hugging Face config."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from ...errors import InputError, hint
from ...weights.checkpoint import GGUFArchitecture
from ..layers import HEADS, BlockConfig, HeadShape
from ..positions import Rotary


def oriented(name: str, axes: Sequence[Any]) -> tuple[Any, ...]:
    """PyTorch's axes of a weight in our order: reversed, but for the first of a stack of experts. Of an image convolution's kernel,
    (out, in, height, width), it is (height, width, in, out)."""
    if len(axes) == 4:
        return (*axes[2:], axes[1], axes[0])
    kept = 1 if ".experts." in name and len(axes) == 3 else 0
    return (*axes[:kept], *axes[kept:][::-1])


def torch_oriented(name: str, axes: Sequence[Any]) -> tuple[Any, ...]:
    """Our axes of a weight in PyTorch's order: the inverse of `oriented`."""
    return (axes[3], axes[2], *axes[:2]) if len(axes) == 4 else oriented(name, axes)


@dataclasses.dataclass(frozen=True)
class Weight:
    """Where a parameter comes from.

    Attributes:
        name: a Hugging Face tensor name, `{i}` standing for the layer and `{e}` for the expert: one tensor each.
        transpose: turns PyTorch's (..., out, in) into our (..., in, out).
        joined: names of tensors of the same shape whose outputs come after those of `name`.
        called: what transformers' module calls the parameter, where its files say otherwise. A file may use this name as well; it then
            holds one tensor of what `{e}` and `joined` take apart.
        first: the first layer that has it. Ours below hold ones: a norm that is not used there (`BlockConfig.first_norm`).
        others: names that a file may have it under in place of `name`: of several that are one tensor, files keep any.
    """

    name: str
    transpose: bool = False
    joined: tuple[str, ...] = ()
    called: str = ""
    first: int = 0
    others: tuple[str, ...] = ()

    @property
    def parameter(self) -> str:
        """The parameter's name in transformers' module."""
        return self.called or self.name

    def layers(self, depth: int) -> list[int | None]:
        """The layers that have it, of a model of `depth`; [None] of what is no layer's."""
        return [*range(self.first, depth)] if "{i}" in self.name else [None]

    def of_layer(self, layer: int | None) -> str:
        """The parameter's name in one of `layers`."""
        return self.parameter.replace("{i}", str(layer))

    @property
    def leading(self) -> int:
        """How many leading axes of the parameter count tensors: layers, experts."""
        return ("{i}" in self.name) + ("{e}" in self.name)

    def tensors(self, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], int, str]]:
        """The tensors of a parameter of this shape: where each lies along the leading axes, which of the joined ones it is, its name."""
        for at in itertools.product(*map(range, shape[: self.leading])):
            if at and at[0] < self.first:
                continue
            numbers = dict(zip((mark for mark in ("{i}", "{e}") if mark in self.name), at, strict=True))
            for piece, name in enumerate((self.name, *self.joined)):
                for mark, number in numbers.items():
                    name = name.replace(mark, str(number))
                yield at, piece, name

    def found(self, names: Collection[str]) -> Weight:
        """The same under the name by which a file of these tensors has it."""
        if self.called and self.called.replace("{i}", "0") in names:
            return dataclasses.replace(self, name=self.called, joined=())
        other = next((name for name in self.others if name in names), None) if self.name not in names else None
        return self if other is None else dataclasses.replace(self, name=other)

    def under(self, rename: Callable[[str], str]) -> Weight:
        """The same with its names as `rename` makes them."""
        called = rename(self.called) if self.called else ""
        joined, others = (tuple(map(rename, found)) for found in (self.joined, self.others))
        return dataclasses.replace(self, name=rename(self.name), joined=joined, called=called, others=others)

    def oriented(self, axes: Sequence[Any]) -> tuple[Any, ...]:
        """What is said of each axis (sizes, slices) in the file's layout in ours."""
        return oriented(self.parameter, axes) if self.transpose else tuple(axes)

    def as_stored(self, axes: Sequence[Any]) -> tuple[Any, ...]:
        """The same in our layout in the file's."""
        return torch_oriented(self.parameter, axes) if self.transpose else tuple(axes)


@dataclasses.dataclass(frozen=True)
class Head:
    """A head as a family's checkpoints hold it (`BertForTokenClassification` and its like).

    Attributes:
        shape: of the head.
        modules: our module path (`classifier`, `pre_classifier`, `classifier_norm`, ...) -> Hugging Face module path.
        renamed: what the base's tensors are called under this head: (start of the name, what stands there instead).
    """

    shape: HeadShape
    modules: dict[str, str]
    renamed: tuple[str, str] | None = None

    def weights(self) -> dict[str, Weight]:
        """Parameter path -> Weight, of the head alone."""
        linears = {ours: theirs for ours, theirs in self.modules.items() if ours != "classifier_norm"}
        table = {f"{ours}.kernel": Weight(f"{theirs}.weight", transpose=True) for ours, theirs in linears.items()}
        biased = {"classifier": self.shape.bias, "pre_classifier": self.shape.dense_bias}  # all others are
        table |= {f"{ours}.bias": Weight(f"{theirs}.bias") for ours, theirs in linears.items() if biased.get(ours, True)}
        if self.shape.norm:
            name = self.modules["classifier_norm"]
            table["classifier_norm.scale"] = Weight(f"{name}.weight")
            if self.shape.norm_bias:
                table["classifier_norm.bias"] = Weight(f"{name}.bias")
        return table


def decoder_heads(*, tokens: str = "score", renamed: tuple[str, str] | None = None) -> Callable[[Mapping[str, Any]], dict[str, Head]]:
    """The heads that transformers gives decoders: one linear layer, on the last token for the class of a text.

    Args:
        tokens: what the layer is called where it classifies each token.
        renamed: see `Head`, of question answering.
    """
    heads = {
        "classification": Head(HeadShape("last", bias=False), {"classifier": "score"}),
        "token_classification": Head(HeadShape("each"), {"classifier": tokens}),
        "question_answering": Head(HeadShape("each"), {"classifier": "qa_outputs"}, renamed=renamed),
    }
    return lambda _: heads


_DECODER_HEADS = decoder_heads()

# Kind of head -> the end of the name of transformers' class that has one.
HEAD_CLASSES: dict[str, str] = dict(
    zip(
        HEADS,
        ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForImageClassification", "ForObjectDetection"),
        strict=True,
    )
)


def encoder_heads(classification: Head) -> dict[str, Head]:
    """The heads of most encoders: one linear layer on each token, and for the class of a text what each has of its own."""
    return {
        "classification": classification,
        "token_classification": Head(HeadShape("each"), {"classifier": "classifier"}),
        "question_answering": Head(HeadShape("each"), {"classifier": "qa_outputs"}),
    }


@dataclasses.dataclass(frozen=True)
class Family:
    """How the configs and checkpoints of one Hugging Face `model_type` translate; registered under it in `FAMILIES`.

    Attributes:
        kind: `encoder`, `decoder`, `encoder_decoder`, `policy`, or `vision` of all that are over images.
        config: Hugging Face config and dtype -> the config of that kind of model (`EncoderConfig`, ...).
        weights: our config -> {parameter path: Weight}. In a path `layers.` stands for the stack.
        architecture: what the names of transformers' classes begin with (`XLMRoberta` of `XLMRobertaForTokenClassification`).
        language_model: transformers' class with a projection to the vocabulary, where it is not `{architecture}ForCausalLM`, or of an
            encoder-decoder `{architecture}ForConditionalGeneration`; of a base over images its class without a head, where that is not
            `{architecture}Model`.
        prefixes: what may stand before the names in a checkpoint (`bert.` where it was saved with a head).
        root: what all names but those of output heads start with, unless a checkpoint was saved without any head (`model.`).
        heads: Hugging Face config -> {kind of head: Head}.
        gguf: its form in GGUF files; None where those are not read.
        model: the class of a base over images, made as `model(config, rngs=...)`; the other kinds have one each.
        timm: of a family in timm's form, the architectures it has: its configs name one of them, and no `model_type`.
        carried: a regex of tensors that the model computes nothing with, and an export hands on as they are (a pooler, a mask token).
    """

    kind: str
    config: Callable[[Mapping[str, Any], Any], Any]
    weights: Callable[[Any], dict[str, Weight]]
    architecture: str
    language_model: str = ""
    prefixes: tuple[str, ...] = ("",)
    root: str = ""
    heads: Callable[[Mapping[str, Any]], dict[str, Head]] = _DECODER_HEADS
    gguf: GGUFArchitecture | None = None
    model: Any = None
    timm: tuple[str, ...] = ()
    carried: str = ""

    def class_name(self, head: str | None = None) -> str:
        """The name of transformers' class.

        Args:
            head: its kind (`models/layers.py`); None: a decoder's own projection to its vocabulary, and none on an encoder.
        """
        if head is not None:
            return self.architecture + HEAD_CLASSES[head]
        if self.kind in ("encoder", "vision"):
            return self.language_model or self.architecture + "Model"
        return self.language_model or self.architecture + ("ForCausalLM" if self.kind == "decoder" else "ForConditionalGeneration")


def required(config: Mapping[str, Any], key: str) -> Any:
    """`config[key]`; `InputError` where it is missing."""
    if config.get(key) is None:
        raise InputError(f"config.json: no '{key}'.")
    return config[key]


def size(config: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    """`config[key]`, a whole number, `least` or more; `InputError` where it is something else, or missing without a `default`."""
    value = config.get(key)
    if value is None:
        value = required(config, key) if default is None else default
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
        raise InputError(f"config.json: {key} = {value!r} should be a whole number, {least} or more.")
    return value


def width_and_heads(config: Mapping[str, Any], width: str = "hidden_size", heads: str = "num_attention_heads") -> tuple[int, int]:
    """The sizes at these two keys, for attention whose heads share the width evenly; `InputError` where they do not."""
    whole, parts = size(config, width), size(config, heads)
    if whole % parts:
        raise InputError(f"config.json: {heads} = {parts} does not divide {width} = {whole}.")
    return whole, parts


# Hugging Face's name of an activation -> ours.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "tanh": "tanh",
}


def activation(config: Mapping[str, Any], key: str, default: str) -> str:
    """Our name of the activation that `config[key]` names; `InputError` where there is no such."""
    only(config, key, *_ACTIVATIONS)
    return _ACTIVATIONS[config.get(key, default)]


def only(config: Mapping[str, Any], key: str, *allowed: Any) -> None:
    """`InputError` where `config` has `key` with a value that is not supported."""
    if key in config and config[key] not in allowed:
        raise InputError(f"config.json: {key} = {config[key]!r} is not supported (only {', '.join(map(repr, allowed))}).")


def post_norm_block(width: int, heads: int, hidden: int, act: str, norm_eps: float, dtype: Any) -> BlockConfig:
    """The layer that BERT and its descendants share: norms after the sums, biases everywhere, a plain MLP.

    Args:
        act: Hugging Face's name of the activation.
    """
    return BlockConfig(
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        hidden=hidden,
        activation=activation({"hidden_act": act}, "hidden_act", "gelu"),
        gated=False,
        norm="layer",
        norm_eps=norm_eps,
        norm_at="residual",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        dtype=dtype,
    )


def norms(names: Mapping[str, str], *, bias: bool = True, first: int = 0) -> dict[str, Weight]:
    """Scale and bias of layer norms: our module path -> Hugging Face module path. `first` is that of `Weight`."""
    table = {f"{ours}.scale": Weight(f"{theirs}.weight", first=first) for ours, theirs in names.items()}
    return table | {f"{ours}.bias": Weight(f"{theirs}.bias", first=first) for ours, theirs in names.items() if bias}


def embeddings(names: Mapping[str, str]) -> dict[str, Weight]:
    """Tables of vectors: our module path -> Hugging Face module path."""
    return {f"{ours}.embedding": Weight(f"{theirs}.weight") for ours, theirs in names.items()}


def projections(names: Mapping[str, str], *, bias: bool, transpose: bool = True) -> dict[str, Weight]:
    """Kernel (transposed, as `nn.Linear` has it) and bias of linear layers: our module path -> Hugging Face module path."""
    table = {f"{ours}.kernel": Weight(f"{theirs}.weight", transpose) for ours, theirs in names.items()}
    if bias:
        table |= {f"{ours}.bias": Weight(f"{theirs}.bias") for ours, theirs in names.items()}
    return table


# Kind -> the keys it needs, and those it may have; all may have the ones of `_COMMON`.
_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (("factor",), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
    "longrope": (("short_factor", "long_factor"), ("factor", "attention_factor")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
}
_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "finetuned")


def rotary(hf: Mapping[str, Any], head_dim: int, *, layer: str = "", theta: float = 10000.0, fraction: float = 1.0) -> Rotary:
    """A model's rotary positions.

    Args:
        hf: the config.
        layer: the layer's type, where settings differ between them (`full_attention`, `sliding_attention`).
        theta: the family's default.
        fraction: of a head's features that are rotated, where the config doesn't say.

    Raises:
        InputError: a kind of scaling that is not known, or settings that are missing or unknown.
    """
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    settings = hf.get(key) or {}
    if isinstance(settings.get(layer), Mapping):
        key, settings = f"{key}.{layer}", settings[layer]
    kind = settings.get("rope_type") or settings.get("type") or "default"
    kind = "longrope" if kind == "su" else kind  # its name in early Phi-3
    _check(key, kind, settings)
    fraction = settings.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or fraction
    found = Rotary(int(head_dim * fraction), settings.get("rope_theta") or hf.get("rope_theta") or theta, kind)
    if kind == "default":
        return found
    longest = size(hf, "max_position_embeddings")
    context = hf.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings") or longest
    factor = settings.get("factor") or longest / context
    changes: dict[str, Any] = {"context": longest if kind == "dynamic" else context, "factor": factor}
    if kind == "llama3":
        changes |= {"slow": settings["low_freq_factor"], "fast": settings["high_freq_factor"]}
    elif kind == "yarn":
        changes |= {"slow": settings.get("beta_slow") or 1, "fast": settings.get("beta_fast") or 32}
        changes |= {"truncate": settings.get("truncate", True), "magnitude": _yarn_magnitude(settings, factor)}
    elif kind == "longrope":
        short, long = (tuple(settings[f"{name}_factor"]) for name in ("short", "long"))
        if {len(short), len(long)} != {found.dims // 2}:
            raise InputError(f"config.json: {key}: short_factor and long_factor should have {found.dims // 2} numbers each.")
        magnitude = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
        changes |= {"short": short, "long": long, "magnitude": settings.get("attention_factor") or magnitude}
    return Rotary(found.dims, found.theta, kind, **changes)


def _yarn_magnitude(settings: Mapping[str, Any], factor: float) -> float:
    """arXiv:2309.00071, eq. 22, or as DeepSeek has it, with two factors of its logarithm."""
    if settings.get("attention_factor") is not None:
        return settings["attention_factor"]

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    one, all_dims = settings.get("mscale"), settings.get("mscale_all_dim")
    return magnitude(one) / magnitude(all_dims) if one and all_dims else magnitude(1.0)


def _check(key: str, kind: str, settings: Mapping[str, Any]) -> None:
    if kind not in _KINDS:
        raise InputError(f"config.json: {key}: rope_type '{kind}' is not supported. {hint(kind, _KINDS)} Known: {', '.join(_KINDS)}.")
    needed, optional = _KINDS[kind]
    for name in needed:
        if settings.get(name) is None:
            raise InputError(f"config.json: {key}: rope_type '{kind}' needs '{name}'.")
    unknown = sorted(set(settings) - {*needed, *optional, *_COMMON})
    if unknown:
        raise InputError(f"config.json: {key}: '{unknown[0]}' is not a setting of rope_type '{kind}' that is supported.")
