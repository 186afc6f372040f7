"""Loading: a checkpoint's tensors, one at a time, into the stacked parameters of a model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..config.errors import InputError
from .checkpoint import Checkpoint, open_checkpoint
from .decoder import Decoder
from .encoder import Encoder
from .families import Family, Weight, find_family

Base = Encoder | Decoder


def load_model(source: str, *, dtype: str = "float32", remat: str = "dots", dropout: float = 0.0, key: str = "model.source") -> Base:
    """A pretrained base.

    Args:
        source: a Hugging Face folder, a .safetensors or .gguf file, `hf://org/name[@revision]`, `package://import_name/path`.
        dtype: of weights and matmuls, `float32` or `bfloat16`.
        remat: what each layer keeps for the backward pass: `none` (all but weight slices), `dots` (matmul results), `full` (its input).
        dropout: rate of the model's own dropout while training: on the embeddings, attention's shares and each sub-layer's output.
        key: what to call the source in error messages.

    Returns:
        an `Encoder` or `Decoder`. Host memory stays below the weights plus one stacked parameter.

    Raises:
        InputError: no such source, an unsupported `model_type`, damaged files, missing tensors or wrong shapes.
    """
    checkpoint = open_checkpoint(source, key=key)
    where = f"{key}: {source}"
    family = find_family(checkpoint.config, where)
    config = family.config(checkpoint.config, jnp.dtype(dtype))
    names = set(checkpoint.names())
    prefix = _prefix(family, names)
    if family.kind == "encoder" and prefix + "pooler.dense.weight" not in names:
        config = dataclasses.replace(config, pooler=False)
    table = {path: dataclasses.replace(w, name=prefix + w.name) for path, w in family.weights(config).items()}
    _check_names(table, config.depth, names, where)

    make = Encoder if family.kind == "encoder" else Decoder
    model = nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    filled = []
    for path, variable in flat:
        name = ".".join(str(p) for p in path).replace("layers.segments.0.block.", "layers.")
        filled.append((path, variable.replace(_read(checkpoint, table[name], variable.shape, variable.dtype, where))))
    model = nnx.merge(graphdef, nnx.from_flat_state(filled))
    model.layers.remat, model.dropout = remat, dropout
    model.site_aliases = nnx.static(_aliases(family.weights(config)))
    return model


def _prefix(family: Family, names: set[str]) -> str:
    return next((p for p in family.prefixes if p and any(n.startswith(p) for n in names)), "")


def _check_names(table: dict[str, Weight], depth: int, names: set[str], where: str) -> None:
    wanted = {w.name.replace("{i}", str(i)) for w in table.values() for i in range(depth if "{i}" in w.name else 1)}
    missing = sorted(wanted - names)
    if missing:
        raise InputError(f"{where}: {len(missing)} tensors are missing, among them {', '.join(missing[:4])}.")


def _aliases(table: dict[str, Weight]) -> tuple[tuple[str, str], ...]:
    """Module path -> Hugging Face module path, from the parameters' names."""
    pairs = {path.rsplit(".", 1)[0]: w.name.removesuffix(".weight") for path, w in table.items() if w.name.endswith(".weight")}
    return tuple(sorted(pairs.items()))


def _read(checkpoint: Checkpoint, weight: Weight, shape: tuple[int, ...], dtype: np.dtype, where: str) -> jax.Array:
    def tensor(name: str, expected: tuple[int, ...]) -> np.ndarray:
        array = checkpoint.read(name)
        array = array.T if weight.transpose else array
        if array.shape != expected:
            raise InputError(f"{where}: '{name}' has shape {array.shape}, the config asks for {expected}.")
        return array

    if "{i}" not in weight.name:
        return jax.block_until_ready(jnp.asarray(tensor(weight.name, shape), dtype))
    stacked = np.empty(shape, dtype)
    for i in range(shape[0]):
        stacked[i] = tensor(weight.name.replace("{i}", str(i)), shape[1:])
    return jax.block_until_ready(jnp.asarray(stacked))
