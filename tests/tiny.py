"""Small random models, configs and batches for tests: width 32, a few layers, 64 tokens, compiled in a second or two."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax.adapters.inject import inject, site_modules
from lora_jax.adapters.methods.base import AdaptedSite
from lora_jax.adapters.parameters import is_base
from lora_jax.config.doors import FAMILIES, METHODS
from lora_jax.config.schema import AdapterConfig, Config
from lora_jax.models.decoder import Decoder, DecoderConfig
from lora_jax.models.encoder import Encoder, EncoderConfig
from lora_jax.models.heads import LanguageModel, SequenceClassifier
from lora_jax.models.layers import BlockConfig, LayerType
from lora_jax.models.positions import Rotary
from lora_jax.models.tensors import aliases

VOCAB, WIDTH, CLASSES = 64, 32, 3

# The names that BERT's and Llama's own checkpoints use, as `load_model` sets them.
BERT_ALIASES = (
    ("layers.attn.q_proj", "encoder.layer.{i}.attention.self.query"),
    ("layers.attn.v_proj", "encoder.layer.{i}.attention.self.value"),
    ("layers.attn.o_proj", "encoder.layer.{i}.attention.output.dense"),
    ("layers.mlp.down_proj", "encoder.layer.{i}.output.dense"),
)
LLAMA_ALIASES = (
    ("layers.attn.q_proj", "model.layers.{i}.self_attn.q_proj"),
    ("layers.mlp.down_proj", "model.layers.{i}.mlp.down_proj"),
    ("embed", "model.embed_tokens"),
)


def random_model(make: Callable[[], nnx.Module], seed: int = 0) -> Any:
    """The model that `make` makes, with parameters drawn by NumPy: nothing is compiled, and no bias is 0 and no norm's scale is 1."""
    graphdef, state = nnx.split(nnx.eval_shape(make), graph=True)
    rng = np.random.default_rng(seed)
    filled = []
    for path, variable in nnx.to_flat_state(state):
        noise = rng.standard_normal(variable.shape, np.float32)
        if path[-1] == "kernel":
            noise /= np.sqrt(variable.shape[-2])
        value = 1 + 0.1 * noise if path[-1] == "scale" else 0.1 * noise if path[-1] == "bias" else noise
        filled.append((path, variable.replace(jnp.asarray(value.astype(variable.dtype)))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def encoder(
    depth: int = 4, *, seed: int = 0, pooler: bool = True, width: int = WIDTH, dtype: Any = jnp.float32, vocab: int = VOCAB
) -> Encoder:
    """A BERT-like encoder."""
    shape = {"width": width, "heads": 4, "kv_heads": 4, "head_dim": width // 4, "hidden": 2 * width}
    options = {"activation": "gelu", "gated": False, "norm": "layer", "norm_eps": 1e-6, "norm_at": "residual"}
    block = BlockConfig(**shape, **options, qkv_bias=True, out_bias=True, mlp_bias=True, dtype=dtype)
    model = random_model(lambda: Encoder(EncoderConfig(block, depth, vocab, 64, 2, pooler), rngs=nnx.Rngs(0)), seed)
    model.site_aliases = nnx.static(BERT_ALIASES)
    return model


def encoder_of(family: str, *, seed: int = 0, **options: Any) -> Encoder:
    """A family's encoder: three layers of 4 heads; `options` are of its Hugging Face config."""
    config = _config_of(family, options)
    return random_model(lambda: Encoder(config, rngs=nnx.Rngs(0)), seed)


def decoder_of(family: str, *, seed: int = 0, **options: Any) -> Decoder:
    """A family's decoder, likewise, with two key/value heads where the family has them and four experts where it has those."""
    config = _config_of(family, options)
    model = random_model(lambda: Decoder(config, rngs=nnx.Rngs(0)), seed)
    model.site_aliases = nnx.static(aliases(FAMILIES.all()[family].weights(config)))
    return model


def _config_of(family: str, options: dict[str, Any]) -> Any:
    shape = {"hidden_size": WIDTH, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 2 * WIDTH, "vocab_size": VOCAB}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    shape |= {"n_embd": WIDTH, "n_head": 4, "n_layer": 3, "n_positions": 64}  # GPT-2's words
    return FAMILIES.all()[family].config(shape | options, jnp.float32)


def smollm2_config(depth: int = 30) -> DecoderConfig:
    """The real SmolLM2-135M's shapes, in float32."""
    shape: dict[str, Any] = {"width": 576, "heads": 9, "kv_heads": 3, "head_dim": 64, "hidden": 1536}
    block = BlockConfig(**shape, activation="silu", gated=True, norm="rms", norm_eps=1e-5)
    return DecoderConfig(block, depth, 49152, (LayerType(rotary=Rotary(64, 100000.0)),), tied=True)


def decoder(
    depth: int = 4,
    *,
    seed: int = 0,
    tied: bool = True,
    width: int = WIDTH,
    dtype: Any = jnp.float32,
    vocab: int = VOCAB,
    bias: bool = False,
) -> Decoder:
    """A Llama-like decoder with two query heads to each key/value head."""
    shape = {"width": width, "heads": 4, "kv_heads": 2, "head_dim": width // 4, "hidden": 2 * width}
    options = {"activation": "silu", "gated": True, "norm": "rms", "norm_eps": 1e-5}
    block = BlockConfig(**shape, **options, qkv_bias=bias, out_bias=bias, dtype=dtype)
    config = DecoderConfig(block, depth, vocab, (LayerType(rotary=Rotary(width // 4)),), tied)
    model = random_model(lambda: Decoder(config, rngs=nnx.Rngs(0)), seed)
    model.site_aliases = nnx.static(LLAMA_ALIASES)
    return model


def classifier(depth: int = 4, *, pooling: str = "cls", classes: int = CLASSES, **options: Any) -> SequenceClassifier:
    """An encoder with a new classification head."""
    return SequenceClassifier(encoder(depth, **options), classes, pooling, rngs=nnx.Rngs(1))


def language_model(depth: int = 4, **options: Any) -> LanguageModel:
    """A decoder as the training step takes it."""
    return LanguageModel(decoder(depth, **options))


def config(**values: Any) -> Config:
    """A config; `section__key=value` sets one key. Its model and task name nothing that exists."""
    raw: dict[str, Any] = {
        "name": "tiny",
        "model": {"source": "nowhere"},
        "task": {"kind": "classification", "source": "nowhere.csv", "text": "text", "label": "label"},
        "adapter": {"rank": 4},
        "optimizer": {"learning_rate": 1e-2},
        "training": {"steps": 20},
    }
    for name, value in values.items():
        section, _, key = name.partition("__")
        raw[section][key] = value
    return Config.model_validate(raw)


def batch(
    seed: int = 0, *, rows: int = 4, length: int = 12, micro: int = 1, causal: bool = False, classes: int = CLASSES, vocab: int = VOCAB
) -> dict[str, np.ndarray]:
    """A random batch as `train_step` takes it: two examples to a row and some padding, a leading micro-batch axis.

    Args:
        causal: next-token targets at the second half of each example; otherwise a class at each example's first token.
    """
    return stack_micro([_micro(np.random.default_rng([seed, i]), rows, length, causal, classes, vocab) for i in range(micro)])


def stack_micro(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Micro-batches of equal shapes to one batch."""
    return {name: np.stack([p[name] for p in parts]) for name in parts[0]}


def _micro(rng: np.random.Generator, rows: int, length: int, causal: bool, classes: int, vocab: int) -> dict[str, np.ndarray]:
    tokens = rng.integers(1, vocab, (rows, length))
    positions, segments = np.zeros((2, rows, length), int)
    count = rows * length // 2 if causal else 2 * rows + 1  # the same in every micro-batch: one shape, the rest has weight 0
    examples = np.full((rows, length), count)
    targets: list[int] = []
    for row in range(rows):
        first = int(rng.integers(3, length // 2))
        second = int(rng.integers(3, length - first))
        for k, (start, size) in enumerate(((0, first), (first, second))):
            here = slice(start, start + size)
            positions[row, here] = np.arange(size)
            segments[row, here] = k + 1
            examples[row, here] = 2 * row + k
            flat = row * length + start
            targets += range(flat + size // 2, flat + size - 1) if causal else [flat]
    tokens[segments == 0] = 0
    index, weights = np.zeros(count, int), np.zeros(count, np.float32)
    index[: len(targets)], weights[: len(targets)] = targets, 1.0
    ids = np.append(tokens.reshape(-1), 0)[index + 1] if causal else rng.integers(0, classes, count)
    arrays = {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": segments,
        "example_ids": examples,
        "target_index": index,
        "target_ids": ids,
    }
    return {name: a.astype(np.int32) for name, a in arrays.items()} | {"target_weights": weights}


def adapter(**values: Any) -> AdapterConfig:
    """The section of a method, LoRA's by default."""
    return METHODS.get(values.get("method", "lora"), "method").section(**values)


def trained(model: nnx.Module, seed: int = 1, **values: Any) -> Any:
    """The model with an adapter whose factors are far from their start; `values` are of LoRA's section."""
    adapted = inject(model, adapter(**({"rank": 4} | values)), rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for site in site_modules(adapted).values():
        for factor in (site.lora_a, site.lora_b):
            factor[...] = factor[...] + jnp.asarray(0.1 * rng.standard_normal(factor.shape), jnp.float32)
    return adapted


def update_of(site: AdaptedSite) -> jax.Array:
    """What an adapter adds to the weight of its site, of the layers that it has arrays for: (..., inputs, outputs) float32."""
    weight = getattr(site.base, site.weight)
    return site.method.merged(site, jnp.zeros((*site.scale.shape, *weight.shape[site.scale.ndim :])), None)[0]


def arrays_equal(a: Any, b: Any) -> bool:
    """Whether two trees have the same bits."""
    a, b = jax.tree.map(np.asarray, (a, b))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


def relative(a: Any, b: Any) -> float:
    """Largest difference over the largest magnitude of `b`."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30))


def base_arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    """Path -> value of every parameter of the base."""
    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in nnx.iter_graph(model) if is_base(v)}


def exact(function: Any) -> Any:
    """`jax.jit` with XLA's fusion off: every operation then rounds by itself, so that equal formulas give equal bits.

    With fusion on, XLA may contract a product and a sum to one rounding, and where it does depends on all that surrounds them.
    """
    return jax.jit(function, compiler_options={"xla_disable_hlo_passes": "fusion"})


def outputs(model: nnx.Module, *args: Any, bits: bool = False, method: str = "__call__", **kwargs: Any) -> np.ndarray:
    """`model(*args, **kwargs)` or another method of it, compiled; with `bits`, compiled by `exact`."""
    graphdef, state = nnx.split(model, graph=True)
    run = (exact if bits else jax.jit)(lambda state, args, kwargs: getattr(nnx.merge(graphdef, state), method)(*args, **kwargs))
    return np.asarray(run(state, args, kwargs))


@contextlib.contextmanager
def quick_compile() -> Iterator[None]:
    """LLVM's expensive passes off: programs that run for milliseconds compile twice as fast. XLA's own passes stay as they are."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
