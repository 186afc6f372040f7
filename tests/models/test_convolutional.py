"""Convolutional nets: their layers, and what holds for packs over one of them (DESIGN.md, section 4)."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.adapters.inject import inject
from lora_jax.adapters.merge import merge, merged_base, unmerge
from lora_jax.adapters.partition import partition
from lora_jax.adapters.sites import find_sites, passed_over
from lora_jax.models.convolution import BatchNorm, DepthwiseConv, even, max_pool
from lora_jax.models.convolutional import (
    ConvNext,
    ConvNextConfig,
    EfficientNet,
    EfficientNetConfig,
    MobileBlock,
    ResNet,
    ResNetBlock,
    ResNetConfig,
)
from lora_jax.models.heads import ImageClassifier
from lora_jax.packing.pack import Pack
from lora_jax.training.trunk import trunk_depth
from lora_jax.weights.provenance import fingerprint
from tests import tiny

RESNET = ResNetConfig((ResNetBlock(8, 12, None, 1), ResNetBlock(12, 16, 8, 2), ResNetBlock(16, 16, 8, 1)), width=8)
MOBILE = (MobileBlock(8, 8, 8, False, 3, 1, even(1), 2, True), MobileBlock(8, 24, 12, True, 5, 2, "SAME", None, False))
EFFICIENT = EfficientNetConfig(MOBILE, 8, even(0, 1), 16, activation="relu6")
NEXT = ConvNextConfig((8, 12), (1, 2), patch=2)
NETS: dict[str, Any] = {"resnet": (ResNet, RESNET), "efficientnet": (EfficientNet, EFFICIENT), "convnext": (ConvNext, NEXT)}
SIDE, STEPS = 16, 6


def net(name: str) -> Any:
    make, config = NETS[name]
    base = tiny.random_model(lambda: make(config, rngs=nnx.Rngs(0)))
    for _, module in nnx.iter_modules(base):
        if isinstance(module, BatchNorm):  # no running variance is negative
            module.var.set_value(0.5 + jnp.abs(module.var[...]))
            module.scale.set_value(1 + 0.2 * module.scale[...])
    return base


def classifier(name: str) -> Any:
    return ImageClassifier(net(name), 3, rngs=nnx.Rngs(1))


def batch(step: int, rows: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    one = {
        "pixels": rng.integers(0, 256, (rows, SIDE, SIDE, 3), np.uint8),
        "segment_ids": np.ones((rows, 1), np.int32),
        "tokens": np.ones((rows, 1), np.int32),
    }
    one |= {"target_index": np.arange(rows, dtype=np.int32), "target_ids": rng.integers(0, 3, rows, np.int32)}
    return {name: array[None] for name, array in (one | {"target_weights": np.ones(rows, np.float32)}).items()}


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, even(1)), (5, 2, "SAME"), (3, 2, even(0, 1)), (4, 1, "SAME")])
def test_channels_by_themselves(kernel: int, stride: int, padding: Any) -> None:
    own: Any = DepthwiseConv(6, kernel, stride, padding, bias=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 8, 6)), jnp.float32)

    def both(run: Any) -> Any:
        return jax.value_and_grad(lambda x, kernel: jnp.sin(run(x, kernel)).sum(), (0, 1))(x, own.kernel[...])

    def mine(x: Any, kernel: Any) -> Any:
        clone = nnx.clone(own)
        clone.kernel.set_value(kernel)
        return clone(x)

    numbers = ("NHWC", "HWIO", "NHWC")
    convolve: Any = jax.lax.conv_general_dilated
    plain = both(lambda x, k: convolve(x, k, (stride, stride), padding, dimension_numbers=numbers, feature_group_count=6) + own.bias[...])
    for a, b in zip(jax.tree.leaves(both(mine)), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_largest_of_nine() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 8, 3)), jnp.float32)
    pool: Any = nnx.max_pool
    np.testing.assert_array_equal(max_pool(x), pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1))))


@pytest.mark.parametrize("name", NETS)
def test_sites_layers_and_what_trains(name: str) -> None:
    model = classifier(name)
    sites = find_sites(model)
    assert set(passed_over(model)) == {s for s in passed_over(model) if s.endswith("depthwise")}
    assert {s.kind for s in sites if "blocks" in s.name and "proj" not in s.name} <= {"convolution"}
    with pytest.warns(UserWarning, match="passes over") if passed_over(model) else contextlib.nullcontext():
        adapted = inject(model, tiny.adapter(rank=2, targets="convolutions", layers="last:2"), rngs=nnx.Rngs(0))
    part = partition(adapted)
    adapted_blocks = {int(n.split("blocks.")[1].split(".")[0]) for n in part.trainable if "lora" in n}
    depth = len(model.base.blocks.names)
    assert adapted_blocks and adapted_blocks <= {depth - 2, depth - 1}
    statistics = [n for n in part.frozen if n.endswith((".mean", ".var"))]
    assert bool(statistics) == (name != "convnext") and not any(n.endswith((".mean", ".var")) for n in part.trainable)


def test_running_statistics_are_part_of_the_base() -> None:
    base = net("resnet")
    before = fingerprint(base)
    base.stem_norm.mean.set_value(base.stem_norm.mean[...] + 1)
    assert fingerprint(base) != before


@pytest.mark.parametrize(
    "name",
    [pytest.param("resnet", marks=pytest.mark.slow), *(pytest.param(n, marks=pytest.mark.long) for n in ("efficientnet", "convnext"))],
)
def test_adapters_start_as_the_base_and_merge(name: str) -> None:
    model, x = classifier(name), jnp.asarray(np.random.default_rng(0).standard_normal((2, SIDE, SIDE, 3)), jnp.float32)
    targets: Any = r".*(down|project|up_proj|down_proj|squeeze|stem_conv)" if name != "resnet" else "convolutions"
    options = {"targets": targets, "rank": 2}
    start = inject(model, tiny.adapter(**options), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(tiny.outputs(start, x, bits=True), tiny.outputs(model, x, bits=True))
    adapted = tiny.trained(model, **options)
    changed = tiny.outputs(adapted, x)
    assert np.abs(changed - tiny.outputs(model, x)).max() > 1e-3
    for merged in (merge(adapted), merged_base(adapted)):
        np.testing.assert_allclose(tiny.outputs(merged, x), changed, atol=2e-5 * max(1, np.abs(changed).max()))
    np.testing.assert_array_equal(tiny.outputs(unmerge(merge(adapted)), x, bits=True), tiny.outputs(adapted, x, bits=True))


@pytest.mark.long
def test_a_pack_equals_its_solo_runs_and_compiles_once() -> None:
    model = classifier("resnet")
    members = [
        {"rank": 2, "targets": "convolutions"},
        {"rank": 4, "targets": ["conv2"], "alpha": 4, "dropout": 0.2},
        {"rank": 1, "targets": "convolutions", "layers": "last:2"},
    ]
    configs = [
        tiny.config(**{f"adapter__{k}": v for k, v in m.items()}, training__seed=3 + i, optimizer__learning_rate=5e-3, optimizer__eps=1e-3)
        for i, m in enumerate(members)
    ]

    def run(pack: Pack) -> tuple[Any, np.ndarray]:
        state, losses = pack.state, []
        for step in range(STEPS):
            state, metrics = pack.programs.train(state, pack.fixed, pack.part.frozen, batch(step), np.int32(step))
            losses.append(np.asarray(metrics.loss))
        pack.programs.check()
        assert pack.programs.train.traces.count == 1
        return state, np.stack(losses)

    pack = Pack.build(model, configs, STEPS)
    state, losses = run(pack)
    assert np.isfinite(losses).all() and np.ptp(losses[:, 0]) > 1e-3
    for k, config in enumerate(configs[:2]):
        alone = Pack.build(model, [config], STEPS)
        solo, curve = run(alone)
        assert tiny.relative(losses[:, k], curve[:, 0]) < 1e-5
        mine, wanted = pack.member_arrays(model, k, state.trainable), alone.member_arrays(model, 0, solo.trainable)
        for array, values in mine.items():
            assert tiny.relative(values, wanted[array]) < 2e-4, array


@pytest.mark.parametrize("side", [SIDE, 36])
def test_a_net_goes_on_from_its_trunk(side: int) -> None:
    """The blocks below the lowest adapted one are shared; what enters those above is put in rows for each position, and taken out again."""
    model, x = classifier("resnet"), jnp.asarray(np.random.default_rng(0).standard_normal((2, side, side, 3)), jnp.float32)
    adapted: Any = tiny.trained(model, targets="convolutions", layers="last:2")
    base = adapted.base
    assert base.trunk_depth == 1 and model.base.trunk_depth == 0

    @jax.jit
    def both(x: Any) -> Any:
        trunk = base.trunk(x)
        return trunk, base.hidden(x), base.hidden(x, trunk=trunk)

    trunk, whole, above = both(x)
    assert trunk.shape[:2] == (2, base.tokens((side, side)))
    np.testing.assert_allclose(above, whole, rtol=1e-5, atol=1e-5)
    micro = {name: array[0] for name, array in batch(0).items()}
    assert trunk_depth(partition(adapted), micro) == 1
    stem: Any = tiny.trained(model, targets=["stem_conv", "blocks.2.conv1"])
    assert stem.base.trunk_depth == 2 and trunk_depth(partition(stem), micro) == 0
