"""Pruned and low-rank bases: scores beside transcriptions of the papers, what training over them keeps, and what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pydantic import ValidationError

import lora_jax
from experiments.fuzz import bits_of_run, differing
from lora_jax.adapters.sites import find_sites
from lora_jax.config.load import load_config
from lora_jax.config.schema import MeshConfig
from lora_jax.errors import InputError, Stopped
from lora_jax.models import load as loading
from lora_jax.models.heads import LanguageModel
from lora_jax.models.stored import StoredLinear
from lora_jax.models.transforms.base import TransformContext, apply_transforms
from lora_jax.models.transforms.low_rank import LowRankConfig, factors_of, rank_of
from lora_jax.models.transforms.prune import PruneConfig, mask_of
from lora_jax.models.transforms.quantize import QuantizeConfig
from lora_jax.packing.pack import Pack
from lora_jax.parallel.constraints import place_batch
from lora_jax.parallel.mesh import make_mesh, to_host
from lora_jax.sweeps.restore import restore_member, run_members
from lora_jax.sweeps.run import run_sweep
from lora_jax.training.setup import Preparer, place_model
from lora_jax.training.statistics import calibrate
from lora_jax.weights.tokenizer import load_tokenizer
from tests import tiny
from tests.stopping import stop_at
from tests.tiny_hub import call

pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def load_model(source: str, **options: Any) -> Any:
    return loading.load_model(source, **options)


def prune(**values: Any) -> PruneConfig:
    return PruneConfig(kind="prune", **values)


def low_rank(**values: Any) -> LowRankConfig:
    return LowRankConfig(kind="low_rank", **values)


def calibration(source: Path | str, **values: Any) -> dict[str, Any]:
    return {"source": str(source), "text": "text", "rows": 20, "max_length": 12} | values


# Scores.


def test_wanda_is_its_paper_in_float64():
    """W (outputs, inputs) and X (tokens, inputs), as the paper writes them: S = |W| ||X||_2, the lowest of each output go."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((5, 12)).astype(np.float32), rng.standard_normal((40, 12)) * rng.uniform(0.1, 3, 12)
    norms = [float(np.sqrt(sum(x[t, j] ** 2 for t in range(40)))) for j in range(12)]
    kept = mask_of(w.T, np.sqrt((x**2).sum(0)), 0.4, None).T
    paired = mask_of(w.T, np.sqrt((x**2).sum(0)), 0.5, 4).T
    for i in range(5):
        score = [abs(float(w[i, j])) * norms[j] for j in range(12)]
        lowest = sorted(range(12), key=lambda j: score[j])[: int(12 * 0.4)]
        assert set(np.flatnonzero(~kept[i])) == set(lowest)
        for start in range(0, 12, 4):
            lowest = sorted(range(start, start + 4), key=lambda j: score[j])[:2]
            assert set(start + np.flatnonzero(~paired[i, start : start + 4])) == set(lowest)


def test_magnitude_is_compared_in_the_whole_matrix():
    w = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32)
    kept = mask_of(w, None, 0.3, None)
    assert (~kept).sum() == 18 and np.abs(w[~kept]).max() < np.abs(w[kept]).min()


