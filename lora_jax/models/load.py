"""Loading: a checkpoint's tensors to the stacked parameters of a model, through one table of names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from ..config.schema import TransformConfig
from ..errors import InputError, warn
from ..parallel.mesh import parameter_sharding, place
from ..weights.load import HUB_FILES, open_checkpoint, resolve
from ..weights.pixels import read_pixel_spec
from ..weights.provenance import Origin
from ..weights.safetensors import Tensor
from .add_head import add_head, check_head
from .decoder import Decoder
from .encoder import Encoder
from .encoder_decoder import EncoderDecoder, Generative
from .families import check_config, find_family, gguf_architectures
from .families.base import HEAD_CLASSES, Family, Head, Weight, size
from .heads import Classifier
from .held import hold
from .layers import AXES, HeadShape
from .policy import Policy
from .stack import stacks_of
from .tensors import aliases
from .transforms.base import Base, TransformContext, apply_transforms
from .transforms.calibration import Calibrate
from .vision import VisionBase


class BaseFiles:
    """A pretrained base before it is loaded: headers and config are read, no weights.

    Args:
        source: a Hugging Face folder, a .safetensors or .gguf file, `hf://org/name[@revision]`, `package://import_name/path`.
        dtype: of weights and matmuls, `float32` or `bfloat16`.
        remat: what each layer keeps for the backward pass: `none` (all but weight slices), `dots` (matmul results), `full` (its input).
        scan_layers: one loop over the layers; otherwise each is compiled by itself (`Stack.scan`).
        dropout: rate of the model's own dropout while training: on the embeddings, attention's weights and each sub-layer's output.
        train_batch_stats: whether batch norms use each batch's own statistics while training, and update their running ones.
        key: what to call the source in error messages.
        head: the kind of trained head to load with it (`models/layers.py`), if any.
        transforms: sections of what is done to the base once it is loaded (`models/transforms/`), in this order.
        quantized: `keep` leaves what the checkpoint holds quantised so in memory (`models/held.py`); `dequantize` does not.

    Attributes:
        model: the base, or with a head the `Classifier`, before any transform; its parameters are shapes (`jax.ShapeDtypeStruct`).

    Raises:
        InputError: no such source, an unsupported `model_type`, damaged files or missing tensors.
    """

    def __init__(
        self,
        source: str,
        *,
        dtype: str = "float32",
        remat: str = "dots",
        scan_layers: bool = True,
        dropout: float = 0.0,
        train_batch_stats: bool = False,
        key: str = "model.source",
        head: str | None = None,
        transforms: Sequence[TransformConfig] = (),
        quantized: str = "dequantize",
    ):
        self._source, self._transforms = source, transforms
        self._checkpoint = open_checkpoint(source, key=key, architectures=gguf_architectures())
        self._where = f"{key}: {source}"
        hf = self._checkpoint.config
        family = find_family(hf, self._where)
        names = set(self._checkpoint.names())
        try:
            check_config(hf, map(self._checkpoint.shape, names))
            config = family.config(hf, jnp.dtype(dtype))
            heads = family.heads(hf)
        except InputError as error:
            raise InputError(f"{self._where}: {error}") from None
        except (TypeError, AttributeError, LookupError, ArithmeticError) as error:  # a value of a type that the family does not expect
            raise InputError(f"{self._where}: config.json cannot be understood as {hf.get('model_type', 'timm')}'s ({error}).") from None
        own = self._head(heads, head, names) if head is not None else None
        prefix = self._prefix = _prefix(family, names)
        if family.kind == "encoder" and prefix + "pooler.dense.weight" not in names:
            config = dataclasses.replace(config, pooler=False)
        if family.kind == "encoder_decoder":
            # As transformers has it: a projection of its own is what differs from the embedding, whatever the config says.
            table, output = family.weights(config)["embed.embedding"].found(names).name, "lm_head.weight"
            apart = output in names and table in names and not self._same(output, table)
            stored = config.longest if config.sinusoidal and any(n.endswith("encoder.embed_positions.weight") for n in names) else 0
            config = dataclasses.replace(
                config, tied=not apart, logit_bias="final_logits_bias" in names, positions=stored or config.positions
            )
        if own is not None and family.kind == "decoder":
            config = dataclasses.replace(config, tied=True)  # it projects to no vocabulary, and was saved without what would
        # A decoder that was saved by itself, as its output heads' base, lacks what stands before its names beside them.
        root = family.root if own is None and not any(n.startswith(family.root) for n in names) else ""
        table = {path: w.under(lambda n: prefix + n.removeprefix(root)) for path, w in family.weights(config).items()}
        make: Any = (
            family.model or {"encoder": Encoder, "decoder": Decoder, "encoder_decoder": EncoderDecoder, "policy": Policy}[family.kind]
        )
        shapes: tuple[tuple[str, HeadShape], ...] = tuple((kind, h.shape) for kind, h in heads.items())

        def build() -> Base | Classifier:
            base = make(config, rngs=nnx.Rngs(0))
            base.head_shapes = nnx.static(shapes)
            if isinstance(base, VisionBase):
                file = Path(resolve(source, key=key, hub_patterns=HUB_FILES))
                base.pixels = nnx.static(read_pixel_spec(file if file.is_dir() else file.parent, hf, channels=config.channels))
            if own is None or head is None:
                return base
            return add_head(base, head, len(class_names(hf)), rngs=nnx.Rngs(0))

        self.model: Base | Classifier = nnx.eval_shape(build)
        if isinstance(self.model, Classifier) and own is not None:
            self.model.new, self.model.class_names = nnx.static(()), nnx.static(class_names(hf))
            table = {f"base.{path}": _renamed(w, own) for path, w in table.items()} | own.weights()
        self._table = {path: weight.found(names) for path, weight in table.items()}
        self._carried = {n for n in names if family.carried and re.fullmatch(family.carried, n.removeprefix(prefix))}
        self._check_tensors(names - self._carried, {name.partition(".")[0] for h in heads.values() for name in h.modules.values()})
        self._held = {}
        if quantized == "keep":
            inside = () if self.model is self.base else ("base",)
            held = hold(self.base, self._table, "".join(f"{part}." for part in inside), self._checkpoint, self._where)
            self._held = {(*inside, *path): weight for path, weight in held.items()}
        base = self.base
        if isinstance(base, Policy) and dropout:
            raise InputError(f"model.dropout: {dropout:g}, but the policy {source} has none.")
        if isinstance(base, VisionBase) and dropout and not base.drops:
            raise InputError(f"model.dropout: {dropout:g}, but the convolutional net {source} has none.")
        if train_batch_stats:
            norms = base.batch_norms if isinstance(base, VisionBase) else []
            if not norms:
                raise InputError(f"model.train_batch_stats: true, but {source} has no batch norms that could be trained.")
            for norm in norms:
                norm.train(getattr(base.config, "norm_momentum", norm.momentum))
        for stack in stacks_of(base):
            stack.remat, stack.scan = remat, scan_layers
        base.dropout = dropout
        base.site_aliases = nnx.static(aliases(family.weights(config)))
        base.origin = nnx.static(Origin.of(source, hf, prefix))

    @property
    def base(self) -> Base:
        """The pretrained model in it."""
        return self.model.base if isinstance(self.model, Classifier) else self.model

    def stored_dtypes(self) -> dict[str, np.dtype]:
        """Parameter path (`layers.attn.q_proj.kernel`) -> the dtype it has in the checkpoint; what is quantised there is float32."""
        names = {path: w.name.replace("{i}", str(w.first)).replace("{e}", "0") for path, w in self._table.items()}
        return {path: self._checkpoint.dtype(name) for path, name in names.items()}

    def carried(self) -> dict[str, Tensor]:
        """The checkpoint's tensors that the model computes nothing with but an export hands on (`Family.carried`), without prefix."""
        read = self._checkpoint

        def one(name: str) -> Tensor:
            return Tensor(read.shape(name), read.dtype(name), lambda: read.read(name))

        return {name.removeprefix(self._prefix): one(name) for name in sorted(self._carried)}

    def _head(self, heads: dict[str, Head], kind: str, names: set[str]) -> Head:
        """A kind of head as this checkpoint has it; `InputError` where it has none."""
        check_head(kind)
        if kind not in heads:
            raise InputError(f"{self._where}: models of this family bear no head here.")
        # Several kinds may go by the same tensor names: what the checkpoint says it is decides.
        saved = [
            k for k, suffix in HEAD_CLASSES.items() if any(a.endswith(suffix) for a in self._checkpoint.config.get("architectures") or [])
        ]
        missing = sorted(w.name for w in heads[kind].weights().values() if w.name not in names)
        if missing or (saved and kind not in saved):
            why = f"no tensor '{missing[0]}'" if missing else f"it has one for {saved[0]}"
            raise InputError(f"{self._where}: holds no trained head for {kind} ({why}). add_head, or task.head: new, makes a new one.")
        return heads[kind]

    def load(self, mesh: Mesh | None = None, calibrate: Calibrate | None = None) -> Base | Classifier:
        """The model with its weights.

        Args:
            mesh: where they are put, by their logical axes, as they are read; a process reads what lies on its own devices. None: on
                the default device.
            calibrate: `lora_jax.calibrate`, for transforms that read rows of text.

        Raises:
            InputError: a file changed or cannot be read any more, or a transform cannot do what its section asks for.
        """
        self._check_tied()
        (graphdef, state), filled = nnx.split(self.model), []
        held: tuple[Any, dict[str, np.ndarray]] = ((), {})
        for path, variable in nnx.to_flat_state(state):
            axes = variable.get_metadata().get(AXES, (None,) * len(variable.shape))
            sharding = None if mesh is None else parameter_sharding(mesh, variable.shape, axes)
            if path[:-1] in self._held and path[-1] != "bias":
                if held[0] != path[:-1]:  # the arrays of one layer follow one another
                    held = path[:-1], self._held[path[:-1]].read()
                array = held[1].pop(str(path[-1]))
                filled.append((path, variable.replace(jnp.asarray(array) if sharding is None else place(array, sharding))))
                continue
            filled.append((path, variable.replace(self._read(self._weight(path), variable.shape, variable.dtype, sharding))))
        model = nnx.merge(graphdef, nnx.from_flat_state(filled))
        options = (self._transforms, TransformContext(self._source, mesh, calibrate))
        if not isinstance(model, Classifier):
            return apply_transforms(model, *options)
        model.base = cast(Encoder | Decoder, apply_transforms(model.base, *options))
        return model

    def _weight(self, path: tuple[Any, ...]) -> Weight:
        return self._table[".".join(str(p) for p in path).replace("layers.segments.0.block.", "layers.")]

    def _check_tensors(self, names: set[str], heads: set[str]) -> None:
        """That every parameter has its tensors, of the right shape; and a word of those that none has."""
        missing, used = [], set()
        for path, variable in nnx.to_flat_state(nnx.state(self.model)):
            weight = self._weight(path)
            wanted = _tensor_shape(weight, variable.shape)
            for _, _, name in weight.tensors(variable.shape):
                used.add(name)
                if name not in names:
                    missing.append(name)
                elif (found := weight.oriented(self._checkpoint.shape(name))) != wanted:
                    file = self._checkpoint.file(name)
                    raise InputError(f"{self._where}: '{name}' has shape {found} in {file.name}, the config asks for {wanted}.")
        if missing:
            there = f" The file has {', '.join(sorted(names - used)[:3])}." if names - used else ""
            raise InputError(f"{self._where}: {len(missing)} tensors are missing, among them {', '.join(sorted(missing)[:4])}.{there}")
        unused = sorted(names - used - {n for n in names if _NO_PART.search(n) or n.partition(".")[0] in heads})
        if self.model is not self.base or not isinstance(self.base, Generative):  # a head in place of the one that predicts tokens
            unused = [name for name in unused if not _TOKEN_HEAD.match(name)]
        if unused:
            shown = ", ".join(unused[:6]) + (", ..." if len(unused) > 6 else "")
            count = "a tensor" if len(unused) == 1 else f"{len(unused)} tensors"
            warn(f"{self._where}: {count} of the checkpoint that the model does not use as its config has it: {shown}.")

    def _check_tied(self) -> None:
        """A word where the checkpoint holds a copy of the embedding, as the config has it, that is none."""
        table, output, names = self._table.get("embed.embedding"), "lm_head.weight", self._checkpoint.names()
        if self.model is not self.base or not isinstance(self.base, Generative) or table is None:
            return
        copies = {*table.others, *((output,) if self.base.config.tied else ())} - {table.name}
        for name in sorted(copies & set(names)):
            if not self._same(name, table.name):
                why = "tie_word_embeddings is true" if name == output else "they are one table"
                warn(f"{self._where}: '{name}' differs from '{table.name}', but {why}: the latter is used for both.")

    def _same(self, name: str, other: str) -> bool:
        """Whether two matrices of the checkpoint are equal."""
        rows, width = self._checkpoint.shape(other)
        step = max(1, 2**20 // width)
        parts = [(slice(start, start + step),) for start in range(0, rows, step)]
        read = self._checkpoint.read_slice
        return self._checkpoint.shape(name) == (rows, width) and all(np.array_equal(read(name, p), read(other, p)) for p in parts)

    def _read(self, weight: Weight, shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding | None) -> jax.Array:
        """One parameter. Host memory holds the part of it that lies on this process's devices, and one tensor of it more."""
        lead, wanted = weight.leading, _tensor_shape(weight, shape)
        box = [(0, size) for size in shape] if sharding is None else _own_part(sharding, shape)
        part = np.empty([stop - start for start, stop in box], dtype)
        if weight.first:
            part[...] = 1
        first, last = box[-1]
        for at, piece, name in weight.tensors(shape):
            # What of this piece's outputs is in the box.
            start, stop = (min(max(edge - piece * wanted[-1], 0), wanted[-1]) for edge in (first, last))
            if start == stop or any(not lo <= i < hi for i, (lo, hi) in zip(at, box, strict=False)):
                continue
            inner = (*(slice(*bounds) for bounds in box[lead:-1]), slice(start, stop))
            array = self._checkpoint.read_slice(name, weight.as_stored(inner))
            begin = piece * wanted[-1] + start - first
            index = (*(i - lo for i, (lo, _) in zip(at, box, strict=False)), ..., slice(begin, begin + stop - start))
            part[index] = array.transpose(weight.oriented(range(array.ndim)))
        if sharding is None:
            return jax.block_until_ready(jnp.asarray(part))

        def cut(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            bounds = [s.indices(size) for s, size in zip(index, shape, strict=True)]
            return part[tuple(slice(lo - first, hi - first) for (lo, hi, _), (first, _) in zip(bounds, box, strict=True))]

        return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, cut))


