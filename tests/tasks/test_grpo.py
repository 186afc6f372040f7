"""GRPO: its formulas, what is sampled and rewarded; and what holds of every pack holds of members that learn of their own texts."""

from __future__ import annotations

import json
import sys
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.fuzz import bits_of_run, differing
from lora_jax.errors import InputWarning, Stopped
from lora_jax.generation.decoding import DecodingParams, continued
from lora_jax.generation.generate import Generator, padded
from lora_jax.generation.sampling import Sampling, row_seeds
from lora_jax.packing.execution import SCAN, VMAP
from lora_jax.packing.pack import Pack
from lora_jax.sweeps.restore import evaluate_run
from lora_jax.sweeps.run import run_sweep
from lora_jax.tasks.base import task_section
from lora_jax.tasks.grpo import group_advantages, grpo_loss
from lora_jax.tasks.rewards import made
from lora_jax.tracking import Progress
from lora_jax.training.setup import set_up
from tests import tiny
from tests.stopping import stop_at
from tests.tiny_hub import call, write_llama

STEPS = 2
# Unlike in all that may differ inside a pack.
MEMBERS = [
    {"adapter__rank": 1, "adapter__targets": ["q_proj"]},
    {"adapter__rank": 4, "adapter__targets": "all-linear", "training__seed": 1},
    {"adapter__rank": 2, "adapter__layers": "last:1", "optimizer__learning_rate": 3e-3, "training__seed": 2},
]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


@pytest.fixture
def changes(hub):
    """The changes of a causal config that make it one of GRPO."""

    def made_of(**keys):
        task = {"kind": "grpo", "source": str(hub.questions), "prompt": "prompt", "response": "response", "reward": "contains:good"}
        task |= {"eval_size": 10, "max_length": 16, "max_new_tokens": 5, "completions": 3, "update_epochs": 2, "minibatches": 2}
        more = {"training.batch_size": 4, "training.steps": 4, "training.eval_every": 2, "adapter.targets": "all-linear"}
        others = {k for k in keys if "." in k or k in ("adapter", "sweep", "mesh")}
        return {"task": task | {k: v for k, v in keys.items() if k not in others}} | more | {k: keys[k] for k in others}

    return made_of


@pytest.fixture
def config(hub, tmp_path, changes):
    """A config with changes of the task by key, and others by dotted key."""
    return lambda **keys: hub.config(tmp_path, changes(**keys), causal=True)


def loss_of_the_papers(log_probs, old, reference, advantages, weights, *, clip, clip_high, beta, kind):
    """The same sums in float64, completion by completion and token by token."""
    each, high, counted = [], clip if clip_high is None else clip_high, [i for i in range(len(weights)) if weights[i].sum()]
    for i in counted:
        terms = []
        for t in np.flatnonzero(weights[i]):
            ratio = np.exp(log_probs[i, t] - old[i, t])
            gain = min(ratio * advantages[i], np.clip(ratio, 1 - clip, 1 + high) * advantages[i])
            log_ratio = reference[i, t] - log_probs[i, t]
            terms.append(gain - beta * (np.exp(log_ratio) - log_ratio - 1))
        each.append(terms)
    if kind == "grpo":
        return -np.mean([np.mean(terms) for terms in each])
    total = sum(map(sum, each))
    return -total / (sum(map(len, each)) if kind == "dapo" else len(each) * weights.shape[1])


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("clip_high", [None, 0.4])
def test_the_loss_is_the_papers(kind, clip_high):
    rng = np.random.default_rng(0)
    old, reference = -rng.exponential(1.0, (2, 6, 7))
    log_probs, advantages = old + 0.3 * rng.standard_normal((6, 7)), rng.standard_normal(6)
    weights = (np.arange(7) < np.array([7, 1, 3, 0, 5, 7])[:, None]).astype(float)
    numbers: Any = {"clip": 0.2, "clip_high": clip_high, "beta": 0.05, "kind": kind}
    given: Any = [jnp.asarray(a, jnp.float32) for a in (log_probs, old, reference, advantages, weights)]
    wanted = loss_of_the_papers(*(np.asarray(a, np.float64) for a in given), **numbers)
    np.testing.assert_allclose(grpo_loss(*given, **numbers), wanted, rtol=1e-6, atol=1e-6)
    without = grpo_loss(given[0], given[1], None, given[3], given[4], **(numbers | {"beta": 0.0}))
    plain = loss_of_the_papers(*(np.asarray(a, np.float64) for a in given), **numbers | {"beta": 0.0})
    np.testing.assert_allclose(without, plain, rtol=1e-6, atol=1e-6)