def test_the_whitening_is_svd_llms_in_float64():
    """W (outputs, inputs) and X (inputs, tokens), as the paper writes them: S of X X^T = S S^T, W S ~ U E V^T, W' = U E V^T S^-1; what is
    lost, ||W X - W' X||_F, is the norm of the singular values that are left out, and no other rank-k weight loses less."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((7, 9)), rng.standard_normal((9, 60)) * rng.uniform(0.1, 3, (9, 1))
    s = np.linalg.cholesky(x @ x.T + 1e-6 * np.trace(x @ x.T) / 9 * np.eye(9))
    u, e, v = np.linalg.svd(w @ s)
    wanted = (u[:, :3] * e[:3]) @ v[:3] @ np.linalg.inv(s)
    down, up, lost = factors_of(w.T, 3, x @ x.T)
    assert tiny.relative((down @ up).T, wanted) < 1e-10
    left = np.linalg.norm((w - wanted) @ x)
    assert left == pytest.approx(np.sqrt((e[3:] ** 2).sum()), rel=1e-4) and lost == pytest.approx(left / np.linalg.norm(w @ x), rel=1e-4)
    plain = np.subtract(w.T, np.matmul(*factors_of(w.T, 3, None)[:2]))
    assert np.linalg.norm(plain.T @ x) > 1.05 * left and np.linalg.norm(plain) < np.linalg.norm(w - wanted)


def test_moments_that_rounding_has_made_indefinite_still_whiten():
    """Fewer rows than inputs, one of which is a thousand times the others: summed in float32, X^T X has eigenvalues well below 0."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((24, 64)) * np.where(np.arange(64) == 5, 3000.0, 1.0)).astype(np.float32)
    moment = (x.T @ x).astype(np.float64) - 20 * np.eye(64)
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(moment + 1e-6 * np.trace(moment) / 64 * np.eye(64))
    w = rng.standard_normal((64, 40))
    seen, best = x.astype(np.float64), np.linalg.svd(x.astype(np.float64) @ w, compute_uv=False)
    left, plain = (np.linalg.norm(seen @ (w - np.matmul(*factors_of(w, 4, m)[:2]))) for m in (moment, None))
    assert left < 1.1 * np.sqrt((best[4:] ** 2).sum()) and plain > 100 * left  # the first is what no rank-4 weight goes below


@pytest.mark.parametrize(("inputs", "outputs", "share"), [(576, 1536, 0.6), (32, 32, 0.9), (10, 10, 0.6), (33, 7, 0.4)])
def test_factors_hold_no_more_than_their_share(inputs, outputs, share):
    rank = rank_of(inputs, outputs, share)
    assert (inputs + outputs) * rank <= share * inputs * outputs + 1e-6 < (inputs + outputs) * (rank + 1) + 1e-3


@pytest.mark.slow
def test_what_calibration_sees(hub):
    """Squares are the diagonals of moments; those of the first layer's inputs are an RMS norm of the rows' embeddings, in float64."""
    base = load_model(str(hub.llama))
    section = prune(method="wanda", calibration=calibration(hub.reviews)).calibration
    assert section is not None
    names = [site.name for site in find_sites(base) if site.kind == "linear"]
    squares, moments = (calibrate(str(hub.llama), base, section, names, what) for what in ("squares", "moment"))
    assert [*squares] == [*moments] and len(squares) == 7 * 3
    for where, seen in squares.items():
        assert tiny.relative(np.diag(np.asarray(moments[where].moment)), seen.squares) < 1e-5
    rows = [line.split(",")[0] for line in hub.reviews.read_text().splitlines()[1:]]
    drawn = np.random.default_rng(np.random.SeedSequence([0, 0x5A3])).permutation(len(rows))[:20]
    ids = load_tokenizer(str(hub.llama))([rows[i] for i in drawn], add_special_tokens=False)["input_ids"]
    table, scale = (np.asarray(v[...], np.float64) for v in (base.embed.embedding, base.layers.segments[0].block.attn_norm.scale))
    x = table[np.concatenate([row[:12] for row in ids])]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale[0]
    assert squares["layers.attn.q_proj", 0].tokens == len(x)
    assert tiny.relative(squares["layers.attn.q_proj", 0].squares, (x**2).sum(0)) < 1e-5


# Bases.


def kernels(model: nnx.Module) -> dict[str, np.ndarray]:
    found = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear | StoredLinear) and "segments" in path:
            found[str(path[-1])] = np.asarray(module.kernel[...])
    return found


