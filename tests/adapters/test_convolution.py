"""Convolutions as sites: `nnx.Conv` of any stride, padding and dilation, under every method that adapts them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.adapters.bank import AdapterBank
from lora_jax.adapters.convolution import convolve
from lora_jax.adapters.inject import inject, site_modules
from lora_jax.adapters.merge import merge, merged_base, unmerge
from lora_jax.adapters.partition import partition
from lora_jax.adapters.sites import find_sites, passed_over
from lora_jax.config.doors import METHODS
from lora_jax.errors import InputError
from lora_jax.training.adapter_files import load_adapter, save_adapter
from tests import tiny

# Options of `nnx.Conv` for an input of 9 x 8 pixels.
GEOMETRY: dict[str, dict[str, Any]] = {
    "same": {"kernel_size": (3, 3)},
    "strided": {"kernel_size": (3, 3), "strides": 2},
    "even": {"kernel_size": (4, 2), "strides": (3, 1), "padding": ((1, 2), (0, 1))},
    "symmetric": {"kernel_size": (5, 3), "strides": 2, "padding": 1},
    "dilated": {"kernel_size": (3, 2), "kernel_dilation": (2, 3), "strides": (2, 1), "padding": "VALID"},
    "pointwise": {"kernel_size": (1, 1), "strides": 2, "padding": 0},
    "around": {"kernel_size": (3, 3), "padding": "CIRCULAR"},
    "mirrored": {"kernel_size": (3, 4), "padding": "REFLECT"},
    "no bias": {"kernel_size": (2, 2), "use_bias": False},
}
METHODS_OF_CONVOLUTIONS = [n for n, m in METHODS.all().items() if "convolution" in m.kinds and type(m).__module__.startswith("lora_jax.")]


def image(channels: int = 6, *, rows: int = 2) -> Any:
    return np.random.default_rng(0).standard_normal((rows, 9, 8, channels)).astype(np.float32)


def conv_net(name: str, channels: int = 6, outputs: int = 5) -> Any:
    return tiny.random_model(lambda: nnx.Dict(conv=nnx.Conv(channels, outputs, **GEOMETRY[name], rngs=nnx.Rngs(0))))


@pytest.mark.parametrize("columns", [2, 6])
@pytest.mark.parametrize("name", GEOMETRY)
def test_a_matrix_in_the_place_of_the_kernel(name: str, columns: int) -> None:
    """Few columns go by products that are shifted, many by a convolution: both are Flax's own with that kernel."""
    conv = conv_net(name, outputs=columns).conv
    options: Any = GEOMETRY[name] | {"use_bias": False}
    plain = nnx.Conv(6, columns, rngs=nnx.Rngs(0), **options)
    plain.kernel = conv.kernel
    x = image()
    found = convolve(conv, x, conv.kernel[...].reshape(-1, columns))
    assert found.shape == plain(x).shape
    np.testing.assert_allclose(found, plain(x), atol=2e-5)
    np.testing.assert_allclose(convolve(conv, x[0], conv.kernel[...].reshape(-1, columns)), plain(x[0]), atol=2e-5)


@pytest.mark.parametrize("size", [(3,), (2, 1, 2)])
def test_one_and_three_axes(size: tuple[int, ...]) -> None:
    conv: Any = nnx.Conv(4, 2, size, strides=2, padding="CAUSAL" if len(size) == 1 else "SAME", rngs=nnx.Rngs(0))
    x: Any = np.random.default_rng(0).standard_normal((2, *(5, 6, 7)[: len(size)], 4)).astype(np.float32)
    for columns in (1, 4):
        matrix = jnp.concatenate([conv.kernel[...].reshape(-1, 2)] * 2, 1)[:, :columns]
        np.testing.assert_allclose(convolve(conv, x, matrix)[..., :1], conv(x)[..., :1], atol=1e-5)


