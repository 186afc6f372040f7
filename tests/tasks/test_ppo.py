"""PPO: its formulas, the policy base, environments with changed physics; and what holds of every pack holds of members that play."""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

from experiments.fuzz import bits_of_run, differing
from lora_jax.adapters.inject import inject
from lora_jax.adapters.merge import merge, unmerge
from lora_jax.config.load import load_config
from lora_jax.errors import InputError, Stopped
from lora_jax.models.families.actor_critic import save_policy
from lora_jax.models.load import load_model
from lora_jax.models.policy import Policy, PolicyConfig, log_probability
from lora_jax.models.tensors import base_tensors
from lora_jax.packing.execution import SCAN, VMAP
from lora_jax.packing.pack import Pack
from lora_jax.parallel.mesh import to_host
from lora_jax.sweeps.restore import evaluate_run, restore_member, run_members
from lora_jax.sweeps.run import run_sweep
from lora_jax.tasks.base import task_section
from lora_jax.tasks.ppo import Rollouts, advantages, clipped_surrogate, values_where
from lora_jax.tracking import Progress
from lora_jax.training.setup import set_up
from tests import tiny
from tests.stopping import stop_at
from tests.tiny_hub import call

gymnax = pytest.importorskip("gymnax")

IMAGE = PolicyConfig((10, 10, 4), 5, (16,), (4,), "relu")
STEPS = 3
# Unlike in all that may differ inside a pack.
MEMBERS = [
    {"adapter__rank": 1, "adapter__targets": ["dense_0"]},
    {"adapter__rank": 4, "adapter__targets": "all-linear", "training__seed": 1},
    {"adapter__rank": 2, "adapter__targets": ["actor", "dense_1"], "optimizer__learning_rate": 3e-3, "training__seed": 2},
]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


SMALL = PolicyConfig((4,), 2, (16, 8))


def policy(config: PolicyConfig = SMALL, seed: int = 0) -> Policy:
    return tiny.random_model(lambda: Policy(config, rngs=nnx.Rngs(0)), seed)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    save_policy(policy(), folder)
    return folder


@pytest.fixture
def config(base, tmp_path):
    """A config with changes by dotted key; `write` gives the file."""

    def make(changes=None, *, write=False):
        values = {
            "name": "tiny",
            "model": {"source": str(base)},
            "task": {"kind": "ppo", "environment": "CartPole-v1", "environments": 4, "rollout": 8, "update_epochs": 2, "minibatches": 2},
            "adapter": {"rank": 2, "targets": "all-linear"},
            "optimizer": {"learning_rate": 0.01},
            "training": {"steps": 4, "eval_every": 2},
            "tracking": {"log_every": 2, "dir": str(tmp_path / "runs")},
        }
        values["task"] |= {"physics": {"max_steps_in_episode": 20}, "eval_episodes": 3}
        for dotted, value in (changes or {}).items():
            *path, last = dotted.split(".")
            place = values
            for part in path:
                place = place.setdefault(part, {})
            place[last] = value
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
        return tmp_path / "tiny.yaml" if write else load_config(tmp_path / "tiny.yaml")

    return make