@pytest.mark.slow
def test_a_pruned_base_has_its_sparsity_and_leaves_what_is_skipped(hub):
    plain = kernels(load_model(str(hub.llama)))
    section = prune(method="wanda", sparsity=0.25, calibration=calibration(hub.reviews), skip=["v_proj", "mlp.down_proj"])
    model = load_model(str(hub.llama), transforms=[section], calibrate=calibrate)
    for name, kernel in kernels(model).items():
        zeros = (kernel == 0).mean(axis=-2)
        assert (zeros == (0 if name in ("v_proj", "down_proj") else 0.25)).all()
        assert np.array_equal(kernel[kernel != 0], plain[name][kernel != 0])
    paired = load_model(str(hub.llama), transforms=[prune(pattern="2:4")])
    for kernel in kernels(paired).values():
        assert ((kernel.reshape(3, -1, 4, kernel.shape[-1]) == 0).sum(axis=2) == 2).all()
    assert "50.0%" in paired.transform_notes[0] and "no smaller or faster" in paired.transform_notes[0]


@pytest.mark.slow
def test_a_low_rank_base_computes_with_the_product_of_its_factors(hub):
    section = low_rank(share=0.5, method="activation", calibration=calibration(hub.reviews))
    model = load_model(str(hub.llama), transforms=[section], calibrate=calibrate)
    assert {s.name for s in find_sites(model)} == {s.name for s in find_sites(load_model(str(hub.llama)))}
    dense = load_model(str(hub.llama))
    for path, module in [*nnx.iter_modules(model)]:
        if isinstance(module, StoredLinear):
            owner: Any = dense
            for part in path[:-1]:
                owner = owner[part] if isinstance(part, int) else getattr(owner, str(part))
            setattr(owner, str(path[-1]), module.as_linear())
    tokens = jnp.arange(1, 21).reshape(2, 10)
    assert tiny.relative(model(tokens), dense(tokens)) < 1e-5
    held, whole = (sum(v.size for _, v in nnx.iter_graph(m) if isinstance(v, nnx.Param)) for m in (model, dense))
    assert f"{whole:,} became {held:,}" in model.transform_notes[0]
    # What the layers give for calibration rows is nearer than with the weight's own decomposition.
    plain = load_model(str(hub.llama), transforms=[low_rank(share=0.5)])
    exact = load_model(str(hub.llama))(tokens)
    assert tiny.relative(plain(tokens), exact) > 0.01


def quantize(**values: Any) -> QuantizeConfig:
    return QuantizeConfig(kind="quantize", **values)


TRANSFORMED = {
    "pruned": prune(sparsity=0.6),
    "paired": prune(pattern="2:4"),
    "low rank": low_rank(share=0.6),
    "nf4": quantize(block=32, embeddings=True),
    "int8": quantize(format="int8", block="channel"),
}
STORED = ("low rank", "nf4", "int8")  # in another form than one array
MEMBERS = [
    {"adapter__rank": 2, "adapter__targets": ["q_proj", "down_proj"], "adapter__layers": "last:2"},
    {"adapter__rank": 3, "adapter__targets": "all-linear", "adapter__dropout": 0.1, "training__seed": 2},
]


def base_of(section: Any) -> LanguageModel:
    base: Any = apply_transforms(tiny.decoder(3), [section], TransformContext("tiny"))
    return LanguageModel(base)


def train(section: Any, members: list[dict[str, Any]], mesh: dict[str, int] | None = None) -> tuple[np.ndarray, Pack, Any, nnx.Module]:
    """(losses, pack, its last state, the model without adapters) after 10 steps."""
    model, on = base_of(section), None if mesh is None else make_mesh(MeshConfig(**mesh))
    if on is not None:
        place_model(model, on)
    pack, losses = Pack.build(model, [tiny.config(**member) for member in members], 10, on), []
    state = pack.state
    for step in range(10):
        batch = tiny.batch(step, rows=8, causal=True)
        placed = batch if on is None else place_batch(on, batch, row_axis=1)
        state, metrics = pack.programs.train(state, pack.fixed, pack.part.frozen, placed, np.int32(step))
        losses.append(np.asarray(metrics.loss))
    pack.programs.check()
    return np.stack(losses), pack, state, model