# What checkpoints hold beside parameters, and why. The output heads that a family has are left out as well unless they are asked for.
_NO_PART = re.compile(
    r"((^|\.)position_ids"  # 0, 1, 2, ...
    r"|rotary(_emb|_pos_emb)?\.(inv_freq|cos_cached|sin_cached)"  # follow from the config
    r"|\.(attn|attention)\.(bias|masked_bias)"  # the causal mask (GPT-2, GPT-NeoX)
    r"|(^|\.)pooler\.dense\.(weight|bias)"  # of an encoder whose head asks each token
    r"|^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"  # of the first T5s, never used
    r"|^(model\.)?((encoder|decoder)\.embed_tokens|shared)\.weight|^(encoder|decoder)\.version"  # copies of the embedding (`_check_tied`)
    r"|^(lm_head|embed_out)\.weight)$"  # tied to the embedding (`_check_tied`)
)
_TOKEN_HEAD = re.compile(
    r"(cls|predictions|lm_predictions|mask_predictions|lm_head|vocab_transform|vocab_layer_norm|vocab_projector)\."
    r"|decoder\.(weight|bias)$|head\.(dense|norm)\."
)


def _tensor_shape(weight: Weight, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape, in our layout, of each tensor of a parameter of this shape."""
    return (*shape[weight.leading : -1], shape[-1] // (1 + len(weight.joined)))


class _Options(TypedDict, total=False):
    """What `load_model` takes whatever it loads."""

    dtype: str
    remat: str
    scan_layers: bool
    dropout: float
    train_batch_stats: bool
    key: str
    mesh: Mesh | None
    transforms: Sequence[TransformConfig]
    quantized: str
    calibrate: Calibrate | None


@overload
def load_model(source: str, *, head: None = ..., **options: Unpack[_Options]) -> Base: ...


@overload
def load_model(source: str, *, head: str, **options: Unpack[_Options]) -> Classifier: ...


@overload
def load_model(source: str, *, head: str | None, **options: Unpack[_Options]) -> Base | Classifier: ...


def load_model(
    source: str,
    *,
    dtype: str = "float32",
    remat: str = "dots",
    scan_layers: bool = True,
    dropout: float = 0.0,
    train_batch_stats: bool = False,
    key: str = "model.source",
    mesh: Mesh | None = None,
    head: str | None = None,
    transforms: Sequence[TransformConfig] = (),
    quantized: str = "dequantize",
    calibrate: Calibrate | None = None,
) -> Base | Classifier:
    """A pretrained base: `BaseFiles(source, ...).load(mesh)`, which says what the other arguments are.

    Args:
        head: one of `models.layers.HEADS` (`classification`, `image_classification`, ...) also loads the checkpoint's head of this
            kind. A base without a head gets a new one from `add_head`.

    Returns:
        an `Encoder`, a `Decoder`, an `EncoderDecoder` or a `VisionBase`; with `head` a `Classifier`. Host memory stays below
        the size of the weights on this process's devices plus one stacked parameter.

    Raises:
        InputError: the source does not exist, the `model_type` is unsupported, files are damaged, tensors are missing or of wrong
            shapes, or there is no such head.
    """
    options: dict[str, Any] = {"dtype": dtype, "remat": remat, "scan_layers": scan_layers, "dropout": dropout, "key": key}
    options |= {"transforms": transforms, "quantized": quantized, "train_batch_stats": train_batch_stats}
    return BaseFiles(source, **options, head=head).load(mesh, calibrate)


def class_names(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes that a checkpoint's config names, in order; two where it says nothing (transformers' default)."""
    named = hf.get("id2label")
    if isinstance(named, Mapping) and named and all(str(i).isdecimal() for i in named):
        return tuple(str(named[i]) for i in sorted(named, key=int))
    if isinstance(names := hf.get("label_names"), list) and names:  # timm's
        return tuple(map(str, names))
    return tuple(f"LABEL_{i}" for i in range(size(hf, "num_classes" if "num_classes" in hf else "num_labels", 2)))


def _renamed(weight: Weight, head: Head) -> Weight:
    """Where a parameter of the base comes from in a checkpoint that was saved with a head."""
    old, new = head.renamed or ("", "")
    return weight.under(lambda name: new + name.removeprefix(old) if name.startswith(old) else name)


def _own_part(sharding: NamedSharding, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """`(start, stop)` per axis of the smallest block that holds what lies on this process's devices."""
    indices = list(sharding.addressable_devices_indices_map(shape).values())
    bounds = [[s.indices(size)[:2] for s, size in zip(index, shape, strict=True)] for index in indices if index is not None]
    return [(min(b[axis][0] for b in bounds), max(b[axis][1] for b in bounds)) for axis in range(len(shape))]


def _prefix(family: Family, names: set[str]) -> str:
    return next((p for p in family.prefixes if p and any(n.startswith(p) for n in names)), "")