def test_advantages_are_of_the_group():
    rewards = np.array([[1.0, 0.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    wanted = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(group_advantages(jnp.asarray(rewards, jnp.float32), divide=True), wanted, rtol=1e-6)
    plain = group_advantages(jnp.asarray(rewards, jnp.float32), divide=False)
    np.testing.assert_allclose(plain, [[0, -1, -1, 2], [0, 0, 0, 0]], atol=1e-6)


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.long), 0.7])
def test_what_is_sampled_in_a_program_is_what_generate_samples(temperature):
    """Of members under vmap, whose rows end at different steps."""
    model = tiny.decoder(2, tied=False)
    adapted = [tiny.trained(model, seed, targets="all-linear") for seed in (1, 2)]
    prompts, stop = [[3, 4, 5], [6], [7, 8, 9, 10, 11]], list(range(2, 64, 4))
    sampling = Sampling(temperature)
    wanted = Generator(adapted)(prompts, max_new_tokens=6, temperature=temperature, stop=stop, seed=5)
    tokens, mask = map(jnp.asarray, padded(prompts, 0, right=False))
    params = DecodingParams(sampling.params(tiny.VOCAB), row_seeds(5, 3), jnp.asarray(stop, jnp.int32), jnp.int32(0))
    parts = [nnx.split(m, graph=True) for m in adapted]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *(state for _, state in parts))
    run = jax.jit(jax.vmap(lambda state: continued(nnx.merge(parts[0][0], state), tokens, mask, params, sampling.method, 6)))
    found = np.asarray(run(stacked))
    lengths = set()
    for member, outputs in zip(found, wanted, strict=True):
        for row, output in zip(member, outputs, strict=True):
            assert row[: len(output.tokens)].tolist() == output.tokens and not row[len(output.tokens) :].any()
            lengths.add(len(output.tokens))
    assert len(lengths) > 1 or not temperature


def members_of(config, members=MEMBERS):
    found = []
    for member in members:
        values = config.model_dump()
        for name, value in member.items():
            section, _, key = name.partition("__")
            values[section][key] = value
        found.append(type(config).model_validate(values))
    return found


def trained(setup, configs, mode=VMAP, steps=STEPS):
    """(metrics of each step, completions of the held-out prompts, each member's arrays)."""
    pack = Pack.build(setup.model, configs, steps, setup.mesh, mode, objective=setup.objective(configs[0]))
    state, found = pack.state, []
    for step in range(steps):
        inputs = setup.step_inputs(step, setup.plan.batch(step), None)
        state, metrics = pack.programs.train(state, pack.fixed, pack.part.frozen, inputs, np.int32(step))
        found.append({"loss": np.asarray(metrics.loss)} | {name: np.asarray(a) for name, a in metrics.means.items()})
    held_out = setup.held_out_inputs(setup.plan.eval_batches()[0], None)
    said = pack.programs.evaluate(pack.eval_params(state), pack.fixed.settings, pack.part.frozen, held_out)[3]
    pack.programs.check()
    assert pack.programs.compiled == 2
    own = [pack.member_arrays(setup.model, i, state.trainable) for i in range(len(configs))]
    return {name: np.stack([step[name] for step in found]) for name in found[0]}, np.asarray(said), own


