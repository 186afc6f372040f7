"""`--format gguf`: a merged language model as one file that llama.cpp runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from flax import nnx

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from ...adapters.merge import merged_base
from ...config.doors import EXPORTERS
from ...errors import InputError, warn
from ...models.decoder import Decoder
from ...models.tensors import base_tensors
from ...sweeps.restore import Restored
from ...weights.safetensors import Tensor
from ..card import model_card, write_card
from ..export import Exporter, ExportOptions, Runtime
from ..hf import check_form, stored_dtypes
from .file import architecture_of, gguf_tensors, write_gguf
from .settings import check_said, say_windows, settings_of, tables_of
from .tokenizer import check_tokenizer, tokenizer_metadata

NAME = "model.gguf"
_F32, _F16, _BF16, _Q8_0, _Q4_0 = (GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0"))
# `--dtype` -> what most weights are stored as, and llama.cpp's number of such a file.
TYPES = {
    "float32": (_F32, LlamaFileType.ALL_F32),
    "float16": (_F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (_BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (_Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (_Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
_QUANTISATION_VERSION = 2
# Weights by which every token is looked up or told from the others: of a q4_0 file they are stored as q8_0.
_VOCABULARY = ("token_embd.weight", "output.weight")
# What llama.cpp reads as float32 alone.
_ALWAYS_FLOAT32 = ("position_embd.weight",)


def language_model(model: nnx.Module) -> Decoder:
    """The decoder of a model that predicts tokens, adapted or not.

    Raises:
        InputError: it is something else.
    """
    form = check_form(model)
    if form.classifier is not None or not isinstance(form.base, Decoder):
        what = "a classifier" if form.classifier is not None else "no decoder"
        raise InputError(f"it is {what}; GGUF files hold language models here.")
    return form.base


class GGUFExporter(Exporter):
    """A merged model for llama.cpp and what is built on it."""

    summary = "Merged language model in one file, with its tokenizer, for llama.cpp."
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {"dtype": tuple(TYPES)}
    runtime = Runtime(NAME, "run_checkpoint.py", "lora-jax")

    def can(self, restored: Restored) -> str | None:
        """Why llama.cpp could not compute the same; None where it can."""
        try:
            base = language_model(restored.model)
            settings_of(base, architecture_of(base))
            assert base.origin is not None
            tokenizer_metadata(base.origin.source, base.config.vocab, base.origin.config)
        except InputError as error:
            return str(error)
        return None

    def write(self, restored: Restored, folder: Path, options: ExportOptions) -> None:
        """`model.gguf` and a card."""
        write_model(restored.model, folder / NAME, dtype=options.dtype, name=restored.member.config.name)
        usage = ["import lora_jax", "", f'model = lora_jax.load_model("PATH/{NAME}")', f"# llama.cpp: llama-cli -m PATH/{NAME}"]
        summary = "`{base}` with a trained adapter merged into its weights, in GGUF."
        write_card(folder, model_card(restored, library="gguf", relation="quantized", summary=summary, usage=usage))


def write_model(model: nnx.Module, path: Path, *, dtype: str | None = None, name: str = "model") -> None:
    """Writes a language model as a GGUF file; an adapter is merged.

    The file is read back: its settings have to mean this model, its tokenizer has to cut texts as the base's does.

    Args:
        model: from `load_model`, with or without an adapter.
        path: the file.
        dtype: one of `TYPES`; None: each weight as the base's files have it, what is quantised there as float32.
        name: `general.name`.

    Raises:
        InputError: llama.cpp has no such model, or GGUF no way to say it.
    """
    form = check_form(model)
    base = language_model(merged_base(model))
    architecture = architecture_of(base)
    assert base.origin is not None
    metadata: dict[str, Any] = {"general.type": "model", "general.name": name} | settings_of(base, architecture)
    metadata |= tokenizer_metadata(base.origin.source, base.config.vocab, base.origin.config)
    wrong: list[str] = []

    def kind_of(name: str, tensor: Tensor) -> GGMLQuantizationType:
        if len(tensor.shape) < 2 or name in _ALWAYS_FLOAT32:
            return _F32
        wanted = _of_dtype(tensor.dtype) if dtype is None else TYPES[dtype][0]
        wanted = _Q8_0 if wanted is _Q4_0 and name in _VOCABULARY else wanted
        if tensor.shape[-1] % GGML_QUANT_SIZES[wanted][0]:
            wrong.append(name)
            return _F16
        return wanted

    tensors = gguf_tensors(base, architecture, base_tensors(base, stored_dtypes(form) if dtype is None else None), kind_of)
    if wrong:
        warn(f"{len(wrong)} weights are written as float16, among them '{wrong[0]}': their rows are no whole number of {dtype} blocks.")
    most = max((sum(t.nbytes for t in tensors.values() if t.kind is kind), number) for kind, number in TYPES.values())[1]
    metadata |= {"general.file_type": int(most), "general.quantization_version": _QUANTISATION_VERSION}
    say_windows(base, architecture)
    write_gguf(path, architecture.name, metadata, tensors | tables_of(base))
    check_said(path, base, architecture)
    check_tokenizer(path, base.origin.source)


def _of_dtype(dtype: np.dtype) -> GGMLQuantizationType:
    return {"float16": _F16, "bfloat16": _BF16}.get(dtype.name, _F32)


EXPORTERS.register("gguf", GGUFExporter())