@pytest.mark.long
@pytest.mark.parametrize("name", ["pruned", "low rank", "nf4"])
def test_a_pack_equals_its_solo_runs_on_one_device_and_on_a_mesh(name):
    losses, pack, state, model = train(TRANSFORMED[name], MEMBERS)
    for k, member in enumerate(MEMBERS):
        alone, solo, after, other = train(TRANSFORMED[name], [member])
        assert tiny.relative(losses[:, k], alone[:, 0]) < 1e-5
        packed, single = pack.member_arrays(model, k, state.trainable), solo.member_arrays(other, 0, after.trainable)
        assert packed.keys() == single.keys()
        assert all(tiny.relative(packed[n], single[n]) < 1e-4 for n in packed)
    if len(jax.devices()) >= 8:
        spread, _, placed, _ = train(TRANSFORMED[name], MEMBERS, {"data": 2, "fsdp": 2, "tensor": 2})
        assert tiny.relative(spread, losses) < 1e-5
        assert all(tiny.relative(to_host(a), state.trainable[n]) < 1e-3 for n, a in placed.trainable.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMED)
def test_merging_is_faithful_and_identity_holds_at_the_start(name):
    model = base_of(TRANSFORMED[name]).base
    tokens = jnp.arange(1, 21).reshape(2, 10)
    section = tiny.adapter(rank=2, targets="all-linear")
    fresh = lora_jax.inject(model, section, rngs=nnx.Rngs(0))
    assert np.array_equal(tiny.outputs(fresh, tokens, bits=True), tiny.outputs(model, tokens, bits=True))
    adapted = tiny.trained(model, rank=2, targets="all-linear")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        merged = lora_jax.merge(adapted)
    assert any("become" in str(w.message) for w in told) == (name in STORED)
    assert tiny.relative(tiny.outputs(merged, tokens), tiny.outputs(adapted, tokens)) < 1e-5
    back = lora_jax.unmerge(merged)
    assert np.array_equal(tiny.outputs(back, tokens, bits=True), tiny.outputs(adapted, tokens, bits=True))
    if name in STORED:
        return
    held = lora_jax.merge(adapted, keep_mask=True)
    zeros = {n: k == 0 for n, k in kernels(model).items()}
    modules: list[tuple[Any, Any]] = [*nnx.iter_modules(held)]
    inner = {str(p[-2]): np.asarray(m.kernel[...]) for p, m in modules if p[-1:] == ("merged",)}
    assert all((inner[n][zero] == 0).all() and (inner[n][~zero] != 0).mean() > 0.99 for n, zero in zeros.items())
    assert tiny.relative(tiny.outputs(held, tokens), tiny.outputs(adapted, tokens)) > 1e-3


def test_a_run_is_planned_without_weights(hub, tmp_path, monkeypatch):
    """The shapes of a transformed base are known without it; a head stands on it all the same."""
    monkeypatch.setattr(loading.BaseFiles, "load", lambda *a, **k: pytest.fail("read weights"))
    for causal in (False, True):
        for sections in ([{"kind": "low_rank", "share": 0.5}], listed(hub, "wanda"), listed(hub, "nf4")):
            setup = Preparer(weights=False)(hub.config(tmp_path, {"model.transforms": sections}, causal=causal))
            found = {p: v for p, v in nnx.iter_graph(setup.base) if isinstance(v, nnx.Param)}
            assert all(isinstance(v.get_value(), jax.ShapeDtypeStruct) for v in found.values())
            assert any(p[-1] == "up" for p in found) == (sections[0]["kind"] == "low_rank")
    with pytest.raises(InputError, match="no rank"):
        Preparer(weights=False)(hub.config(tmp_path, {"model.transforms": [{"kind": "low_rank", "share": 0.01}]}))


