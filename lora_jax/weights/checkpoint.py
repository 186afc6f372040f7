"""Named tensors on disk, read one at a time, whatever file they lie in.

A `Checkpoint` speaks Hugging Face: its names (`model.layers.0.self_attn.q_proj.weight`), its layout (a linear weight is
`(out, in)`) and its config dict. Opening one reads headers only; each `read` opens the file, takes the bytes asked for and
closes it again, so a model never lies in memory twice and no mapping keeps it there.
"""

from __future__ import annotations

import dataclasses
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from ..errors import InputError, hint, warn
from .quantized import QuantFormat


class Checkpoint(ABC):
    """Read-only named tensors plus the Hugging Face config dict they belong to.

    Attributes:
        path: the file or folder it was opened from.
        config: what `config.json` says (for a GGUF file: what it would say).
    """

    path: Path
    config: dict[str, Any]

    @abstractmethod
    def names(self) -> list[str]:
        """Every tensor's Hugging Face name, in file order."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that `read(name)` gives; a linear weight is `(out, in)`."""

    @abstractmethod
    def dtype(self, name: str) -> np.dtype:
        """The dtype that `read(name)` gives: the stored one (bfloat16 through ml_dtypes); float32 for quantised tensors."""

    def read(self, name: str) -> np.ndarray:
        """The tensor, in fresh memory: nothing else keeps it alive."""
        return self.read_slice(name, ())

    def read_slice(self, name: str, index: Sequence[slice]) -> np.ndarray:
        """`read(name)[tuple(index)]`, touching little more of the file than that.

        Args:
            index: up to one slice per axis, of step 1: what `jax.make_array_from_callback` passes.

        Raises:
            InputError: a number of it is NaN or infinite.
        """
        array = self._read_slice(name, index)
        if not all_finite(array):
            count = int(np.count_nonzero(~np.isfinite(array)))
            raise InputError(
                f"{self.file(name)}: '{name}' holds numbers that are not finite: {count:,} of {array.size:,} are NaN or infinite."
                " The file is damaged, or its training had diverged when it was saved."
            )
        return array

    @abstractmethod
    def _read_slice(self, name: str, index: Sequence[slice]) -> np.ndarray:
        """The same, whatever the numbers are."""

    def quantised(self, name: str) -> str:
        """How the tensor is stored, where that is quantised; else nothing."""
        return ""

    def held(self, name: str, *, transposed: bool = False) -> QuantFormat | None:
        """The format in which the tensor, a matrix (outputs, inputs), is stored quantised and can stay so; None where it is not.

        Args:
            name: of the tensor.
            transposed: whether Hugging Face has it as (inputs, outputs).
        """
        return None

    def read_held(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of the format that `held` gives, the matrix's rows in Hugging Face's order."""
        raise self._missing(name)

    def file(self, name: str) -> Path:
        """The file that the tensor lies in."""
        return self.path

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def _missing(self, name: str) -> InputError:
        return InputError(f"{self.path}: no tensor '{name}'. {hint(name, self.names())}".rstrip())


def all_finite(array: np.ndarray) -> bool:
    """Whether no number of an array is NaN or infinite; one without floats has none.

    It compares bits as whole numbers, so that the arrays of every dtype are read at the speed of memory, and none is copied.

    >>> all_finite(np.float16([1, -65504])), all_finite(np.float16([1, -np.inf]))
    (True, False)
    """
    try:
        limits = ml_dtypes.finfo(array.dtype)
    except ValueError:  # whole numbers
        return True
    size = array.dtype.itemsize
    largest = int(np.asarray(limits.max, array.dtype).view(f"i{size}"))
    if not array.size or largest < 0:  # float8_e8m0, which scales are stored in, has no sign
        return True
    # Without their sign, infinity and NaN are above the largest number. With it, negative ones are the largest of all.
    positive, negative = array.view(f"i{size}").max(), array.view(f"u{size}").max()
    return int(positive) <= largest and int(negative) <= largest + (1 << (8 * size - 1))


@dataclasses.dataclass(frozen=True)
class GGUFWeight:
    """What a module of a GGUF file is in Hugging Face's layout, and which changes of llama.cpp's converter are undone to its tensors.

    Attributes:
        name: Hugging Face's path of the module, `{i}` standing for the layer.
        pairs: the config key of a number of heads. Rotary position embedding turns pairs of a head's features: Hugging Face pairs i with
            i + half a head, some models of llama.cpp 2i with 2i + 1; the converter moved the rows within each head.
        thirds: the config key of a number of heads, of a module whose rows Hugging Face has head by head (the first head's query, key
            and value, the second's, ...), and GGUF part by part (all queries, all keys, all values).
        transposed: whether Hugging Face has the weight as (in, out).
        added: what the converter added to the weight.
    """

    name: str
    pairs: str = ""
    thirds: str = ""
    transposed: bool = False
    added: float = 0.0


@dataclasses.dataclass(frozen=True)
class GGUFArchitecture:
    """How GGUF files of one `general.architecture` map to Hugging Face; a family brings its own (`Family.gguf`).

    Attributes:
        name: of the architecture in GGUF.
        model_type: Hugging Face's name of it.
        weights: GGUF's name of a module (`token_embd`, `blk.{i}.attn_q`) -> what it is.
        biases: config keys that are true when the tensor named beside them is there.
        layer_norms: whether norms are layer norms; else RMS norms.
        rotary: which features of a head are turned with the position: `whole` heads, a `part` of each where the file says so, or `none`.
        config: (`weights.gguf_config.GGUFSettings`, the config in the keys that most families share) -> the family's config; the latter
            as it is where it is None. What it does not read of the settings is named when the file is opened.
        settings: a model's own config (`models.decoder.DecoderConfig`) -> the settings that a file of it has beside those of every
            architecture, by the names that `config` reads; none where it is None.
        windows: whether llama.cpp applies windows of attention.
    """

    name: str
    model_type: str
    weights: Mapping[str, GGUFWeight]
    biases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layer_norms: bool = False
    rotary: Literal["whole", "part", "none"] = "whole"
    config: Callable[[Any, dict[str, Any]], dict[str, Any]] | None = None
    settings: Callable[[Any], dict[str, Any]] | None = None
    windows: bool = False


# What wrappers of PyTorch modules put before all names; those without a sense of their own also stand inside names.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel",
    "_fsdp_wrapped_module.": "FSDP",
    "_forward_module.": "Lightning Fabric",
    "base_model.model.": "PEFT",
}
_INSIDE = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# Layer norms of TensorFlow's days. A model may have a `gamma` that is something else: only what is called a norm is meant.
_OLD_NORMS = re.compile(r"(?i:(norm\w*|ln\w*))\.(?P<old>gamma|beta)$")
_NOT_MERGED = re.compile(r"\.(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|base_layer|original_module)(\.|$)")


def plain_names(path: Path, stored: Iterable[str]) -> dict[str, str]:
    """The names as transformers has them -> the names in the file: without wrappers' prefixes, with norms called by today's names.

    Raises:
        InputError: two tensors would get one name, or a PEFT model was saved whole, its adapters not merged.
    """
    stored = list(stored)
    adapted = next((name for name in stored if _NOT_MERGED.search(name)), None)
    if adapted is not None:
        raise InputError(
            f"{path}: '{adapted}' belongs to a PEFT model that was saved with its adapters beside the weights. Merge them first"
            " (merge_and_unload), or give the base here and load the adapter by itself."
        )
    names, removed = stored, []
    while names and (prefix := next((p for p in _WRAPPERS if all(n.startswith(p) for n in names)), None)):
        names = [name.removeprefix(prefix) for name in names]
        removed.append(f"'{prefix}' ({_WRAPPERS[prefix]})")
    inside = next((match[0] for name in names if (match := _INSIDE.search(name))), None)
    if inside:
        names = [_INSIDE.sub("", name) for name in names]
        removed.append(f"'{inside}'")
    if removed:
        warn(f"{path}: the tensors' names are read without the wrapper's part {', '.join(removed)}.")
    there = set(names)
    found: dict[str, str] = {}
    for name, original in zip(names, stored, strict=True):
        old = _OLD_NORMS.search(name)
        if old:
            modern = name[: old.start("old")] + {"gamma": "weight", "beta": "bias"}[old["old"]]
            name = name if modern in there else modern
        if name in found:
            raise InputError(f"{path}: '{found[name]}' and '{original}' both mean '{name}'.")
        found[name] = original
    return found


# A file that was cut into pieces to be carried, which no program reads before they are joined: model.gguf.part00, model.gguf.part1of2.
PIECE = re.compile(r"(?P<whole>.+\.(gguf|safetensors))(?P<cut>[._-](part|split))[-_.]?\w{1,8}")
GGUF_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def first_part(path: Path) -> Path:
    """The first file of the split GGUF model that `path` is a part of, which holds its metadata; `path` itself where it is no such part."""
    match = GGUF_PART.fullmatch(path.name)
    return path.with_name(f"{match['stem']}-00001-of-{match['count']}.gguf") if match else path


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        InputError: it is missing, is not JSON, or is not an object.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file ({what}).") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise InputError(f"{path}: cannot be read as JSON ({error}).") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: {what} should be a JSON object, not {type(value).__name__}.")
    return value


def parse_json(text: str, **options: Any) -> Any:
    """`json.loads` with its options, but a key that stands twice in an object is an error: readers disagree about which is meant.

    Raises:
        ValueError: it is not JSON, or a key stands twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands there twice")
        return value

    return json.loads(text, object_pairs_hook=once, **options)


def slice_bounds(shape: tuple[int, ...], index: Sequence[slice]) -> list[tuple[int, int]]:
    """`(start, stop)` per axis of `shape` for `index`, axes that it does not name whole.

    >>> slice_bounds((4, 6), [slice(1, 3)])
    [(1, 3), (0, 6)]
    """
    if len(index) > len(shape):
        raise ValueError(f"{len(index)} slices for a tensor of {len(shape)} axes")
    bounds = []
    for size, part in zip(shape, [*index, *[slice(None)] * (len(shape) - len(index))], strict=True):
        start, stop, step = part.indices(size)
        if step != 1:
            raise ValueError(f"slices of step 1 only, not {part}")
        bounds.append((start, max(start, stop)))
    return bounds
