"""What is gathered of the data before step 0, beside a direct computation; and what a run makes of it: once, saved, resumed."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.fuzz import bits_of_run, differing
from lora_jax.adapters.layout import resolve, unite
from lora_jax.errors import Stopped
from lora_jax.models.heads import SequenceClassifier
from lora_jax.parallel.mesh import make_mesh
from lora_jax.sweeps.restore import evaluate_run, restore_member, run_members
from lora_jax.sweeps.run import run_sweep
from lora_jax.tasks.objectives import cross_entropy
from lora_jax.tracking import Progress
from lora_jax.training import setup as setups
from lora_jax.training.setup import Setup, set_up
from lora_jax.training.statistics import gather
from tests import tiny
from tests.stopping import stop_at
from tests.tiny_hub import call

pytestmark = pytest.mark.usefixtures("compile_cache")


class Net(nnx.Module):
    """Embedding, a layer, tanh, a layer at the targets, classes."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(tiny.VOCAB, 6, rngs=rngs)
        self.first = nnx.Linear(6, 5, rngs=rngs)
        self.second = nnx.Linear(5, 4, rngs=rngs)
        self.classes = nnx.Linear(4, tiny.CLASSES, rngs=rngs)

    def features(self, batch, dropout_rng=None):
        hidden = jnp.tanh(self.first(self.embed(batch["tokens"])))
        return self.second(hidden).reshape(-1, 4)[batch["target_index"]]

    def readout(self):
        return self.classes

    def answers(self, features):
        return None


def by_hand(net: Net, batches):
    """(moments, gradients, tokens) of the two layers in float64."""
    layers = (net.first, net.second, net.classes)
    table, *rest = (np.asarray(v[...], np.float64) for v in (net.embed.embedding, *(v for m in layers for v in (m.kernel, m.bias))))
    w1, b1, w2, b2, wc, bc = rest
    moments, gradients, tokens = [0.0, 0.0], [0.0, 0.0], 0
    for batch in batches:
        total = batch["target_weights"].sum()
        for i in range(len(batch["tokens"])):
            micro = {name: a[i] for name, a in batch.items()}
            x = table[micro["tokens"].reshape(-1)]
            hidden = np.tanh(x @ w1 + b1)
            at = micro["target_index"]
            logits = (hidden @ w2 + b2)[at] @ wc + bc
            shares = np.exp(logits - logits.max(1, keepdims=True))
            shares /= shares.sum(1, keepdims=True)
            shares[np.arange(len(at)), micro["target_ids"]] -= 1
            d_out = np.zeros((len(x), 4))
            np.add.at(d_out, at, (shares * micro["target_weights"][:, None] / total) @ wc.T)
            d_hidden = d_out @ w2.T * (1 - hidden**2)
            gradients[0] += x.T @ d_hidden / len(batches)
            gradients[1] += hidden.T @ d_out / len(batches)
            real = micro["segment_ids"].reshape(-1) > 0
            moments[0] += x[real].T @ x[real]
            moments[1] += hidden[real].T @ hidden[real]
            tokens += int(real.sum())
    return moments, gradients, tokens


def test_they_are_those_of_a_direct_computation():
    net = Net(nnx.Rngs(0))
    batches = [tiny.batch(seed, micro=2) for seed in range(3)]
    sites = unite(net, [resolve(net, tiny.adapter(targets=["first", "second"]))]).sites
    placed = ({name: jnp.asarray(a) for name, a in batch.items()} for batch in batches)
    mesh = make_mesh(tiny.config().mesh)
    found = gather(net, sites, frozenset({"moment", "gradient"}), placed, cross_entropy, seed=0, mesh=mesh)
    moments, gradients, tokens = by_hand(net, batches)
    assert [*found] == [("first", 0), ("second", 0)]
    for k, seen in enumerate(found.values()):
        assert seen.tokens == tokens
        assert tiny.relative(seen.moment, moments[k]) < 1e-5
        assert tiny.relative(seen.gradient, gradients[k]) < 1e-5


def test_of_stacked_layers_and_of_a_top_layer_that_is_narrowed():
    model = tiny.classifier(3)
    sites = unite(model, [resolve(model, tiny.adapter(targets=["q_proj", "up_proj"], layers="last:2"))]).sites
    batch = {name: jnp.asarray(a) for name, a in tiny.batch(0).items()}
    mesh = make_mesh(tiny.config().mesh)
    found = gather(model, sites, frozenset({"moment", "gradient"}), [batch], cross_entropy, seed=0, mesh=mesh)
    up, q = ("base.layers.mlp.up_proj", "base.layers.attn.q_proj")
    assert [*found] == [(name, layer) for name in (up, q) for layer in (1, 2)]
    real, targets = int((batch["segment_ids"] > 0).sum()), int(batch["target_weights"].sum())
    assert [seen.tokens for seen in found.values()] == [real, targets, real, real]
    for seen in found.values():
        assert np.linalg.matrix_rank(seen.moment, 1e-6 * np.trace(seen.moment)) <= seen.tokens
        assert np.abs(seen.gradient).max() > 0
    # What padding holds changes nothing.
    other = batch | {"tokens": jnp.where(batch["segment_ids"] > 0, batch["tokens"], 7)}
    again = gather(model, sites, frozenset({"moment"}), [other], cross_entropy, seed=0, mesh=mesh)
    for where, seen in again.items():
        assert tiny.relative(seen.moment, found[where].moment) < 1e-6 and seen.gradient is None