def listed(hub: Any, name: str) -> list[dict[str, Any]]:
    cal = calibration(hub.reviews)
    return [
        {
            "wanda": {"kind": "prune", "method": "wanda", "calibration": cal},
            "activation": {"kind": "low_rank", "share": 0.6, "method": "activation", "calibration": cal},
            "nf4": {"kind": "quantize", "block": 32, "embeddings": True},
        }[name]
    ]


@pytest.mark.long
@pytest.mark.parametrize("name", ["wanda", "activation", "nf4"])
def test_a_run_over_it_resumes_exactly_and_is_evaluated_and_exported(hub, tmp_path, monkeypatch, name):
    changes = {"model.transforms": listed(hub, name), "tracking.checkpoint_every": 2, "training.eval_every": 3}
    path = hub.write(tmp_path, changes, causal=True)
    done = call("train", path)
    assert done.code == 0, done.err
    assert {"wanda": "pruned:", "activation": "low rank", "nf4": "quantised (nf4, blocks of 32"}[name] in done.err
    run = tmp_path / "runs" / "tiny"
    (tmp_path / "again").mkdir()
    again = hub.config(tmp_path / "again", changes, causal=True)
    stop_at(monkeypatch, 3)
    with pytest.raises(Stopped):
        run_sweep(again)
    assert not differing(bits_of_run(run), bits_of_run(run_sweep(again).path))
    assert call("evaluate", run).code == 0
    member = run_members(run)[0]
    restored: Any = restore_member(run, member)
    exported = call("export", run, "--out", tmp_path / "hf")
    assert exported.code == 0, exported.err
    tokens = jnp.arange(1, 21).reshape(2, 10)
    assert tiny.relative(load_model(str(tmp_path / "hf"))(tokens), restored.model.base(tokens)) < 1e-4
    if name == "nf4":
        assert "the dequantised ones that the adapter was trained on" in exported.err
        again = call("export", run, "--out", tmp_path / "rounded", "--requantize")
        assert again.code == 0 and "differ from the merged ones by up to" in again.err, again
        rounded = load_model(str(tmp_path / "rounded"))
        held = load_model(str(tmp_path / "rounded"), transforms=[quantize(block=32, double=False)])
        assert tiny.relative(held(tokens), rounded(tokens)) < 1e-2 < tiny.relative(rounded(tokens), restored.model.base(tokens))
    if name == "wanda":
        dense = {n: (k == 0).mean() for n, k in kernels(load_model(str(tmp_path / "hf"))).items()}
        kept = call("export", run, "--out", tmp_path / "sparse", "--keep-mask")
        assert kept.code == 0 and "--keep-mask" in kept.err + kept.out, kept
        sparse = {n: (k == 0).mean() for n, k in kernels(load_model(str(tmp_path / "sparse"))).items()}
        assert dense["q_proj"] < 0.1 and all(share > 0.4 for share in sparse.values())