@pytest.mark.parametrize("method", METHODS_OF_CONVOLUTIONS)
@pytest.mark.parametrize("name", ["strided"])
def test_every_method_starts_as_the_base_and_merges_into_the_kernel(method: str, name: str) -> None:
    model, x = conv_net(name), image()
    options: dict[str, Any] = {"method": method, "rank": 2, "targets": "convolutions"} | ({"target_r": 1} if method == "adalora" else {})
    adapted: Any = inject(model, tiny.adapter(**options), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(adapted.conv(x), model.conv(x), atol=1e-5)
    rng = np.random.default_rng(1)
    for variable in jax.tree.leaves(nnx.state(adapted, nnx.LoRAParam), is_leaf=lambda v: isinstance(v, nnx.Variable)):
        variable.set_value(variable[...] + jnp.asarray(0.3 * rng.standard_normal(variable.shape), jnp.float32))
    changed = adapted.conv(x)
    assert changed.shape == model.conv(x).shape and np.abs(changed - model.conv(x)).max() > 1e-3
    merged: Any = merge(adapted)
    plain: Any = merged_base(adapted)
    undone: Any = unmerge(merged)
    np.testing.assert_allclose(merged.conv(x), changed, atol=1e-5 * max(1, float(jnp.abs(changed).max())))
    assert type(plain.conv) is nnx.Conv
    np.testing.assert_array_equal(undone.conv(x), changed)


@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora", "milora", "orthogonal", "zero_a", "loftq", "mica"])
def test_inits_that_read_no_data(init: str) -> None:
    model, x = conv_net("symmetric"), image()
    adapted: Any = inject(model, tiny.adapter(rank=2, targets=["conv"], init=init), rngs=nnx.Rngs(0))
    if init != "orthogonal":  # which is none at the start
        np.testing.assert_allclose(adapted.conv(x), model.conv(x), atol=1e-5)


def test_low_rank_factors_are_a_convolution_and_a_pointwise_one() -> None:
    model, x = conv_net("strided"), image()
    adapted = tiny.trained(model, targets=["conv"], rank=3, dropout=0.5)
    (site,) = find_sites(model)
    assert (site.kind, site.inputs, site.outputs, site.window, site.dilated) == ("convolution", 54, 5, (3, 3), False)
    held: Any = adapted.conv
    a, b = held.lora_a[...].reshape(3, 3, 6, 3), held.lora_b[...].reshape(1, 1, 3, 5)
    run: Any = jax.lax.conv_general_dilated
    numbers = ("NHWC", "HWIO", "NHWC")
    low = run(x, a, (2, 2), "SAME", dimension_numbers=numbers)
    wanted = model.conv(x) + held.scale[...] * run(low, b, (1, 1), "VALID", dimension_numbers=numbers)
    held.deterministic = True
    np.testing.assert_allclose(held(x), wanted, atol=1e-5)


def test_a_stack_of_members_convolves_one_input_once() -> None:
    """Members that share their input share the base's convolution: the compiled program has it once, whatever their number."""
    model, x = conv_net("same"), image()
    adapted = tiny.trained(model, targets=["conv"], rank=2)
    graphdef, own, rest = nnx.split(adapted, nnx.LoRAParam, ..., graph=True)
    members = jax.tree.map(lambda a: jnp.stack([a, 2 * a, 3 * a]), own)
    run = jax.jit(jax.vmap(lambda own: nnx.merge(graphdef, own, rest).conv(x)))
    text = run.lower(members).as_text()
    assert text.count("stablehlo.convolution") == 1 and "tensor<3x2x9x8x6xf32>" not in text
    np.testing.assert_allclose(run(members)[0], adapted.conv(x), atol=1e-5)


def test_files_and_mixed_batches(tmp_path: Any) -> None:
    model, x = conv_net("even"), image()
    adapted = tiny.trained(model, targets=["conv"], rank=2)
    part, identity = partition(adapted), {"base": "f", "method": "lora", "sites": {}}
    save_adapter(tmp_path / "final", part.trainable, identity)
    back = load_adapter(tmp_path / "final", part.trainable, identity)
    loaded: Any = part.merge(back, part.settings, part.frozen, training=False)
    np.testing.assert_array_equal(loaded.conv(x), adapted.conv(x))
    bank = AdapterBank(model)
    bank.add("own", adapted)
    mixed: Any = bank.mixed([None, "own"])
    np.testing.assert_array_equal(mixed.conv(x)[0], model.conv(x)[0])
    np.testing.assert_allclose(mixed.conv(x)[1], adapted.conv(x)[1], atol=1e-5)


def test_what_is_no_site_says_why() -> None:
    def conv(**options: Any) -> nnx.Conv:
        return nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0), **options)

    model = nnx.Dict(
        grouped=conv(feature_group_count=2), masked=conv(mask=jnp.ones((3, 3, 4, 4))), holes=conv(input_dilation=2),
        own=conv(conv_general_dilated=lambda *a, **k: jax.lax.conv_general_dilated(*a, **k)),
        up=nnx.ConvTranspose(4, 4, (3, 3), rngs=nnx.Rngs(0)), fine=conv(),
    )  # fmt: skip
    passed = passed_over(model)
    assert {name: why.split("(")[0].strip() for name, why in passed.items()} == {
        "grouped": "a grouped convolution", "masked": "a convolution with a mask", "holes": "a convolution with input_dilation",
        "own": "it has a conv_general_dilated of its own", "up": "transposed convolutions are not supported",
    }  # fmt: skip
    assert [s.name for s in find_sites(model)] == ["fine"]
    with pytest.raises(
        InputError, match=r"'grouped' means grouped, which cannot be adapted: a grouped convolution \(feature_group_count = 2"
    ):
        inject(model, tiny.adapter(targets=["grouped"]), rngs=nnx.Rngs(0))
    with pytest.warns(UserWarning, match="'convolutions' passes over 5"):
        assert list(site_modules(inject(model, tiny.adapter(targets="convolutions"), rngs=nnx.Rngs(0)))) == ["fine"]
    with pytest.raises(InputError, match="'lokr' adapts linear sites, and fine is a convolution site"):
        inject(model, tiny.adapter(method="lokr", targets=["fine"]), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="'eva' starts linear sites, and fine is a convolution site"):
        inject(model, tiny.adapter(init="eva", targets=["fine"]), rngs=nnx.Rngs(0))
