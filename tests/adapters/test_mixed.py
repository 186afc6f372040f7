"""Mixed batches: every row as in a batch of its own adapter alone, in one compiled program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.adapters.bank import AdapterBank
from lora_jax.adapters.mixed import with_rows
from lora_jax.models.load import load_model
from lora_jax.weights.tokenizer import load_tokenizer
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")

# Other ranks, scales, layers and sites each; in the encoder `late` leaves the lowest layers one segment without adapters.
ADAPTERS = {
    "decoder": {
        "wide": {"targets": "all-linear", "rank": 3},
        "late": {"targets": ["q_proj", "down_proj"], "layers": "last:1", "rank": 5, "rslora": True},
        "ends": {"targets": ["embed", "lm_head", "v_proj"], "rank": 2, "rank_pattern": {"v_proj": 4}, "dropout": 0.5},
    },
    "encoder": {
        "late": {"targets": "attention", "layers": [2, 3], "rank": 3},
        "top": {"targets": ["up_proj", "pooler"], "rank": 5, "alpha": 3.0},
        "down": {"targets": ["down_proj"], "layers": "last:1", "rank": 2},
    },
}


def _bank(kind, **options):
    base = tiny.decoder(3, tied=False, **options) if kind == "decoder" else tiny.classifier(4, **options)
    bank = AdapterBank(base)
    for seed, (name, values) in enumerate(ADAPTERS[kind].items()):
        bank.add(name, tiny.trained(base, seed, **values))
    return bank


class Counted:
    """A method of a model, compiled; counts how often."""

    def __init__(self, method="__call__"):
        self.count = 0

        def run(graphdef, state, args, kwargs):
            self.count += 1
            return getattr(nnx.merge(graphdef, state), method)(*args, **kwargs)

        self.run = jax.jit(run, static_argnums=0)

    def __call__(self, model, *args, **kwargs):
        graphdef, state = nnx.split(model, graph=True)
        return np.asarray(self.run(graphdef, state, args, kwargs))


def _tokens(rows, length=9, seed=0):
    return np.random.default_rng(seed).integers(1, tiny.VOCAB, (rows, length)).astype(np.int32)


def test_each_row_equals_its_single_adapter_run_in_one_program():
    bank = _bank("decoder")
    tokens, mask = _tokens(6), np.ones((6, 9), np.int32)
    mask[1, 5:] = mask[4, :3] = 0
    alone = {n: tiny.outputs(bank.use(n), tokens, mask) for n in (*bank.names, None)}
    for name in bank.names:
        assert tiny.relative(alone[name], alone[None]) > 1e-2
    run = Counted()
    for rows in (["wide", "late", None, "ends", None, "wide"], ["ends"] * 6, [None, "ends", "wide", "late", "late", "ends"]):
        got = run(bank.mixed(rows), tokens, mask)
        for i, name in enumerate(rows):
            assert tiny.relative(got[i], alone[name][i]) < 1e-5, (i, name)
    assert run.count == 1


def test_rows_without_an_adapter_have_the_bits_of_the_base():
    bank = _bank("decoder")
    broken = tiny.trained(bank.base, 7, targets="all-linear")  # what another row takes is of no matter, whatever it is
    for _, variable in nnx.iter_graph(broken):
        if isinstance(variable, nnx.Variable) and variable.get_metadata().get("label") == "adapter_b":
            variable.set_value(jnp.full(variable.shape, jnp.nan))
    bank.add("broken", broken)
    tokens = _tokens(4)
    wanted = tiny.outputs(bank.base, tokens, bits=True)
    got = tiny.outputs(bank.mixed([None, "broken", "wide", None]), tokens, bits=True)
    np.testing.assert_array_equal(got[[0, 3]], wanted[[0, 3]])
    assert np.isnan(got[1]).all() and np.isfinite(got[2]).all() and not np.array_equal(got[2], wanted[2])
    with bank.disabled():
        np.testing.assert_array_equal(tiny.outputs(bank.mixed(["wide"] * 4), tokens, bits=True), wanted)


@pytest.mark.long
def test_bfloat16_rows_too():
    bank = _bank("decoder", dtype=jnp.bfloat16)
    tokens, rows = _tokens(4), ["late", "wide", None, "ends"]
    got = tiny.outputs(bank.mixed(rows), tokens).astype(np.float32)
    for i, name in enumerate(rows[:2]):
        assert tiny.relative(got[i], tiny.outputs(bank.use(name), tokens)[i].astype(np.float32)) < 2e-2


@pytest.mark.parametrize("pooling", ["cls", pytest.param("mean", marks=pytest.mark.slow)])
def test_gathered_positions_take_the_adapter_of_their_row(pooling):
    """A classifier's features: several examples a row, the top layer and the pooler at their first tokens alone."""
    bank = _bank("encoder", pooling=pooling)
    batch = {k: v[0] for k, v in tiny.batch(rows=3).items()}
    used = batch["target_weights"] > 0
    row_of = batch["target_index"] // batch["tokens"].shape[1]
    rows = ["down", "late", "top"]
    got = tiny.outputs(bank.mixed(rows), batch, method="features")
    for row, name in enumerate(rows):
        here = used & (row_of == row)
        assert here.sum() == 2
        assert tiny.relative(got[here], tiny.outputs(bank.use(name), batch, method="features")[here]) < 1e-5