# What is refused.


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        ({"kind": "prune", "method": "wanda"}, ("model.transforms.0", "'wanda' needs 'calibration")),
        ({"kind": "prune", "method": "wnda"}, ("method", "wanda")),
        ({"kind": "prune", "sparsity": 0.0}, ("sparsity", "got 0.0")),
        ({"kind": "prune", "sparsity": 1.0}, ("sparsity", "got 1.0")),
        ({"kind": "prune", "pattern": "2:5"}, ("pattern", "2:4")),
        ({"kind": "prune", "pattern": "2:4", "sparsity": 0.3}, ("'2:4' has a sparsity of 0.5",)),
        ({"kind": "prune", "calibration": {"source": "x.csv"}}, ("no use",)),
        ({"kind": "prune", "method": "wanda", "calibration": {"rows": 3}}, ("calibration.source", "required")),
        ({"kind": "low_rank"}, ("share", "required")),
        ({"kind": "low_rank", "share": 1.5}, ("share", "got 1.5")),
        ({"kind": "low_rank", "share": 0.5, "method": "activation"}, ("'activation' needs 'calibration",)),
        ({"kind": "low_rank", "share": 0.5, "rank": 3}, ("'rank'",)),
        ({"kind": "quantize", "format": "nf5"}, ("model.transforms.0: quantize: format", "nf4", "got 'nf5'")),
        ({"kind": "quantize", "format": "int8", "double": True}, ("'double'", "int8")),
        ({"kind": "quantize", "block": "channel"}, ("'block: channel' is for int8 and int4",)),
        ({"kind": "quantize", "block": 0}, ("block",)),
    ],
)
def test_what_a_section_may_not_say(hub, tmp_path, section, parts):
    path = hub.write(tmp_path, {"model.transforms": [section]})
    with pytest.raises(InputError) as refused:
        load_config(path)
    assert str(refused.value).startswith(str(path)) and all(part in str(refused.value) for part in parts), str(refused.value)


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ([prune(skip=["q_prj"])], ("skip", "'q_prj'", "q_proj")),
        ([low_rank(share=0.01)], ("share", "leaves", "no rank")),
        ([low_rank(share=0.5), prune()], ("list this one first",)),
        ([quantize(block=24)], ("quantize.block", "blocks of 24 do not divide its", "Nearest:")),
        ([quantize(block=32, skip=["q_prj"])], ("skip", "'q_prj'", "q_proj")),
        ([prune(method="wanda", calibration=calibration("nowhere.csv"))], ("calibration.source", "nowhere.csv")),
        ([prune(method="wanda", calibration=calibration("REVIEWS", text="txt"))], ("calibration.text", "'txt'", "text")),
        ([prune(method="wanda", calibration=calibration("EMPTY"))], ("no row",)),
    ],
)
def test_what_a_base_may_not_be(hub, tmp_path, sections, parts):
    (tmp_path / "empty.csv").write_text('text,label\n" ",pos\n')
    places = {"REVIEWS": str(hub.reviews), "EMPTY": str(tmp_path / "empty.csv")}
    text = json.dumps([s.model_dump() for s in sections])
    for name, place in places.items():
        text = text.replace(f'"{name}"', json.dumps(place))
    kinds = {"prune": PruneConfig, "low_rank": LowRankConfig, "quantize": QuantizeConfig}
    made = [kinds[s["kind"]].model_validate(s) for s in json.loads(text)]
    with pytest.raises(InputError) as refused:
        load_model(str(hub.llama), transforms=made, calibrate=calibrate)
    assert str(refused.value).startswith("model.transforms") and all(part in str(refused.value) for part in parts), str(refused.value)


def test_calibration_needs_someone_to_read_rows(hub):
    section = prune(method="wanda", calibration=calibration(hub.reviews))
    with pytest.raises(InputError, match="calibrate=lora_jax.calibrate"):
        load_model(str(hub.llama), transforms=[section])
    with pytest.raises(ValidationError):
        prune(method="wanda")


def test_widths_that_four_does_not_divide():
    base = tiny.decoder(2, width=36)
    with pytest.raises(InputError, match=r"72 inputs, which 8 does not divide|36 inputs, which 8 does not divide"):
        apply_transforms(base, [prune(pattern="4:8")], TransformContext("tiny"))


def test_the_source_of_rows_is_found_beside_the_config(hub, tmp_path):
    (tmp_path / "rows.csv").write_text(hub.reviews.read_text())
    section = {"kind": "prune", "method": "wanda", "calibration": calibration("rows.csv")}
    config = load_config(hub.write(tmp_path, {"model.transforms": [section]}))
    first: Any = config.model.transforms[0]
    assert first.calibration.source == str(tmp_path / "rows.csv")
    grid = {"model.transforms": [[section], []]}
    config = load_config(hub.write(tmp_path, {"sweep": {"grid": grid}}))
    assert config.sweep is not None
    assert config.sweep.grid["model.transforms"][0][0]["calibration"]["source"] == str(tmp_path / "rows.csv")
