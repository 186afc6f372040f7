"""`save_pretrained`: a model, its adapter merged, as the folder that transformers loads."""

from __future__ import annotations

import dataclasses
import json
import operator
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..adapters.merge import merged_base, quantised_sites
from ..adapters.methods.base import AdaptedSite
from ..config.doors import EXPORTERS
from ..errors import InputError, hint, warn
from ..models.decoder import Decoder
from ..models.encoder import Encoder
from ..models.encoder_decoder import Base, EncoderDecoder, Generative
from ..models.families import find_family
from ..models.families.base import Head
from ..models.heads import Classifier
from ..models.load import BaseFiles, class_names
from ..models.quantized import Held
from ..models.tensors import base_tensors
from ..models.vision import VisionBase
from ..sweeps.restore import Restored
from ..tracking.files import new_folder
from ..weights.load import HUB_FILES, resolve, weights_file
from ..weights.provenance import Origin
from ..weights.safetensors import DTYPES, Tensor, write_checkpoint
from ..weights.tokenizer import load_tokenizer
from .card import model_card, write_card
from .export import Exporter, ExportOptions, Runtime, head_of, kind_of

SHARD = 5 * 10**9  # bytes; transformers' own choice for a long time, and what hubs like
WRITTEN_DTYPES = {"float32": DTYPES["F32"], "bfloat16": DTYPES["BF16"], "float16": DTYPES["F16"]}