@pytest.mark.slow
@pytest.mark.parametrize(("chosen", "mode"), [((1,), VMAP), pytest.param((0, 1, 2), SCAN, marks=pytest.mark.long)])
def test_members_of_a_pack_write_and_learn_as_alone(config, chosen, mode):
    """Ranks, targets, layers, rates and seeds differ, and padding is of no account: rewards, weights and texts agree."""
    setup = set_up(config())
    configs = members_of(config())
    figures, said, arrays = trained(setup, configs, mode)
    assert len({tuple(row) for row in figures["loss"].T}) == 3 and (figures["kl"][1] > 0).all()
    for i in chosen:
        alone = trained(setup, [configs[i]], mode)
        for name, values in figures.items():
            np.testing.assert_allclose(values[:, i], alone[0][name][:, 0], rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(said[i], alone[1][0])
        for name, array in alone[2][0].items():
            np.testing.assert_allclose(arrays[i][name], array, rtol=1e-5, atol=2e-6)


MESHES = [{"data": 4}, {"fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}, {"sweep": 2, "data": 2}, {"sweep": 2}]


@pytest.mark.parametrize("mesh", [pytest.param(m, marks=pytest.mark.slow if m == MESHES[3] else pytest.mark.long) for m in MESHES], ids=str)
def test_members_on_several_devices_write_as_on_one(config, mesh):
    """Wherever prompts, completions, the base and the members lie: figures, texts and weights agree."""
    rows = {"training.batch_size": 8}
    one = trained(set_up(config(**rows)), members_of(config(**rows)))
    changed = config(mesh=mesh, **rows)
    setup = set_up(changed)
    assert setup.mesh.size == np.prod(list(mesh.values()))
    several = trained(setup, members_of(changed))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(several), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_learns_of_its_own_completions_and_the_base(config, method):
    """What a step collects, against rows one by one, without padding: log-probabilities (the base's too), ends, rewards."""
    adapter = {"adapter": {"method": "full"}} if method == "full" else {}
    own = config(sampling_temperature=0.8, **adapter)
    setup = set_up(own)
    pack = Pack.build(setup.model, [own], STEPS, setup.mesh, objective=setup.objective(own))
    task, part, rng = setup.objective(own), pack.part, np.random.default_rng(3)
    moved = {name: a[0] + 0.05 * jnp.asarray(rng.standard_normal(a.shape[1:]), jnp.float32) for name, a in pack.state.trainable.items()}
    settings = jax.tree.map(lambda a: a[0], pack.fixed.settings)
    batch = {name: jnp.asarray(a) for name, a in setup.plan.batch(0).items()}

    @jax.jit
    def collect(trainable, frozen):
        model = part.merge(trainable, settings, frozen, training=False)
        return task.collect(model, (), batch, jax.random.key(0), lambda: part.base(trainable, settings, frozen))[1]

    found, chosen, figures = jax.tree.map(np.asarray, collect(moved, part.frozen))
    assert sorted(chosen[:2].reshape(-1).tolist()) == sorted(chosen[2:].reshape(-1).tolist()) == list(range(12))
    adapted: Any = part.merge(moved, settings, part.frozen, training=False)
    model, tokenizer, alone = adapted.base, setup.data.tokenizer, cast(Any, setup.base)
    rewards, lengths = [], []
    for row in range(12):
        wanted = setup.data.train.tokens[int(batch["prompts"][0][row // 3])]
        tokens = found["tokens"][row][found["mask"][row] > 0]
        length = int(found["weights"][row].sum())
        assert tokens[: len(wanted)].tolist() == wanted.tolist() and len(tokens) == len(wanted) + length
        completion = tokens[len(wanted) :].tolist()
        assert length == 5 or completion[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in completion[:-1]
        for name, of in (("old", model), ("reference", alone)):
            logits = np.asarray(of(jnp.asarray(tokens)[None])[0], np.float64) / 0.8
            right = [logits[i - 1, tokens[i]] - np.logaddexp.reduce(logits[i - 1]) for i in range(len(wanted), len(tokens))]
            np.testing.assert_allclose(found[name][row][:length], right, rtol=2e-5, atol=2e-5)
        rewards.append(float("good" in tokenizer.decode(completion)))
        lengths.append(length)
    assert 0 < sum(rewards) < 12
    groups = np.array(rewards).reshape(4, 3)
    np.testing.assert_allclose(found["advantages"], np.asarray(group_advantages(jnp.asarray(groups), divide=True)).reshape(-1), rtol=1e-5)
    ratio = (found["old"] - found["reference"]).astype(np.float64)
    kl = (np.exp(-ratio) - 1 + ratio)[found["weights"] > 0].mean()
    assert figures == pytest.approx(
        {
            "reward": np.mean(rewards),
            "reward_std": groups.std(1, ddof=1).mean(),
            "completion_tokens": np.mean(lengths),
            "reward_failures": 0,
            "kl": kl,
        },
        rel=1e-4,
    )


@pytest.mark.long
def test_a_run_that_was_stopped_ends_with_the_same_bits(config, tmp_path, monkeypatch):
    options = {"metrics": ["token_f1"], "decoded_rows": 7, "training.pack": "vmap"}
    options |= {"sweep": {"grid": {"adapter.rank": [1, 3]}, "max_padding": 0.9}}
    whole = run_sweep(config(**options, **{"tracking.dir": str(tmp_path / "whole")}))
    assert whole.compiled_programs == 2
    for result in whole.results:
        assert result.metric == "reward" and set(result.final) == {"reward", "token_f1"} and 0 <= result.final["reward"] <= 1
    again = config(**options)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stopped):
            run_sweep(again)
    resumed = run_sweep(again)
    assert not differing(bits_of_run(whole.path), bits_of_run(resumed.path))
    found = evaluate_run(resumed.path, member=None, split="eval", progress=Progress(enabled=False))
    assert [found[r.name] for r in resumed.results] == [r.best for r in resumed.results]


REWARDS = """
def half(completion, prompt, references):
    return 0.5 if "What" in prompt and references and references[0].split()[0] in ("red", "blue") else -1

def broken(completion, prompt, references):
    if "good" in completion:
        raise KeyError("no such thing")
    return float("nan") if "bad" in completion else 1.0
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's, in the folder that Python imports from."""
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_rewards"
    sys.modules.pop("own_rewards", None)


def test_rewards_of_the_users_own_are_asked_and_may_fail(config, module):
    setup = set_up(config(reward={f"{module}:half": 2.0, "length:2": 1.0}, eval_size=4))
    judge: Any = setup.data.train.score
    ids = [setup.data.tokenizer.convert_tokens_to_ids(w) for w in ("good", "film", "bad", "plot")]
    rewards, failed = judge.rewards(np.array([[0, 1]], np.int32), np.array([[[ids[0], ids[1], 1], [ids[1], 1, 1]]], np.int32))
    assert rewards.tolist() == [[2.0, 1.5]] and not failed.any()
    judge = set_up(config(reward=f"{module}:broken")).data.train.score
    with pytest.warns(InputWarning) as said:
        rewards, failed = judge.rewards(np.arange(3, dtype=np.int32), np.array(ids[:3], np.int32)[:, None])
    assert rewards.tolist() == [0, 1, 0] and failed.tolist() == [True, False, True]
    told = [str(w.message) for w in said]
    assert "own_rewards:broken' raises KeyError: 'no such thing'" in told[0] and "gives nan" in told[1]


@pytest.mark.slow
def test_a_reward_that_fails_is_counted_and_the_member_goes_on(config, module):
    setup = set_up(config(reward=f"{module}:broken"))
    with pytest.warns(InputWarning):
        figures, _, arrays = trained(setup, [config(reward=f"{module}:broken")], steps=1)
    assert figures["reward_failures"].sum() > 0 and all(np.isfinite(a).all() for a in arrays[0].values())


@pytest.mark.parametrize(
    ("name", "completion", "wanted"),
    [
        ("exact", " blue sky ", 1), ("exact", "Blue sky", 0), ("normalised", "the Blue sky!", 1), ("number", "so 7", 0),
        ("token_f1", "blue", 2 / 3),
        ("contains:yes", "Yes, it is", 1), ("contains:yes", "yesterday", 0), ("regex:^b.*y$", "blue\nsky", 1), ("regex:x+", "blue", 0),
        ("length:4", "a b c", 0.75), ("length:2", "a b c d e", 0),
        ("format", "<think>a</think>\n<answer>b</answer>", 1), ("format", "b", 0),
    ],
)  # fmt: skip
def test_built_in_rewards(name, completion, wanted):
    reward = made(name)
    assert reward is not None and reward(completion, "what", ("blue sky",)) == pytest.approx(wanted)


def test_other_references_are_other_data(config, hub, tmp_path):
    rows = [json.loads(line) for line in hub.questions.read_text().splitlines()]
    before = set_up(config()).identity
    rows[7]["response"] += " and"
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    after = set_up(config(source=str(tmp_path / "other.jsonl"))).identity
    assert {part for part in before if before[part] != after[part]} in ({"train"}, {"held_out"})


@pytest.mark.long
@pytest.mark.parametrize(
    "keys",
    [{"beta": 0.5}, {"beta": 0.0}, {"clip": 0.01}, {"clip_high": 0.01}, {"loss": "dapo"}, {"loss": "dr_grpo"}, {"divide_by_std": False},
     {"sampling_temperature": 0.5}, {"completions": 2}, {"update_epochs": 1}, {"minibatches": 4}, {"max_new_tokens": 4},
     {"leave_out_equal": True}],
)  # fmt: skip
def test_every_number_changes_what_is_learned(config, keys):
    arrays = []
    for changes in ({}, keys):
        own = config(**changes, **{"adapter.rank": 2, "optimizer.learning_rate": 0.05})
        arrays.append(trained(set_up(own), [own])[2][0])
    assert any(tiny.relative(arrays[1][name], arrays[0][name]) > 1e-4 for name in arrays[0])


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"reward": "exakt"}, ["task.reward", "there is no reward 'exakt'", "'exact'"]),
        ({"reward": "own_rewards:nothing"}, ["task.reward", "has no 'nothing'"]),
        ({"reward": "no_such_module:f"}, ["task.reward", "cannot import no_such_module"]),
        ({"reward": "contains"}, ["task.reward", "contains:WORD"]),
        ({"reward": "length:many"}, ["task.reward", "length:20"]),
        ({"reward": "regex:("}, ["task.reward", "regex:("]),
        ({"reward": []}, ["task.reward", "names no reward"]),
        ({"reward": {"format": 0.0}}, ["task.reward", "weight of 'format' is 0"]),
        ({"response": None, "reward": "number"}, ["'number' needs 'response'"]),
        ({"response": None, "metrics": ["bleu"]}, ["'bleu' needs 'response'"]),
        ({"prompt": "promt"}, ["task.prompt", "no column 'promt'", "'prompt'"]),
        ({"response": "answer"}, ["task.response", "no column 'answer'"]),
        ({"completions": 1}, ["task.completions"]),
        ({"minibatches": 5}, ["task.minibatches: 5 must divide", "(12)"]),
        ({"max_new_tokens": 16}, ["'max_new_tokens' (16) must be below 'max_length' (16)"]),
        ({"training.batch_size": 52}, ["training.batch_size: 52", "only 50"]),
        ({"training.accumulate": 2}, ["training.accumulate: not with task.kind 'grpo'"]),
        ({"mesh.data": 3}, ["training.batch_size: 4, which 3 devices", "mesh.data * mesh.fsdp"]),
        ({"mesh.fsdp": 4, "minibatches": 6}, ["task.minibatches: of 2 completions each, which 4 devices"]),
        ({"model.dropout": 0.1}, ["model.dropout: not with task.kind 'grpo'"]),
        ({"adapter.init": "eva"}, ["the init reads training batches"]),
    ],
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)  # fmt: skip
def test_wrong_input_is_told_by_its_key(hub, tmp_path, module, changes, keys, told):
    result = call("train", hub.write(tmp_path, changes(**keys), causal=True))
    assert result.code == 2 and "Traceback" not in result.err, result
    for part in told:
        assert part in result.err
    assert not (tmp_path / "runs").exists()


def test_a_base_that_is_no_decoder_is_refused(hub, tmp_path, changes):
    result = call("train", hub.write(tmp_path, changes(**{"model.source": str(hub.bert)}), causal=True))
    assert result.code == 2 and "needs a decoder" in result.err and "Traceback" not in result.err


def test_a_section_has_one_reward_or_several():
    keys = {"kind": "grpo", "source": "rows.jsonl", "prompt": "p"}
    for reward in ("format", ["format", "length:3"], {"format": 1.0, "os.path:join": 0.5}):
        assert task_section(**keys, reward=reward).reward == reward


@pytest.mark.long
def test_the_word_that_is_rewarded_is_written(config, tmp_path):
    """A planted solution: ranks 1, 8 and full fine-tuning come near the largest reward there is."""
    planted = {"completions": 4, "update_epochs": 1, "minibatches": 1, "response": None, "temperature": 1.0}
    planted |= {"training.steps": 40, "training.eval_every": 0, "training.pack": "vmap"}
    ranks = {"sweep": {"grid": {"adapter.rank": [1, 8]}, "max_padding": 0.9}, "optimizer.learning_rate": 0.03}
    full = {"adapter": {"method": "full"}, "optimizer.learning_rate": 3e-3}
    for number, keys in enumerate((ranks, full)):
        for result in run_sweep(config(**planted, **keys, **{"tracking.dir": str(tmp_path / str(number))})).results:
            assert result.final["reward"] > 0.9, result


@pytest.mark.long
def test_a_model_that_adds_a_little_learns_to_add(hub, tmp_path):
    """One-digit addition: warmed up on sums of which half have any answer, a model learns of rewards alone which are right."""
    write_llama(tmp_path / "new", ("+", "=", *map(str, range(19))))

    rng = np.random.default_rng(0)

    def write(name, wrong):
        sums = [
            (a, b, said) for a in range(10) for b in range(10) for said in ([a + b, a + b, *rng.integers(0, 19, 2)] if wrong else [a + b])
        ]
        rows = [{"prompt": f"{a} + {b} =", "response": str(said)} for a, b, said in sums]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    common = {
        "eval_source": write("asked.jsonl", wrong=False),
        "eval_size": "all",
        "max_length": 16,
        "prompt": "prompt",
        "response": "response",
    }
    warm = {"kind": "causal_lm", "source": write("taught.jsonl", wrong=True)} | common
    changes = {"model.source": str(tmp_path / "new"), "task": warm, "adapter": {"method": "full"}, "optimizer.learning_rate": 3e-3}
    changes |= {"training": {"steps": 800, "batch_size": 50}}
    assert call("train", hub.write(tmp_path, changes, causal=True, name="warm")).code == 0
    assert call("export", tmp_path / "runs" / "warm", "--format", "hf", "--out", tmp_path / "base").code == 0

    task = {
        "kind": "grpo",
        "source": write("sums.jsonl", wrong=False),
        "reward": "number",
        "metrics": ["exact"],
        "completions": 12,
    } | common
    task |= {"max_new_tokens": 2, "temperature": 1.0, "beta": 0.0}
    changes = {"model.source": str(tmp_path / "base"), "task": task, "adapter": {"targets": "all-linear"}}
    changes |= {"training": {"steps": 140, "batch_size": 32, "eval_every": 0, "pack": "vmap"}}
    changes["optimizer"] = {"learning_rate": 5e-3, "schedule": "constant"}
    full = {"adapter.method": "full", "optimizer.learning_rate": 1e-3}
    ranks = [{"adapter.rank": 1}, {"adapter.rank": 8}]
    changes |= {"sweep": {"members": [*ranks, full], "max_padding": 0.9}}
    learned = call("sweep", hub.write(tmp_path, changes, causal=True, name="learns"))
    assert learned.code == 0 and "compiled programs: 4" in learned.out, learned.err  # both ranks in one pack
    found = evaluate_run(tmp_path / "runs" / "learns", member=None, split="eval", progress=Progress(enabled=False), base=True)
    before, *after = (figures["reward"] for figures in found.values())
    assert 0.2 < before < 0.6 and len(after) == 3 and min(after) > 0.9, found