def test_advantages_are_the_papers_sums():
    """Each is sum_l (gamma lambda)^l delta_{t+l} to the end of its episode; what ran out of time goes on in its value."""
    rng, steps = np.random.default_rng(0), 9
    rewards, values, following = rng.standard_normal((3, steps, 2))
    terminated = np.zeros((steps, 2), bool)
    done = np.zeros((steps, 2), bool)
    terminated[3, 0] = done[3, 0] = done[5, 1] = True
    gamma, lam = 0.9, 0.8
    wanted = np.zeros((steps, 2))
    for env in range(2):
        for t in range(steps):
            for later in range(t, steps):
                delta = rewards[later, env] + gamma * following[later, env] * (not terminated[later, env]) - values[later, env]
                wanted[t, env] += (gamma * lam) ** (later - t) * delta
                if done[later, env]:
                    break
    found = advantages(*(jnp.asarray(a, jnp.float32) for a in (rewards, values, following)), terminated, done, gamma, lam)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_values_are_computed_of_the_ends_of_episodes(share):
    """Under vmap too, where one lane has more ends than another."""
    model, rng = policy(), np.random.default_rng(2)
    seen = jnp.asarray(rng.standard_normal((3, 20, 4, 4)), jnp.float32)
    wanted = rng.random((3, 20, 4)) < share * np.array([1, 0.5, 0])[:, None, None]
    found = jax.jit(jax.vmap(lambda seen, wanted: values_where(lambda x: model(x)[1], seen, wanted)))(seen, wanted)
    np.testing.assert_allclose(found, np.where(wanted, model(seen)[1], 0), rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_papers():
    section = task_section(kind="ppo", environment="CartPole-v1", entropy=0.03, value=0.7, clip=0.1)
    model, rng = policy(), np.random.default_rng(1)
    part = {"observations": rng.standard_normal((6, 4)), "actions": np.array([0, 1, 1, 0, 1, 0]), "returns": rng.standard_normal(6)}
    part |= {"log_probabilities": np.log(rng.uniform(0.2, 0.8, 6)), "advantages": rng.standard_normal(6)}
    logits, values = (np.asarray(a, np.float64) for a in model(jnp.asarray(part["observations"], jnp.float32)))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ratio = p[np.arange(6), part["actions"]] / np.exp(part["log_probabilities"])
    a = (part["advantages"] - part["advantages"].mean()) / part["advantages"].std()
    gain = np.minimum(ratio * a, np.clip(ratio, 0.9, 1.1) * a).mean()
    wanted = -(gain - 0.7 * ((values - part["returns"]) ** 2).mean() + 0.03 * -(p * np.log(p)).sum(-1).mean())
    found = Rollouts(section).loss(model, {n: jnp.asarray(v, jnp.int32 if n == "actions" else jnp.float32) for n, v in part.items()})
    np.testing.assert_allclose(found, wanted, rtol=2e-6)
    assert clipped_surrogate(2.0, 1.0, 0.2) == pytest.approx(1.2) and clipped_surrogate(2.0, -1.0, 0.2) == -2.0


def test_a_policy_is_saved_and_loaded_bit_for_bit(tmp_path):
    for number, model in enumerate((policy(), policy(IMAGE))):
        save_policy(model, tmp_path / str(number))
        loaded = load_model(str(tmp_path / str(number)))
        assert loaded.config == model.config and tiny.arrays_equal(tiny.base_arrays(loaded), tiny.base_arrays(model))
        seen = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, *model.config.observation)), jnp.float32)
        logits, values = loaded(seen)
        assert logits.shape == (3, 2, model.config.actions) and values.shape == (3, 2)
        assert tiny.arrays_equal((logits, values), model(seen))
        assert {name: t.shape for name, t in base_tensors(loaded).items()}["actor.weight"] == model.config.layers["actor"][::-1]
        np.testing.assert_allclose(np.exp(log_probability(logits, jnp.zeros((3, 2), int))), jax.nn.softmax(logits)[..., 0], rtol=1e-6)


