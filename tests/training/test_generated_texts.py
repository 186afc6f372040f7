"""Members of a pack decode at once: each gives the texts that it gives alone, and its run records what they score."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lora_jax
from lora_jax.generation.decoding import programs_for
from lora_jax.packing.pack import Pack
from lora_jax.sweeps.restore import BASE, evaluate_run, restore_member, run_members
from lora_jax.sweeps.run import run_sweep
from lora_jax.sweeps.space import members_of
from lora_jax.tasks.evaluators import EVALUATORS
from lora_jax.tracking import MemberResult, Progress, read_run
from lora_jax.training.evaluation import decode_pack, evaluate_pack
from lora_jax.training.setup import set_up
from tests import tiny
from tests.tiny_hub import call

pytestmark = pytest.mark.usefixtures("compile_cache")

METRICS = ["token_f1", "exact", "rouge1", "bleu"]
SWEEP = {"grid": {"adapter.rank": [1, 3], "optimizer.learning_rate": [0.05, 1e-20]}}


def changes(hub, **more):
    task = {"kind": "generation", "source": str(hub.questions), "prompt": "prompt", "response": "response", "metrics": METRICS}
    task |= {"max_length": 24, "max_new_tokens": 8, "eval_size": 20, "decoded_rows": 11}
    return {"task": task, "sweep": SWEEP, "training.steps": 6, "training.eval_every": 3, "adapter.targets": "all-linear"} | more


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory, compile_cache, quick):
    """The directory of a sweep of four members."""
    return run_sweep(hub.config(tmp_path_factory.mktemp("generated"), changes(hub), causal=True)).path


def outputs_alone(run, member, prompts):
    """What a saved member generates, alone and a prompt at a time in batches of one length."""
    restored, tokenizer = restore_member(run, member), lora_jax.load_tokenizer(member.config.model.source)
    found = lora_jax.generate(restored.model, [p.tolist() for p in prompts.tokens], tokenizer, max_new_tokens=prompts.max_new_tokens)
    return [output.text.strip() for output in found]


@pytest.mark.slow
def test_members_are_scored_by_what_each_generates_alone(run, hub):
    results = {r.name: r for r in read_run(run)}
    prompts = set_up(run_members(run)[0].config).data.held_out.prompts
    assert len(prompts) == 11
    moved = set()
    for member in run_members(run)[::3]:
        alone, result = outputs_alone(run, member, prompts), results[member.name]
        for name in METRICS:
            value = EVALUATORS.get(name, "test").from_texts(alone, prompts.references)
            assert result.best[name] == pytest.approx(value, rel=1e-6), (member.name, name)
        assert result.metric == "token_f1" and list(result.final) == ["loss", "perplexity", *METRICS]
        assert result.details["signatures"].keys() == {"rouge1", "bleu"} and "tok:13a" in result.details["signatures"]["bleu"]
        moved.add(tuple(alone))
    assert len(moved) > 1  # a member that learns says other things than one that does not
    assert MemberResult.read(run / run_members(run)[0].name) == results[run_members(run)[0].name]


@pytest.mark.slow
def test_evaluating_again_gives_the_same_and_the_base_beside_it(run):
    found = evaluate_run(run, member=None, split="eval", progress=Progress(enabled=False), base=True)
    results = {r.name: r for r in read_run(run)}
    assert list(found) == [BASE, *(m.name for m in run_members(run))]
    for name, values in found.items():
        if name != BASE:
            assert values == pytest.approx(results[name].best, rel=1e-5)
    still = next(m.name for m in run_members(run) if m.config.optimizer.learning_rate == 1e-20)
    assert found[BASE] == pytest.approx(found[still], rel=1e-5)
    shown = call("evaluate", run, "--base")
    assert shown.code == 0 and BASE in shown.out and "bleu" in shown.out


@pytest.mark.slow
def test_tensorboard_has_samples(run):
    member = run_members(run)[0]
    events = EventAccumulator(str(run / member.name)).Reload()
    tag = "eval/samples/text_summary"
    assert tag in events.Tags()["tensors"] and [e.step for e in events.Tensors(tag)] == [3, 6]
    text = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    assert text.startswith("| input | reference | output |") and "What is" in text and len(text.splitlines()) == 8
    assert [e.step for e in events.Scalars("eval/bleu")] == [3, 6]


def test_decoding_is_compiled_once_and_packed_equals_solo(hub, tmp_path):
    """Between evaluations only arrays change; a member's texts do not depend on the others, whatever their ranks."""
    configs = [m.config for m in members_of(hub.config(tmp_path, changes(hub), causal=True))]
    setup = set_up(configs[0])
    pack = Pack.build(setup.model, configs, setup.steps, setup.mesh)
    rng, drawn = np.random.default_rng(0), []
    for index in range(len(configs)):
        own = pack.member_arrays(setup.model, index, pack.state.trainable)
        own = {name: a + 0.3 * rng.standard_normal(a.shape).astype(a.dtype) for name, a in own.items()}
        drawn.append(({n: a[index] for n, a in pack.with_member_arrays(setup.model, index, own).items()}, own))
    noise = {n: jax.numpy.stack([padded[n] for padded, _ in drawn]) for n in pack.state.trainable}
    texts = decode_pack(pack, setup, noise, setup.data.held_out.prompts)
    assert len({tuple(own) for own in texts}) == len(configs)
    before = programs_for.cache_info().misses
    assert decode_pack(pack, setup, noise, setup.data.held_out.prompts) == texts
    assert programs_for.cache_info().misses == before  # the same programs, whose shapes are the same
    for index, config in list(enumerate(configs))[:3:2]:
        alone = Pack.build(setup.model, [config], setup.steps, setup.mesh)
        arrays = alone.with_member_arrays(setup.model, 0, drawn[index][1])
        assert decode_pack(alone, setup, arrays, setup.data.held_out.prompts) == [texts[index]]


