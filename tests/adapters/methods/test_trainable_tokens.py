"""Rows of an embedding that are replaced by trained ones."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.adapters.inject import inject, site_modules
from lora_jax.adapters.merge import merge
from lora_jax.config.doors import METHODS
from lora_jax.config.load import with_values
from lora_jax.errors import InputError
from tests import tiny


def test_rows_are_replaced_and_no_others() -> None:
    model = tiny.decoder(1, tied=False)
    adapted = inject(model, tiny.adapter(method="trainable_tokens", token_indices=[7, 2]), rngs=nnx.Rngs(0))
    (site,) = site_modules(adapted).values()
    np.testing.assert_array_equal(site.values[...], model.embed.embedding[...][np.array([7, 2])])
    rows = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)
    site.values.set_value(site.values[...] * 0 + rows)
    tokens = jnp.array([[2, 3, 7, 63]], jnp.int32)
    wanted, merged = np.array(model.embed(tokens)), merge(adapted)
    wanted[0, 0], wanted[0, 2] = rows[1], rows[0]
    np.testing.assert_array_equal(site(tokens), wanted)
    np.testing.assert_array_equal(dict(nnx.iter_modules(merged))["embed",](tokens), wanted)  # pyright: ignore[reportCallIssue]


def test_what_it_refuses() -> None:
    def section(**values):
        return tiny.adapter(method="trainable_tokens", **values)

    with pytest.raises(InputError, match="vocabulary projection has the same weights"):
        inject(tiny.decoder(1), section(token_indices=[1]), rngs=nnx.Rngs(0))
    untied = tiny.decoder(1, tied=False)
    with pytest.raises(InputError, match="embed has 64 rows, and no row 64"):
        inject(untied, section(token_indices=[1, 64]), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="lists no token"):
        inject(untied, section(), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="adapts embedding sites"):
        inject(untied, section(token_indices=[1], targets=["q_proj"]), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=r"adapter.token_indices: lists 3 twice"):
        with_values(tiny.config(adapter__method="trainable_tokens"), {"adapter.token_indices": [3, 3]})
    sets = [METHODS.all()["trainable_tokens"].variant(section(token_indices=tokens)) for tokens in ([1, 2], [5, 3], [1])]
    assert sets[0] == sets[1] != sets[2]  # members with as many tokens share a pack