@pytest.mark.slow
def test_gathering_as_many_positions_as_rows_mixes_none_up():
    bank = _bank("decoder")
    tokens, rows = _tokens(3), ["late", "wide", "ends"]
    index = np.array([17, 2, 3], np.int32)  # rows 1, 0, 0
    got = tiny.outputs(bank.mixed(rows), tokens, gather=index, method="hidden")
    for i, name in enumerate(["wide", "late", "late"]):
        assert tiny.relative(got[i], tiny.outputs(bank.use(name), tokens, gather=index, method="hidden")[i]) < 1e-5


@pytest.mark.parametrize("shared", [pytest.param(True, marks=pytest.mark.long), False])
def test_what_rows_share_becomes_each_rows_own(shared):
    """DeBERTa's vectors of relative positions, projected at an adapter's site."""
    options = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": shared}
    bank = AdapterBank(tiny.encoder_of("deberta-v2", **options))
    for seed, name in enumerate(["keys", "queries"]):
        own = f"{name[0]}_proj" if shared else f"pos_{name[0]}_proj"
        bank.add(name, tiny.trained(bank.base, seed, targets=[own]))
    tokens, rows = _tokens(3), ["queries", None, "keys"]
    got = tiny.outputs(bank.mixed(rows), tokens)
    for i, name in enumerate(rows):
        assert tiny.relative(got[i], tiny.outputs(bank.use(name), tokens)[i]) < 1e-5
    assert tiny.relative(got[0], tiny.outputs(bank.base, tokens)[0]) > 1e-3


def test_rows_may_be_traced():
    bank = _bank("decoder")
    tokens = _tokens(2)
    graphdef, state = nnx.split(bank.mixed([None]), graph=True)

    @jax.jit
    def run(state, ids):
        return with_rows(nnx.merge(graphdef, state), ids)(tokens)

    for rows in (["late", None], ["ends", "wide"]):
        got, wanted = run(state, bank.row_ids(rows)), tiny.outputs(bank.mixed(rows), tokens)
        assert tiny.relative(got, wanted) < 1e-6
    with pytest.raises(ValueError, match=r"shape \(2, 9, 32\) in a batch whose 3 rows"):
        run(state, bank.row_ids(["late", None, "wide"]))
    with pytest.raises(ValueError, match=r"AdapterBank\.mixed"):
        with_rows(bank.base, [0])


def test_a_users_own_model():
    base = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
    bank = AdapterBank(base)
    bank.add("both", tiny.trained(base, 1, targets="all-linear"))
    bank.add("first", tiny.trained(base, 2, targets=["layers.0"]))
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    rows = ["first", None, "both"]
    got = bank.mixed(rows)(x)
    for i, name in enumerate(rows):
        np.testing.assert_allclose(got[i], bank.use(name)(x)[i], rtol=1e-5, atol=1e-6)
    # A model that lays the positions of its rows flat: equally many of each, in order.
    flat = bank.mixed(rows[:2])(np.repeat(x[:2], 2, axis=0))
    np.testing.assert_allclose(flat, np.repeat(got[:2], 2, axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", pytest.param("decoder", marks=pytest.mark.long)])
def test_real_models(kind, request):
    """MiniLM and SmolLM2: three adapters and the base in one batch of real sentences of unlike length."""
    source = request.getfixturevalue({"encoder": "minilm_source", "decoder": "smollm2_source"}[kind])
    base, tokenizer = load_model(source), load_tokenizer(source)
    texts = ["A film of quiet power.", "Too long.", "It never quite decides what it wants to be, and neither will you.", "Go and see it!"]
    ids = [tokenizer.encode(text) for text in texts]
    mask = np.array([[1] * len(i) + [0] * (24 - len(i)) for i in ids], np.int32)
    tokens = np.array([i + [0] * (24 - len(i)) for i in ids], np.int32)
    bank = AdapterBank(base)
    options = {"attention": {"rank": 4}, "mlp": {"rank": 8, "layers": "last:3"}, "embedding": {"rank": 2}}
    for seed, (targets, values) in enumerate(options.items()):
        bank.add(targets, tiny.trained(base, seed, targets=targets, **values))
    rows = ["mlp", None, "embedding", "attention"]
    got, plain = (tiny.outputs(m, tokens, mask, method="hidden") for m in (bank.mixed(rows), base))
    for i, name in enumerate(rows):
        real = mask[i] > 0
        wanted = tiny.outputs(bank.use(name), tokens, mask, method="hidden")[i, real] if name else plain[i, real]
        assert tiny.relative(got[i, real], wanted) < 2e-5, name
        assert name is None or tiny.relative(wanted, plain[i, real]) > 1e-3, name