@pytest.mark.long
def test_sampled_texts_follow_from_a_rows_seed_alone(hub, tmp_path):
    found = {}
    for name, keys, batch in (("a", {}, 8), ("b", {}, 4), ("c", {"split_seed": 3}, 8)):
        some = changes(hub, sweep={"grid": {"adapter.rank": [1, 3]}})
        some["task"] |= {"temperature": 1.5, "top_p": 0.95} | keys
        configs = [m.config for m in members_of(hub.config(tmp_path, some | {"training.batch_size": batch}, causal=True))]
        setup = set_up(configs[0])
        pack = Pack.build(setup.model, configs, setup.steps, setup.mesh)
        prompts = setup.data.held_out.prompts
        found[name] = (decode_pack(pack, setup, pack.state.trainable, prompts), prompts.inputs)
    assert found["a"] == found["b"] and found["a"][0][0] == found["a"][0][1]  # the members start alike, and have the same seeds
    assert found["a"][0] != found["c"][0]


@pytest.mark.long
@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs the devices that tests/conftest.py makes")
@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2}, {"sweep": 2, "tensor": 2}], ids=["rows", "members"])
def test_a_mesh_gives_the_same_texts(hub, tmp_path, mesh):
    found = []
    for shape in ({}, mesh):
        configs = [m.config for m in members_of(hub.config(tmp_path, changes(hub, mesh=shape), causal=True))]
        setup = set_up(configs[0])
        pack = Pack.build(setup.model, configs, setup.steps, setup.mesh)
        texts: list[list[str]] = []
        found.append((evaluate_pack(pack, setup, pack.state.trainable, texts=texts), texts))
    assert found[0][1] == found[1][1]
    for name, value in found[0][0].items():
        np.testing.assert_allclose(found[1][0][name], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_same_results(hub, run, tmp_path, monkeypatch):
    from lora_jax.errors import Stopped
    from tests.sweeps.test_resume import stop_at

    config = hub.config(tmp_path, changes(hub), causal=True)
    stop_at(monkeypatch, 5)
    with pytest.raises(Stopped):
        run_sweep(config)
    monkeypatch.undo()
    resumed = run_sweep(hub.config(tmp_path, changes(hub), causal=True)).path
    for result in read_run(run):
        again = MemberResult.read(resumed / result.name)
        assert (again.final, again.best, again.details) == (result.final, result.best, result.details)
    assert json.loads((resumed / "state.json").read_text())["members"].keys() == {r.name for r in read_run(run)}


@pytest.mark.long
def test_full_fine_tuning_decodes_a_member_at_a_time(hub, tmp_path):
    some = changes(hub, sweep={"grid": {"optimizer.learning_rate": [0.01, 1e-20]}})
    del some["adapter.targets"]
    path = run_sweep(hub.config(tmp_path, some | {"adapter": {"method": "full"}}, causal=True)).path
    prompts = set_up(run_members(path)[0].config).data.held_out.prompts
    for member in run_members(path):
        alone = outputs_alone(path, member, prompts)
        value = EVALUATORS.get("token_f1", "test").from_texts(alone, prompts.references)
        assert MemberResult.read(path / member.name).best["token_f1"] == pytest.approx(value, rel=1e-6)
