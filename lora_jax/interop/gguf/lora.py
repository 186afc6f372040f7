"""`--format gguf-lora`: an adapter alone, for llama.cpp's `--lora`, which adds `alpha / rank * B A` to each weight that it names."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from flax import nnx

from gguf.constants import GGMLQuantizationType

from ...adapters.inject import LABEL, site_modules
from ...adapters.labels import FROZEN
from ...adapters.methods.base import AdaptedSite
from ...adapters.parameters import is_base
from ...adapters.sites import logical_name
from ...config.doors import EXPORTERS
from ...errors import InputError
from ...models.decoder import Decoder
from ...models.families import find_family
from ...sweeps.restore import Restored
from ...weights.gguf import row_order
from ..card import model_card, write_card
from ..export import Exporter, ExportOptions
from .file import GGUFOutput, architecture_of, heads_of, modules, write_gguf
from .model import language_model

NAME = "adapter.gguf"
# What such a file says it is.
_MARKS = {key: value for key, _, value in (mark.partition("=") for mark in ("general.type=adapter", "adapter.type=lora"))}
_KINDS = {"float32": GGMLQuantizationType.F32, "float16": GGMLQuantizationType.F16}


@dataclasses.dataclass(frozen=True)
class _Change:
    """What an adapter adds to one weight: `scale * b @ a`, in llama.cpp's layout of the weight (outputs, inputs).

    Attributes:
        name: GGUF's name of the weight.
        a, b: (rank, inputs) and (outputs, rank), float32.
        scale: of the product.
        looked_up: whether the weight is the embedding of tokens, whose `a` llama.cpp looks up by rows.
    """

    name: str
    a: np.ndarray
    b: np.ndarray
    scale: float
    looked_up: bool

    @property
    def alpha(self) -> float:
        """The alpha that gives the scale at this rank."""
        return self.scale * len(self.a)


class GGUFLoraExporter(Exporter):
    """An adapter as llama.cpp adds it to a base of its own."""

    summary = "The adapter alone, for llama.cpp's --lora."
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {"dtype": tuple(_KINDS)}

    def can(self, restored: Restored) -> str | None:
        """Why llama.cpp could not add it to the base; None where it can."""
        try:
            base = language_model(restored.model)
            architecture_of(base)
            _check(base, restored.model)
        except InputError as error:
            return str(error)
        return None

    def write(self, restored: Restored, folder: Path, options: ExportOptions) -> None:
        """`adapter.gguf` and a card."""
        write_adapter(restored.model, folder / NAME, dtype=options.dtype or "float32", name=restored.member.config.name)
        usage = [f"# llama-cli -m BASE.gguf --lora PATH/{NAME}"]
        write_card(
            folder,
            model_card(restored, library="gguf", relation="adapter", summary="An adapter for `{base}`, in GGUF.", usage=usage),
        )


def write_adapter(model: nnx.Module, path: Path, *, dtype: str = "float32", name: str = "adapter") -> None:
    """Writes a model's adapter as a GGUF file. One alpha holds for all of it: what scale a weight has beyond that is part of its B.

    Args:
        model: an adapted language model.
        path: the file.
        dtype: `float32` or `float16`.
        name: `general.name`.

    Raises:
        InputError: llama.cpp cannot add what was trained, or it changes nothing.
    """
    base = language_model(model)
    _check(base, model)
    changes = list(_changes(base))
    if not changes:
        raise InputError("the adapter changes nothing: all its B are 0.")
    alpha = float(np.float32(Counter(float(np.float32(c.alpha)) for c in changes).most_common(1)[0][0]))
    tensors = {}
    for change in changes:
        b = change.b if np.float32(change.alpha) == np.float32(alpha) else change.b * np.float32(change.alpha / alpha)
        a = change.a.T if change.looked_up else change.a
        for part, array in (("a", a), ("b", b)):
            tensors[f"{change.name}.lora_{part}"] = GGUFOutput(array.shape, _KINDS[dtype], lambda array=array: array)
    metadata = {**_MARKS, "general.name": name, "adapter.lora.alpha": alpha}
    write_gguf(path, architecture_of(base).name, metadata, tensors)


def _check(base: Decoder, model: nnx.Module) -> None:
    """`InputError` where more was trained than llama.cpp adds, or something else."""
    sites = site_modules(base)
    for module in sites.values():
        method = module.method
        if method.low_rank(module) is None:
            raise InputError(
                f"its method '{method.name}' changes a weight by more than a scaled product of two small matrices, and llama.cpp adds"
                " nothing else. --format gguf writes the merged model."
            )
        if module.kind == "expert":
            raise InputError("it adapts the experts of a mixture, which have no form in GGUF here.")
        if module.kind == "embedding" and base.config.tied:
            raise InputError(
                "it adapts the embedding, which is the projection to the vocabulary too: llama.cpp would change both."
                " --format gguf writes the merged model."
            )
    for path, variable in nnx.iter_graph(model):
        if is_base(variable) and variable.get_metadata().get(LABEL, FROZEN) != FROZEN:
            raise InputError(
                f"it trained '{logical_name(path)}' itself, and llama.cpp adds to weights alone. --format gguf writes all of it."
            )
    if not sites:
        raise InputError("it has no adapter.")


def _changes(base: Decoder) -> Iterator[_Change]:
    assert base.origin is not None
    names = modules(architecture_of(base))
    table = find_family(base.origin.config, base.origin.source).weights(base.config)
    for path, module in nnx.iter_modules(base):
        if not isinstance(module, AdaptedSite):
            continue
        looked_up = module.kind == "embedding"
        own = table[f"{logical_name(path)}.{'embedding' if looked_up else 'kernel'}"]
        name, weight = names[own.name.removesuffix(".weight")]
        for layer, a, b, scale in _layers(module, base.config.depth):
            used = (a != 0).any(0) & (b != 0).any(1)  # padding is 0, in A or in B
            if used.any() and scale:
                full = f"{name.replace('{i}', str(layer))}.weight"
                order = row_order(weight, heads_of(base.config), b.shape[1], f"'{full}'")
                b = b[used].T if order is None else b[used].T[np.argsort(order)]
                yield _Change(full, np.ascontiguousarray(a[:, used].T), np.ascontiguousarray(b), scale, looked_up)


def _layers(module: AdaptedSite, depth: int) -> Iterator[tuple[int, np.ndarray, np.ndarray, float]]:
    """(layer, A (inputs, rank), B (rank, outputs), scale) of the layers that a site has arrays for: the topmost of a stack."""
    found: Any = module.method.low_rank(module)
    a, b, scale = (np.asarray(array, np.float32) for array in found)
    if not module.stacked:
        yield 0, a, b, float(scale.reshape(()))
        return
    scales = np.broadcast_to(scale.reshape(-1), len(a))
    yield from ((depth - len(a) + i, a[i], b[i], float(scales[i])) for i in range(len(a)))


EXPORTERS.register("gguf-lora", GGUFLoraExporter())