def test_of_a_model_of_shared_projections():
    """DeBERTa's projections see a table of relative positions too."""
    options = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_biased_input": False}
    model = SequenceClassifier(tiny.encoder_of("deberta-v2", **options), tiny.CLASSES, "mean", rngs=nnx.Rngs(0))
    sites = unite(model, [resolve(model, tiny.adapter(targets=["q_proj", "k_proj"]))]).sites
    batch = {name: jnp.asarray(a) for name, a in tiny.batch(0).items()}
    found = gather(model, sites, frozenset({"moment"}), [batch], cross_entropy, seed=0, mesh=make_mesh(tiny.config().mesh))
    assert {seen.tokens for seen in found.values()} == {int((batch["segment_ids"] > 0).sum())}


SWEEP = {
    "adapter.init_batches": 2,
    "training.steps": 4,
    "training.eval_every": 2,
    "tracking.checkpoint_every": 2,
    "sweep": {"grid": {"adapter.init": ["default", "eva", {"kind": "corda", "mode": "kpm"}, "lora_ga", "mica"], "adapter.rank": [2, 3]}},
}


@pytest.fixture(scope="module")
def whole(hub, tmp_path_factory, compile_cache):
    """The run that nobody stops; and what was gathered for it: (layers, statistics) each time."""
    calls = []
    with pytest.MonkeyPatch.context() as patch, tiny.quick_compile():
        real = setups.gather

        def counted(model, sites, wants, *args, **options):
            calls.append(sorted(wants))
            return real(model, sites, wants, *args, **options)

        patch.setattr(setups, "gather", counted)
        outcome = run_sweep(hub.config(tmp_path_factory.mktemp("whole"), SWEEP))
    return outcome, calls


@pytest.mark.slow
def test_members_of_several_packs_share_one_pass(whole):
    outcome, calls = whole
    assert {r.status for r in outcome.results} == {"finished"}
    # Three forms: with a start, with B frozen, and plain. What one pack gathered is there for the next.
    assert sorted(want for wants in calls for want in wants) == ["gradient", "moment"]


@pytest.mark.slow
def test_a_saved_adapter_stands_on_its_own(whole, monkeypatch):
    outcome, _ = whole
    monkeypatch.setattr(setups, "gather", lambda *a, **k: pytest.fail("no data is needed"))
    found = evaluate_run(outcome.path, member=None, split="eval", progress=Progress())
    for result in outcome.results:
        assert found[result.name]["loss"] == pytest.approx(result.best["loss"], rel=1e-5)
    member = next(m for m in run_members(outcome.path) if "lora_ga" in m.name)
    model = restore_member(outcome.path, member).model
    site = next(m for _, m in nnx.iter_modules(model) if hasattr(m, "lora_a0"))
    assert np.abs(site.lora_a0[...]).max() > 0 and not np.array_equal(site.lora_a0[...], site.lora_a[...])


@pytest.mark.long
def test_a_stopped_run_goes_on_from_the_start_it_had(hub, whole, tmp_path, monkeypatch):
    config = hub.config(tmp_path, SWEEP)
    stop_at(monkeypatch, 3)
    with tiny.quick_compile():
        with pytest.raises(Stopped):
            run_sweep(config)
        outcome = run_sweep(config)
    assert not differing(bits_of_run(whole[0].path), bits_of_run(outcome.path))


@pytest.mark.slow
def test_what_is_gathered_is_remembered(hub, tmp_path, monkeypatch):
    setup: Setup = set_up(hub.config(tmp_path))
    calls = []
    real = setups.gather
    monkeypatch.setattr(setups, "gather", lambda *a, **k: calls.append(a[2]) or real(*a, **k))
    of = lambda **v: hub.config(tmp_path, {f"adapter.{k}": x for k, x in v.items()})
    assert setup.statistics([of()]) == {} and not calls
    few = setup.statistics([of(init="eva", init_batches=1), of(init="eva", init_batches=2)])
    assert [*few] == [1, 2] and len(calls) == 2
    assert all(few[2][where].tokens > seen.tokens > 0 for where, seen in few[1].items())
    setup.statistics([of(init="corda", init_batches=1, rank=4)])
    assert len(calls) == 2
    both = setup.statistics([of(init="lora_ga", init_batches=1)])[1]
    assert len(calls) == 3 and all(seen.moment is not None and seen.gradient is not None for seen in both.values())


@pytest.mark.slow
def test_it_is_exported(hub, whole, tmp_path):
    """As LoRA of twice the rank; and as it is, the base that is left beside it."""
    run = whole[0].path
    member = next(m.name for m in run_members(run) if "lora_ga" in m.name and "rank=3" in m.name)
    for more, rank in (([], 6), (["--keep-base"], 3)):
        out = tmp_path / f"rank{rank}"
        done = call("export", run, "--member", member, "--format", "peft", "--out", out, *more)
        assert done.code == 0, done.err
        assert json.loads((out / "adapter_config.json").read_text())["r"] == rank
        assert (out / "base" / "model.safetensors").is_file() == bool(more)
        assert "lora_ga" in (out / "README.md").read_text()
    other = next(m.name for m in run_members(run) if "mica" in m.name)
    refused = call("export", run, "--member", other, "--format", "peft", "--out", tmp_path / "none", "--keep-base")
    assert refused.code == 2 and "--keep-base" in refused.err
