"""Each init against a float64 transcription of its paper, in the paper's own shapes: W (outputs, inputs), A (r, inputs), B (outputs, r)."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from lora_jax.adapters.inits.base import start_of
from lora_jax.adapters.inits.loftq import rounded
from lora_jax.adapters.inject import fill_member, inject, inject_layout, site_modules
from lora_jax.adapters.layout import resolve, unite
from lora_jax.adapters.parameters import SiteData, Statistics
from lora_jax.adapters.sites import find_sites
from lora_jax.config.doors import INITS
from lora_jax.errors import InputError
from lora_jax.packing.pack import Pack
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")

SITE = {s.name.rsplit(".", 1)[-1]: s for s in find_sites(tiny.encoder(2))}
RANK, SCALE = 4, 3.0
# Name -> sections to try beside the defaults.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "pissa": [{"niter": 300}],
    "loftq": [{"rounding": "int8"}, {"rounding": "int4", "iterations": 3}],
    "eva": [{"whiten": True}],
    "corda": [{"mode": "kpm"}],
    "lora_ga": [{"direction": d} for d in ("A2rBr", "ArBr")] + [{"scale": "gd_scale"}, {"scale": "unit"}],
}
CASES = [{"kind": name} | options for name in INITS for options in [{}, *OPTIONS.get(name, [])]]
SPLITS = [case for case in CASES if INITS.all()[case["kind"]].splits]


def name_of(case: Any) -> str:
    return "-".join(map(str, case.values()))


def data_of(site: Any, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, SiteData]:
    """W, the inputs X (tokens, inputs), the gradient (outputs, inputs), and what an init sees of them."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((site.outputs, site.inputs))
    x = rng.standard_normal((50, site.inputs)) @ rng.standard_normal((site.inputs, site.inputs))
    gradient = rng.standard_normal((site.outputs, site.inputs))
    weight = weight.astype(np.float32).astype(np.float64)
    seen = Statistics(x.T @ x, gradient.T, len(x))
    return weight, x, gradient, SiteData(lambda: weight.T.astype(np.float32), seen, {"scale": SCALE}, RANK + 2)


def transcription(case: dict[str, Any], w: np.ndarray, x: np.ndarray, gradient: np.ndarray) -> tuple[Any, Any]:
    """B and A of the papers; None: only the product is fixed."""
    r, kind = RANK, case["kind"]
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    if kind == "pissa":
        return u[:, :r] @ np.diag(np.sqrt(s[:r] / SCALE)), np.diag(np.sqrt(s[:r] / SCALE)) @ vt[:r]
    if kind == "milora":
        return u[:, -r:] @ np.diag(np.sqrt(s[-r:] / SCALE)), np.diag(np.sqrt(s[-r:] / SCALE)) @ vt[-r:]
    if kind == "mica":
        return u[:, -r:], np.zeros((r, w.shape[1]))
    if kind == "olora":
        q, upper = np.linalg.qr(w)
        return q[:, :r], upper[:r]
    if kind == "eva":
        _, s, vt = np.linalg.svd(x, full_matrices=False)
        a = vt[:r] / np.sqrt(s[:r])[:, None] if case.get("whiten") else vt[:r]
        return np.zeros((w.shape[0], r)), a
    if kind == "corda":
        c = x.T @ x / len(x)
        c += 0.01 * np.diag(c).mean() * np.eye(len(c))
        u, s, vt = np.linalg.svd(w @ c, full_matrices=False)
        v = vt @ np.linalg.inv(c)
        own = slice(0, r) if case.get("mode") != "kpm" else slice(-r, None)
        return u[:, own] @ np.diag(np.sqrt(s[own] / SCALE)), np.diag(np.sqrt(s[own] / SCALE)) @ v[own]
    if kind == "lora_ga":
        u, _, vt = np.linalg.svd(gradient, full_matrices=False)
        pick = {
            "ArB2r": (np.s_[r : 2 * r], np.s_[:r]),
            "A2rBr": (np.s_[:r], np.s_[r : 2 * r]),
            "ArBr": (np.s_[0 : 2 * r : 2], np.s_[1 : 2 * r : 2]),
        }
        of_b, of_a = pick[case.get("direction", "ArB2r")]
        factor = {"stable": w.shape[0] ** 0.25 / 4, "gd_scale": 1 / SCALE, "unit": 1.0}[case.get("scale", "stable")]
        return factor * u[:, of_b], factor * vt[of_a]
    assert kind == "loftq"
    to, change = case.get("rounding", "nf4"), np.zeros_like(w)
    for _ in range(case.get("iterations", 1)):
        u, s, vt = np.linalg.svd(w - by_hand(w - change, to))
        root = np.diag(np.sqrt(s[:r] / SCALE))
        b, a = u[:, :r] @ root, root @ vt[:r]
        change = SCALE * b @ a
    return b, a