# What says how texts become tokens, and images pixels.
_READER_FILES = (
    "preprocessor_config.json", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# What says where a checkpoint came from, or names code or numbers that the new one does not have.
_DROPPED = ("_name_or_path", "auto_map", "num_labels", "quantization_config", "torch_dtype", "dtype")


@dataclasses.dataclass(frozen=True)
class Form:
    """A model as transformers would have it: its base, and the head where it bears one."""

    base: Base
    classifier: Classifier | None
    head: Head | None

    @property
    def origin(self) -> Origin:
        assert self.base.origin is not None
        return self.base.origin


def save_pretrained(
    model: nnx.Module,
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    dtype: str | None = None,
    largest: int = SHARD,
    card: str | None = None,
) -> None:
    """Writes a model in the format of transformers: weights, config, tokenizer and generation config. An adapter is merged.

    W + scale * A B is computed in the dtype of the loaded base, so load that in float32. Each weight is then rounded once, to the
    dtype it has in the base's own checkpoint.

    Args:
        model: a base from `load_model`, with or without an adapter and a head.
        path: a folder that does not exist yet, or is empty.
        classes: names of the classes, in the order of the head's logits. A loaded head has its own.
        dtype: `float32`, `bfloat16` or `float16` for all weights, instead of the checkpoint's.
        largest: maximal bytes of weights in one file; larger models are written as shards with an index.
        card: text of a `README.md`.

    Raises:
        InputError: `path` is not empty, transformers has no such model, or the base's files are gone.
    """
    if dtype is not None and dtype not in WRITTEN_DTYPES:
        raise InputError(f"dtype: unknown dtype '{dtype}'. {hint(dtype, WRITTEN_DTYPES)}")
    check_form(model)
    with new_folder(Path(path)) as folder:
        _write(model, folder, classes=classes, dtype=dtype, largest=largest)
        write_card(folder, card)


def _write(
    model: nnx.Module,
    folder: Path,
    *,
    classes: Sequence[str] | None,
    dtype: str | None,
    largest: int,
    keep_mask: bool = False,
    requantize: bool = False,
) -> None:
    if requantize and not quantised_sites(model):
        raise InputError("--requantize: the base holds none of the adapted weights quantised.")
    form, merged = _form_of(model), _form_of(merged_base(model, keep_mask=keep_mask, requantize=requantize))
    _say_zeros(model, merged, keep_mask)
    if requantize:
        _say_rounded(form, _form_of(merged_base(model)), merged)
    dtypes, carried = stored_dtypes(form), _files(form).carried()
    if dtype is not None:
        dtypes = dict.fromkeys(dtypes, WRITTEN_DTYPES[dtype])
        # What counts something stays a whole number.
        floats = {name for name, tensor in carried.items() if np.issubdtype(tensor.dtype, np.inexact)}
        carried = {name: tensor.cast(WRITTEN_DTYPES[dtype]) if name in floats else tensor for name, tensor in carried.items()}
    tensors = _tensors(merged, dtypes, carried)
    write_checkpoint(folder, tensors, largest=largest)
    _write_json(folder / "config.json", _config(merged, classes, tensors))
    write_reader(folder, form.origin.source)
    if (generation := _generation_config(merged)) is not None:
        _write_json(folder / "generation_config.json", generation)


def _say_zeros(model: nnx.Module, merged: Form, keep_mask: bool) -> None:
    """Says what becomes of a pruned base's zeros, and what keeping them changes."""
    sites = [m for _, m in nnx.iter_modules(model) if isinstance(m, AdaptedSite)]
    # A quantised weight may be 0 where nothing was pruned: its format has a 0.
    held = [m.base_arrays()[0] for m in sites if keep_mask or not isinstance(m.base, Held)]
    share = sum(float((a == 0).sum()) for a in held) / max(sum(a.size for a in held), 1)
    if not keep_mask:
        if share > 0.01:
            warn(
                f"the base is pruned ({share:.1%} of the adapted weights are 0), the merged weights are dense. --keep-mask keeps the zeros."
            )
        return
    lost = _disagreement(_form_of(merged_base(model)), merged)
    warn(f"--keep-mask: {share:.1%} of the adapted weights stay 0. The adapter's change of them is lost: {lost}.")


def _disagreement(exact: Form, other: Form) -> str:
    """How far two models are apart, in words."""
    random = np.random.default_rng(0)
    if isinstance(exact.base, VisionBase):
        size, what = exact.base.pixels.size, "2 random images"
        inputs: tuple[Any, ...] = (jnp.asarray(random.standard_normal((2, *size, len(exact.base.pixels.mean))), jnp.float32),)
    else:
        what = "4 x 32 random tokens"
        tokens = jnp.asarray(random.integers(0, exact.base.config.vocab, (4, 32)), jnp.int32)
        inputs = (tokens, tokens) if isinstance(exact.base, EncoderDecoder) else (tokens,)

    def outputs(form: Form) -> np.ndarray:
        model: Any = form.classifier or form.base
        return np.asarray(nnx.jit(model)(*inputs), np.float64)

    wanted, found = outputs(exact), outputs(other)
    largest = f"the largest is {np.abs(wanted).max():.3g}"
    return f"outputs on {what} differ from the adapted model's by up to {np.abs(wanted - found).max():.3g} ({largest})"


def _say_rounded(form: Form, exact: Form, rounded: Form) -> None:
    """Says what it costs to quantise merged weights again."""
    label, apart = quantised_sites(form.classifier or form.base)[0].base.form.label, 0.0
    whole = dict(nnx.iter_modules(exact.classifier or exact.base))
    for path, module in nnx.iter_modules(rounded.classifier or rounded.base):
        if isinstance(module, Held) and not isinstance(other := whole[path], Held):
            weight = "embedding" if hasattr(other, "embedding") else "kernel"
            apart = max(apart, float(jnp.abs(getattr(module, weight)[...] - getattr(other, weight)[...]).max()))
    warn(
        f"--requantize: the merged weights are quantised again ({label}). The weights differ from the merged ones by up to "
        f"{apart:.3g}; {_disagreement(exact, rounded)}."
    )


def check_form(model: nnx.Module) -> Form:
    """The model as transformers would have it.

    Raises:
        InputError: it has no such thing: the message says what is in the way.
    """
    form = _form_of(model)
    if form.classifier is None:
        return form
    shape, kind = form.classifier.shape, form.classifier.kind
    name = class_name(form, kind)
    if form.head is None:
        raise InputError(f"the head has no counterpart in transformers, which has no {name}.")
    if shape.reads != form.head.shape.reads:
        raise InputError(
            f"the head reads the {shape.reads} of the tokens, and transformers' {name} the {form.head.shape.reads}: "
            "it would compute something else (a head trained with task.pooling: cls can be exported)."
        )
    if shape.pooler and isinstance(form.base, Encoder) and not form.base.config.pooler:
        raise InputError(
            f"{form.origin.source}: was saved without a pooler. transformers' {name} needs one and would initialise it at random."
        )
    return form


def architecture(model_type: str, head: str | None = None) -> str:
    """The name of transformers' class.

    Args:
        model_type: Hugging Face's name of the family.
        head: its kind (`models/layers.py`); by default a decoder's own projection to its vocabulary, and none on an encoder.

    >>> architecture("bert", "classification"), architecture("gpt2")
    ('BertForSequenceClassification', 'GPT2LMHeadModel')
    """
    return find_family({"model_type": model_type}, "model_type").class_name(head)


def class_name(form: Form, head: str | None = None) -> str:
    """The name of transformers' class of a model; `head` is as for `architecture`."""
    return find_family(form.origin.config, form.origin.source).class_name(head)


def _form_of(model: nnx.Module) -> Form:
    base = model if isinstance(model, Base) else getattr(model, "base", None)
    if not isinstance(base, Base):
        raise InputError(f"a {type(model).__name__} has no counterpart in transformers; only models from load_model do.")
    if base.origin is None:
        raise InputError("the model was not loaded from a checkpoint, so the names of its weights in transformers are unknown.")
    if not isinstance(model, Classifier):
        return Form(base, None, None)
    return Form(base, model, head_of(model))


def _files(form: Form) -> BaseFiles:
    """The checkpoint that the base was loaded from, with its head where that was loaded too."""
    loaded = form.classifier is not None and not form.classifier.new
    return BaseFiles(form.origin.source, head=form.classifier.kind if form.classifier and loaded else None)


def stored_dtypes(form: Form) -> dict[str, np.dtype]:
    """Parameter path -> dtype in the checkpoint, the base's paths from the base on. A new head is as exact as it was trained."""
    stored = {path.removeprefix("base."): dtype for path, dtype in _files(form).stored_dtypes().items()}
    new = {} if form.head is None else dict.fromkeys(form.head.weights(), DTYPES["F32"])
    tied = {"lm_head.kernel": stored["embed.embedding"]} if "embed.embedding" in stored else {}  # where it is not stored
    return new | tied | stored


def _tensors(form: Form, dtypes: Mapping[str, np.dtype], carried: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors under transformers' names; `carried` are those that the model has no part of (`BaseFiles.carried`)."""
    family = find_family(form.origin.config, form.origin.source)
    tensors = {**base_tensors(form.base, dtypes), **carried}
    if form.head is None or form.classifier is None:
        return tensors
    unused = {n for n in carried if n.startswith("pooler.")}
    unused |= {w.name for path, w in family.weights(form.base.config).items() if path.startswith("lm_head.")}
    if not form.head.shape.pooler:
        unused |= {w.name for path, w in family.weights(form.base.config).items() if path.startswith("pooler.")}
    prefix = family.prefixes[-1] if family.kind in ("encoder", "vision") else ""
    old, new = form.head.renamed or ("", "")
    named = {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in tensors.items() if n not in unused}
    return {prefix + n: t for n, t in named.items()} | _head_tensors(form.classifier, form.head, dtypes)


def _head_tensors(classifier: Classifier, head: Head, dtypes: Mapping[str, np.dtype]) -> dict[str, Tensor]:
    found = {}
    for path, weight in head.weights().items():
        array = np.asarray(operator.attrgetter(path)(classifier)[...])
        array = np.ascontiguousarray(array.T) if weight.transpose else array
        found[weight.name] = Tensor(array.shape, array.dtype, lambda array=array: array).cast(dtypes[path])
    return found


def _config(form: Form, classes: Sequence[str] | None, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if find_family(form.origin.config, form.origin.source).timm:
        return _timm_config(form, classes)
    config = {key: value for key, value in form.origin.config.items() if key not in _DROPPED}
    config["architectures"] = [class_name(form, form.classifier and form.classifier.kind)]
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[str(tensor.dtype)] = sizes.get(str(tensor.dtype), 0) + tensor.nbytes
    config["dtype"] = max(sizes, key=lambda name: sizes[name])
    # Of an encoder-decoder that key says something else, and a projection that differs from the embedding is found by itself.
    if isinstance(form.base, Decoder) and form.classifier is None:
        config["tie_word_embeddings"] = form.base.config.tied
    if form.classifier is not None:
        count = form.classifier.classes
        names = list(classes or form.classifier.class_names) or [f"LABEL_{i}" for i in range(count)]
        if len(names) != count:
            raise InputError(f"classes: {len(names)} names for {count} classes.")
        config |= {"id2label": {str(i): n for i, n in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}
    return config


def _timm_config(form: Form, classes: Sequence[str] | None) -> dict[str, Any]:
    """In timm's words, which transformers reads as well (`TimmWrapper`)."""
    config = form.origin.config
    if form.classifier is None:
        return config
    names = list(classes or form.classifier.class_names)
    count = form.classifier.classifier.kernel.shape[-1]
    if names and len(names) != count:
        raise InputError(f"classes: {len(names)} names for {count} classes.")
    named = {"label_names": names} if names and names != list(class_names(config)) else {}
    return config | {"num_classes": count} | named


def _folder_of(source: str) -> Path:
    path = resolve(source, key="model.source", hub_patterns=HUB_FILES)
    return path if path.is_dir() else path.parent


def _is_gguf(source: str) -> bool:
    return weights_file(resolve(source, key="model.source", hub_patterns=HUB_FILES), key="model.source").suffix == ".gguf"


def write_reader(folder: Path, source: str) -> None:
    """The files of the tokenizer or image processor as they stand; those that a GGUF file's metadata amounts to."""
    if _is_gguf(source):
        load_tokenizer(source).save_pretrained(folder)
        return
    for name in _READER_FILES:
        if (file := _folder_of(source) / name).is_file():
            shutil.copyfile(file, folder / name)  # what a link points to, and not the link


def _generation_config(form: Form) -> dict[str, Any] | None:
    if not isinstance(form.base, Generative) or form.classifier is not None:
        return None
    file = _folder_of(form.origin.source) / "generation_config.json"
    if not _is_gguf(form.origin.source) and file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    special = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
    return {key: form.origin.config[key] for key in special if form.origin.config.get(key) is not None}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class HuggingFaceExporter(Exporter):
    """A checkpoint of transformers."""

    summary = "Merged weights, config and tokenizer, for transformers."
    default = True
    runtime = Runtime("config.json", "run_checkpoint.py", "lora-jax")
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "dtype": tuple(WRITTEN_DTYPES),
        "max_shard_size": (),
        "keep_mask": (),
        "requantize": (),
    }

    def can(self, restored: Restored) -> str | None:
        """Why transformers could not compute the same; None where it can."""
        try:
            check_form(restored.model)
        except InputError as error:
            return str(error)
        return None

    def write(self, restored: Restored, folder: Path, options: ExportOptions) -> None:
        """Weights, config, tokenizer, generation config and a model card."""
        model, kind = restored.model, kind_of(restored.model)
        form = check_form(model)
        classes = None if form.classifier is None else restored.classes
        choices = {"keep_mask": bool(options.keep_mask), "requantize": bool(options.requantize)}
        _write(model, folder, classes=classes, dtype=options.dtype, largest=options.max_shard_size or SHARD, **choices)
        assert kind is not None
        name = class_name(form, form.classifier and form.classifier.kind)
        variable, reader = ("processor", "AutoImageProcessor") if isinstance(form.base, VisionBase) else ("tokenizer", "AutoTokenizer")
        usage = [
            f"from transformers import {kind.auto_class}, {reader}",
            "",
            f'model = {kind.auto_class}.from_pretrained("PATH")',
            f'{variable} = {reader}.from_pretrained("PATH")',
        ]
        summary = f"`{{base}}` with a trained adapter merged into its weights ({name})."
        write_card(folder, model_card(restored, library="transformers", relation="finetune", summary=summary, usage=usage))


EXPORTERS.register("hf", HuggingFaceExporter())