def test_a_new_policy_is_orthogonal_and_undecided():
    model = Policy(PolicyConfig((4,), 2, (16,)), rngs=nnx.Rngs(0))
    kernel = np.asarray(model.dense_0.kernel[...])
    np.testing.assert_allclose(kernel @ kernel.T, 2 * np.eye(4), atol=1e-5)
    assert np.abs(model(jnp.ones((5, 4)))[0]).max() < 0.1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_sizes": []}, "hidden_sizes"),
        ({"num_actions": 2.5}, "num_actions = 2.5"),
        ({"channels": [4]}, "an observation has 1 axes, not 3"),
        ({"activation": "swoosh"}, "swoosh"),
        ({"hidden_sizes": [16, 9]}, "has shape"),
    ],
)
def test_a_policy_whose_config_is_wrong_is_refused(base, tmp_path, changes, told):
    hf = json.loads((base / "config.json").read_text()) | changes
    (tmp_path / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(InputError, match=told):
        load_model(str(tmp_path))


@pytest.mark.parametrize("shape", [SMALL, IMAGE], ids=["mlp", "conv"])
def test_an_adapted_policy_starts_as_its_base_and_merges(shape):
    model = policy(shape)
    seen = jnp.asarray(np.random.default_rng(0).standard_normal((7, *shape.observation)), jnp.float32)
    options = {"targets": "all-linear"} if not shape.channels else {"targets": ["dense_0", "actor", "critic"]}
    assert tiny.arrays_equal(inject(model, tiny.adapter(**options), rngs=nnx.Rngs(1))(seen), model(seen))
    adapted = tiny.trained(model, **options)
    trained, before = adapted(seen), tiny.base_arrays(adapted)
    assert tiny.relative(trained[0], model(seen)[0]) > 1e-2
    merged = merge(adapted)
    for found, wanted in zip(merged(seen), trained):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert tiny.arrays_equal(tiny.base_arrays(unmerge(merged)), before)


def members_of(config, members=MEMBERS):
    found = []
    for member in members:
        values = config.model_dump()
        for name, value in member.items():
            section, _, key = name.partition("__")
            values[section][key] = value
        found.append(type(config).model_validate(values))
    return found


def trained(setup, configs, mode=VMAP):
    """(losses (steps, members), returns (members, episodes), each member's arrays, the environments at the end)."""
    pack = Pack.build(setup.model, configs, STEPS, setup.mesh, mode)
    state, losses = pack.state, []
    for step in range(STEPS):
        inputs = setup.step_inputs(step, setup.plan.batch(step), None)
        state, metrics = pack.programs.train(state, pack.fixed, pack.part.frozen, inputs, np.int32(step))
        losses.append(np.asarray(metrics.loss))
    held_out = setup.held_out_inputs(setup.plan.eval_batches()[0], None)
    returns = pack.programs.evaluate(pack.eval_params(state), pack.fixed.settings, pack.part.frozen, held_out)[3]
    pack.programs.check()
    assert pack.programs.compiled == 2
    own = [pack.member_arrays(setup.model, i, state.trainable) for i in range(len(configs))]
    return np.stack(losses), np.asarray(returns), own, jax.tree.map(to_host, state.rollout)


@pytest.mark.parametrize(
    ("chosen", "mode"), [((1,), VMAP), *(pytest.param(*case, marks=pytest.mark.slow) for case in (((0, 2), VMAP), ((0, 1, 2), SCAN)))]
)
def test_members_of_a_pack_play_and_learn_as_alone(config, chosen, mode):
    """Ranks, targets, rates and seeds differ, and padding is of no account: weights, environments and returns agree."""
    setup = set_up(config())
    configs = members_of(config())
    losses, returns, arrays, worlds = trained(setup, configs, mode)
    assert len({tuple(row) for row in losses.T}) == 3
    for i in chosen:
        alone = trained(setup, [configs[i]], mode)
        np.testing.assert_allclose(losses[:, i], alone[0][:, 0], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(returns[i], alone[1][0])
        for name, array in alone[2][0].items():
            np.testing.assert_allclose(arrays[i][name], array, rtol=1e-5, atol=1e-6)
        for packed, single in zip(jax.tree.leaves(worlds), jax.tree.leaves(alone[3]), strict=True):
            np.testing.assert_allclose(packed[i], single[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_members_on_several_devices_play_as_on_one(config):
    one = trained(set_up(config()), members_of(config()))
    changed = config({"mesh.sweep": 2})
    setup = set_up(changed)
    assert setup.mesh.shape["sweep"] == 2
    several = trained(setup, members_of(changed))
    for a, b in zip(jax.tree.leaves(one[:3]), jax.tree.leaves(several[:3]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_same_bits(config, tmp_path, monkeypatch):
    """Environments, half-way in their episodes, are in the checkpoints."""
    changes = {"training.pack": "vmap", "sweep": {"grid": {"adapter.rank": [1, 3]}, "max_padding": 0.9}}
    whole = run_sweep(config(changes | {"tracking.dir": str(tmp_path / "whole")}))
    assert whole.compiled_programs == 2
    for result in whole.results:
        assert 1 <= result.final["episode_return"] <= 20 and result.metric == "episode_return" and result.tokens == 4 * 4 * 8
        assert set(result.final) == {"episode_return"}
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stopped):
            run_sweep(config(changes))
    resumed = run_sweep(config(changes))
    assert not differing(bits_of_run(whole.path), bits_of_run(resumed.path))
    # Their adapters are evaluated again to the same figures.
    again = evaluate_run(resumed.path, member=None, split="eval", progress=Progress(enabled=False))
    assert [again[r.name] for r in resumed.results] == [r.best for r in resumed.results]
    restored = restore_member(resumed.path, run_members(resumed.path)[0])
    assert restored.model(jnp.ones((1, 4)))[0].shape == (1, 2)
    refused = call("predict", resumed.path, "--source", tmp_path / "tiny.yaml")
    assert refused.code == 2 and "reads no rows" in refused.err


@pytest.mark.long
@pytest.mark.parametrize(
    ("key", "value"),
    [("gamma", 0.5), ("gae_lambda", 0.3), ("clip", 0.001), ("entropy", 0.5), ("value", 0.1), ("update_epochs", 3), ("minibatches", 4),
     ("environments", 6), ("rollout", 10)],
)  # fmt: skip
def test_every_number_changes_what_is_learned(config, key, value):
    arrays = []
    for changes in ({}, {f"task.{key}": value}):
        setup = set_up(config(changes))
        arrays.append(trained(setup, [config(changes | {"adapter.rank": 2})])[2][0])
    assert any(tiny.relative(arrays[1][name], arrays[0][name]) > 1e-4 for name in arrays[0])


def test_optimizer_steps_are_counted_within_a_training_step(config):
    """A linear schedule over 4 training steps of 2 x 2 updates ends at its 16th optimizer step."""
    setup = set_up(config())
    pack = Pack.build(setup.model, [config()], setup.steps, setup.mesh)
    assert pack.fixed.hyper.steps[0] == 16
    inputs = setup.step_inputs(0, setup.plan.batch(0), None)
    _, metrics = pack.programs.train(pack.state, pack.fixed, pack.part.frozen, inputs, np.int32(0))
    np.testing.assert_allclose(metrics.learning_rate, 0.01 * (1 - 3 / 16), rtol=1e-6)


def test_physics_change_what_an_environment_does():
    section = {"kind": "ppo", "environment": "CartPole-v1"}
    model, batch = policy(), {"tokens": jnp.arange(24, dtype=jnp.int32).reshape(8, 3)}
    changes = {"max_steps_in_episode": 30}, {"max_steps_in_episode": 30, "gravity": 60.0}
    found = [np.asarray(Rollouts(task_section(**section, physics=p)).evaluate(model, batch)) for p in changes]
    assert (found[0] <= 30).all() and found[1].mean() < found[0].mean()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"task.environment": "CartPole-v2"}, ["task.environment: gymnax has no 'CartPole-v2'", "CartPole-v1"]),
        ({"task.environment": "Pendulum-v1"}, ["task.environment: Pendulum-v1: only environments with discrete actions"]),
        ({"task.environment": "Asterix-MinAtar", "task.physics": {}}, ["model.source", "observations of shape 4", "10 x 10 x 4"]),
        ({"task.environment": "Acrobot-v1"}, ["model.source", "observations of shape 4", "has 6"]),
        ({"task.physics": {"gravty": 3.0}}, ["task.physics: CartPole-v1 has no number 'gravty'", "'gravity'"]),
        ({"task.physics": {"max_steps_in_episode": 2.5}}, ["max_steps_in_episode", "whole number"]),
        ({"task.physics": {"max_steps_in_episode": 0}}, ["max_steps_in_episode", "1 or more"]),
        ({"task.minibatches": 5}, ["'minibatches' (5) must divide", "(32)"]),
        ({"task.gamma": 1.5}, ["task.gamma"]),
        ({"task.enviroment": "CartPole-v1"}, ["task.enviroment", "task.environment"]),
        ({"task.source": "rows.csv"}, ["task.source"]),
        ({"training.batch_size": 8}, ["training.batch_size: not with task.kind 'ppo'"]),
        ({"training.accumulate": 2}, ["training.accumulate: not with task.kind 'ppo'"]),
        ({"training.steps": None, "training.epochs": 1}, ["training.epochs: not with task.kind 'ppo'", "training.steps"]),
        ({"mesh.data": 2}, ["mesh.data: not with task.kind 'ppo'", "mesh.sweep"]),
        ({"model.dropout": 0.1}, ["model.dropout"]),
        ({"adapter.init": "eva"}, ["the init reads training batches"]),
        ({"adapter.targets": ["dense_7"]}, ["adapter.targets", "dense_7"]),
        ({"adapter": {"method": "head"}}, ["nothing to train"]),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_wrong_input_is_told_by_its_key(config, tmp_path, changes, told):
    result = call("train", config(changes, write=True))
    assert result.code == 2 and "Traceback" not in result.err, result
    for part in told:
        assert part in result.err
    assert not (tmp_path / "runs").exists()


def test_a_base_that_is_no_policy_is_refused(config, hub):
    result = call("train", config({"model.source": str(hub.bert)}, write=True))
    assert result.code == 2 and "is no policy" in result.err and "Traceback" not in result.err


def test_heads_alone_train_where_they_are_named(config):
    """The baseline of linear probing: actor and critic of the base."""
    setup = set_up(config())
    own = config({"adapter": {"method": "head", "modules_to_save": ["actor", "critic"]}})
    pack = Pack.build(setup.model, [own], STEPS, setup.mesh)
    assert {name.partition(".")[0] for name in pack.part.trainable} == {"actor", "critic"}


@pytest.mark.slow
def test_a_new_policy_learns_to_balance(tmp_path, config):
    save_policy(Policy(PolicyConfig((4,), 2, (32, 32)), rngs=nnx.Rngs(0)), tmp_path / "new")
    changes = {"model.source": str(tmp_path / "new"), "adapter": {"method": "full"}, "optimizer": {"learning_rate": 3e-3, "clip_norm": 0.5}}
    changes |= {"task.physics": {"max_steps_in_episode": 200}, "task.environments": 8, "task.rollout": 64, "task.update_epochs": 4}
    changes |= {"task.minibatches": 4, "task.eval_episodes": 16, "task.value": 0.01, "training": {"steps": 80, "eval_every": 20}}
    (result,) = run_sweep(config(changes)).results
    assert result.best["episode_return"] > 60  # about 20 at the start