def by_hand(w: np.ndarray, to: str) -> np.ndarray:
    """Rounding, one weight after the other."""
    from scipy.stats import norm

    out = np.empty_like(w)
    if to == "int8":
        for row, values in enumerate(w):
            unit = np.abs(values).max() / 127
            out[row] = [round(v / unit) * unit for v in values]
        return out
    if to == "nf4":  # QLoRA, appendix E: quantiles, eight from zero up and eight from zero down, of which zero is one
        up, down = norm.ppf(np.linspace(0.9677083, 0.5, 9)[:-1]), norm.ppf(np.linspace(0.9677083, 0.5, 8)[:-1])
        levels = np.sort(np.concatenate([up, [0.0], -down]))
        levels /= levels.max()
    else:
        levels = np.arange(-7, 8) / 7
    flat = w.reshape(-1)
    for start in range(0, flat.size, 64):
        block = flat[start : start + 64]
        largest = np.abs(block).max()
        out.reshape(-1)[start : start + 64] = [largest * levels[np.abs(levels - v / largest).argmin()] for v in block]
    return out


@pytest.mark.parametrize("to", ["nf4", "int4", "int8"])
def test_rounding(to: Any) -> None:
    w = np.random.default_rng(1).standard_normal((10, 33))  # blocks of 64 do not divide it
    assert tiny.relative(rounded(w, to), by_hand(w, to)) < 1e-6
    assert 1e-3 < tiny.relative(rounded(w, to), w) < 0.5


@pytest.mark.parametrize("case", [c for c in CASES if c["kind"] not in ("default", "zero_a", "gaussian", "orthogonal")], ids=name_of)
@pytest.mark.parametrize("site", ["up_proj", "down_proj"])
def test_factors_are_the_papers(case: dict[str, Any], site: str) -> None:
    where = SITE[site]
    w, x, gradient, data = data_of(where)
    config = tiny.adapter(rank=RANK, init=case, targets=[site])
    found = start_of(config, where, RANK, np.random.default_rng(0), data)
    a = found.get("lora_a", np.zeros((where.inputs, RANK))).T.astype(np.float64)
    b = found.get("lora_b", np.zeros((RANK, where.outputs))).T.astype(np.float64)
    wanted_b, wanted_a = transcription(case, w, x, gradient)
    for row in range(RANK):  # singular vectors have a sign
        sign = np.sign(a[row] @ wanted_a[row] + b[:, row] @ wanted_b[:, row])
        if case["kind"] == "lora_ga":  # of two different vectors each has its own
            a[row] *= np.sign(a[row] @ wanted_a[row])
            b[:, row] *= np.sign(b[:, row] @ wanted_b[:, row])
        else:
            a[row], b[:, row] = sign * a[row], sign * b[:, row]
    assert tiny.relative(a, wanted_a) < 1e-5
    assert tiny.relative(b, wanted_b) < 1e-5
    # Another member of the pack, of a smaller rank, shares what was decomposed.
    again = start_of(config, where, 2, np.random.default_rng(0), data)
    alone = start_of(config, where, 2, np.random.default_rng(0), data_of(where)[3])
    assert all(tiny.relative(np.abs(again[name]), np.abs(alone[name])) < 1e-6 for name in alone)


def test_what_is_drawn() -> None:
    site = SITE["up_proj"]
    draw = lambda kind, rank=64: start_of(tiny.adapter(init=kind), site, rank, np.random.default_rng(0), data_of(site)[3])
    (name, a), *rest = draw("gaussian").items()
    assert name == "lora_a" and not rest and abs(a.std() * 64 - 1) < 0.05
    (name, b), *rest = draw("zero_a").items()
    assert name == "lora_b" and not rest and 0.95 / 8 < np.abs(b).max() <= 1 / 8 and abs(b.std() * 8 - 3**-0.5) < 0.02
    both = draw("orthogonal")
    assert np.abs(both["lora_a"] @ both["lora_b"]).max() < 1e-5 and 0.05 < both["lora_a"].std() < 0.12
    assert np.array_equal(draw("default", 8)["lora_a"], draw("default", 16)["lora_a"][:, :8])


