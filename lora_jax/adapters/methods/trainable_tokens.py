"""Trainable tokens (PEFT's TRAINABLE_TOKENS): some rows of an embedding are replaced by rows that train.

`token_indices` says which; their values start as the base's rows. They replace rows and are no deltas, so that an adapter means the same
over a base whose rows of new tokens were drawn anew. The indices are a member's own frozen numbers, below 2^24, which float32 holds
exactly; members with as many tokens share a pack. A model whose vocabulary projection has the embedding's own weights is refused: PEFT
replaces the rows of both there, and here an adapter of an embedding leaves the projection as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import AfterValidator, Field

from ...config.schema import AdapterConfig
from ...errors import InputError
from ...models.encoder_decoder import Generative
from ...models.layers import Rows
from ..parameters import Parameter, SiteData
from ..sites import Site
from .base import AdaptedSite, Method, register_method
from .peft_form import PeftForm, Weight


def _distinct(indices: list[int]) -> list[int]:
    if (twice := next((i for i in indices if indices.count(i) > 1), None)) is not None:
        raise ValueError(f"lists {twice} twice")
    return indices


Token = Annotated[int, Field(ge=0, lt=2**24)]


class TrainableTokensSection(AdapterConfig):
    method: Literal["trainable_tokens"] = Field(default="trainable_tokens", description="Some rows of an embedding train.")
    targets: str | list[str] = Field(default="embedding", description="The embeddings, as a preset, a list of names or a regex.")
    token_indices: Annotated[list[Token], AfterValidator(_distinct)] = Field(
        default_factory=list, description="The tokens whose rows train, by their numbers in the tokenizer; at least one."
    )


class TrainableTokensForm(PeftForm):
    """`trainable_tokens_delta` (tokens, width): the rows, in the order of `token_indices`. They are no deltas, whatever the name says."""

    peft_type, prefix, conv1d = "TRAINABLE_TOKENS", "trainable_tokens_", False
    defaults: Mapping[str, Any] = {"init_weights": True, "target_modules": None, "token_indices": []}
    words: Mapping[str, str] = {"token_indices": "token_indices"}
    notes = frozenset({"init_weights"})

    def tensors(self, section: Any, site: Site, rank: int) -> dict[str, tuple[int, ...]]:
        return {"trainable_tokens_delta": (len(section.token_indices), site.outputs)}

    def to_file(self, section: Any, site: Site, rank: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"trainable_tokens_delta": arrays["values"]}

    def from_file(self, section: Any, site: Site, rank: int, tensors: Mapping[str, np.ndarray], weight: Weight) -> dict[str, np.ndarray]:
        return {"values": tensors["trainable_tokens_delta"], "indices": np.array(section.token_indices, np.float32)}


@dataclasses.dataclass(frozen=True, repr=False)
class TrainableTokens(Method):
    """Rows of an embedding that train; `tokens` is how many."""

    tokens: int = 1

    name, section = "trainable_tokens", TrainableTokensSection
    kinds = ("embedding",)
    ignores = ("rank", "rank_pattern", "alpha", "alpha_pattern", "nested_init")
    packs = "activation"
    peft = TrainableTokensForm()

    def __repr__(self) -> str:
        return f"<method {self.name}, {self.tokens} tokens>"

    def variant(self, config: TrainableTokensSection) -> Method:
        return TrainableTokens(len(config.token_indices))

    def check(self, config: TrainableTokensSection, site: Site, rank: int) -> None:
        if not config.token_indices:
            raise InputError("adapter.token_indices: lists no token.")
        if (beyond := max(config.token_indices)) >= site.inputs:
            raise InputError(f"adapter.token_indices: {site.name} has {site.inputs:,} rows, and no row {beyond:,}.")

    def prepare(self, model: nnx.Module) -> None:
        for _, module in nnx.iter_modules(model):
            if isinstance(module, Generative) and module.config.tied and isinstance(module.embed, AdaptedSite):
                raise InputError(
                    f"adapter.method: '{self.name}' replaces rows of the embedding alone, and the model's vocabulary projection has the "
                    "same weights: such models are not supported (modules_to_save trains the whole embedding)."
                )

    def parameters(self, site: Site, rank: int) -> dict[str, Parameter]:
        values = Parameter((self.tokens, site.outputs), axes=(None, "out"), decays=False)
        return {"values": values, "indices": Parameter((self.tokens,), axes=(None,), fill=-1.0, trained=False)}  # -1: no row

    def init(self, site: Site, rank: int, config: Any, random: np.random.Generator, data: SiteData) -> dict[str, np.ndarray]:
        indices = np.array(config.token_indices)
        return {"values": data.weight()[indices], "indices": indices.astype(np.float32)}

    def apply(self, module: AdaptedSite, *inputs: jax.Array, rows: Rows | None) -> jax.Array:
        y = module.base(*inputs)
        same = inputs[0][..., None] == module.indices[...].astype(jnp.int32)
        return jnp.where(same.any(-1)[..., None], module.values[...][same.argmax(-1)].astype(y.dtype), y)

    def merged(self, module: AdaptedSite, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        def replaced(weight: jax.Array, indices: jax.Array, values: jax.Array) -> jax.Array:
            place = jnp.where(indices < 0, weight.shape[0], indices.astype(jnp.int32))
            return weight.at[place].set(values, mode="drop")

        one = jax.vmap(replaced) if module.stacked else replaced
        return one(weight, module.indices[...], module.values[...]), bias

    def cost(self, site: Site, rank: int) -> int:
        return 0


register_method("trainable_tokens", TrainableTokens())