def injected(model: nnx.Module, case: Any, **values: Any) -> nnx.Module:
    """The model with a member at its start, its statistics made up."""
    config = tiny.adapter(**({"rank": RANK, "init": case, "targets": ["q_proj", "down_proj"]} | values))
    member = resolve(model, config)
    adapted = inject_layout(model, unite(model, [member]))
    seen = {(s.name, i): data_of(s, i)[3].statistics for s in find_sites(model) for i in range(s.depth or 1)}
    fill_member(adapted, member, 0, seen)
    return adapted


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_member_starts_as_the_base(case: dict[str, Any]) -> None:
    model, tokens = tiny.encoder(2), np.arange(1, 13, dtype=np.int32).reshape(2, 6)
    before = tiny.base_arrays(model)
    adapted = injected(model, case)
    if INITS.all()[case["kind"]].splits or case["kind"] == "orthogonal":
        assert tiny.relative(tiny.outputs(adapted, tokens), tiny.outputs(model, tokens)) < 1e-5
    else:
        np.testing.assert_array_equal(tiny.outputs(adapted, tokens, bits=True), tiny.outputs(model, tokens, bits=True))
    assert tiny.arrays_equal(tiny.base_arrays(model), before)
    site = next(iter(site_modules(adapted).values()))
    assert np.abs(site.lora_a[...]).max() + np.abs(site.lora_b[...]).max() > 0


@pytest.mark.long
def test_a_pack_equals_its_solo_runs_whatever_its_members_inits() -> None:
    model, steps = tiny.classifier(2), 8
    own = [("pissa", 2), ("olora", 3), ({"kind": "loftq", "rounding": "int8"}, 1), ("milora", 4)]
    chosen = [
        tiny.config(adapter__init=init, adapter__rank=rank, adapter__targets=targets, training__seed=k, optimizer__eps=1e-3)
        for k, ((init, rank), targets) in enumerate(zip(own, [["q_proj"], ["q_proj", "up_proj"], ["up_proj"], "attention"]))
    ]

    def train(configs: list[Any]) -> tuple[Pack, Any, np.ndarray]:
        pack = Pack.build(model, configs, steps)
        state, losses = jax.tree.map(np.array, pack.state), []
        for step in range(steps):
            state, metrics = pack.programs.train(jax.device_put(state), pack.fixed, pack.part.frozen, tiny.batch(step % 2), np.int32(step))
            losses.append(np.asarray(metrics.loss))
        pack.programs.check()
        return pack, state, np.stack(losses)

    before = tiny.base_arrays(model)
    pack, state, losses = train(chosen)
    for k, config in enumerate(chosen):
        alone, solo, curve = train([config])
        assert tiny.relative(losses[:, k], curve[:, 0]) < 1e-5
        mine = pack.member_arrays(model, k, state.trainable | pack.kept)
        wanted = alone.member_arrays(model, 0, solo.trainable | alone.kept)
        start = alone.member_arrays(model, 0, alone.state.trainable | alone.kept)
        for name in wanted:
            moved = np.linalg.norm(wanted[name] - start[name])
            assert np.linalg.norm(mine[name] - wanted[name]) <= 1e-5 * np.linalg.norm(wanted[name]) + 1e-3 * moved, name
            assert (moved > 0) == (name in solo.trainable), name
    assert tiny.arrays_equal(tiny.base_arrays(model), before)


def test_mica_trains_a_alone() -> None:
    adapted = injected(tiny.encoder(2), "mica")
    site = next(iter(site_modules(adapted).values()))
    assert not isinstance(site.lora_b, nnx.Param) and isinstance(site.lora_a, nnx.LoRAParam)
    assert site.method.count(site.site, RANK) == site.site.inputs * RANK


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"init": "pisa"}, r"pisa.*pissa"),
        ({"init": {"kind": "pissa", "nitter": 3}}, r"nitter.*niter"),
        ({"init": {"kind": "loftq", "rounding": "int3"}}, "rounding"),
    ],
)
def test_a_wrong_section_is_told_of(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny.adapter(**values)


def test_what_an_init_cannot_do_is_told_of() -> None:
    model = tiny.encoder(2)
    for values, said in [
        ({"init": "pissa", "targets": "embedding"}, "adapter.init.*embedding"),
        ({"init": "orthogonal", "rank": 3}, "adapter.init.*odd"),
        ({"init": "pissa", "rank": 40}, "adapter.init.*at most 32"),
        ({"init": "lora_ga", "rank": 20}, "adapter.init.*at most 16"),
    ]:
        with pytest.raises(InputError, match=said):
            resolve(model, tiny.adapter(**values))
    for kind in ("eva", "corda", "lora_ga"):
        with pytest.raises(InputError, match=f"adapter.init.*{kind}.*none was gathered"):
            inject(model, tiny.adapter(init=kind), rngs=nnx.Rngs(0))


def test_a_section_is_written_as_short_as_it_was_meant() -> None:
    assert tiny.config().model_dump()["adapter"]["init"] == "default"
    long = tiny.config(adapter__init={"kind": "pissa", "niter": 4})
    assert long.model_dump()["adapter"]["init"] == {"kind": "pissa", "niter": 4}
    assert type(long).model_validate(long.model_dump()) == long
    assert tiny.config(adapter__init={"kind": "pissa"}) == tiny.config(adapter__init="pissa")
