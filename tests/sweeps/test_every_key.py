"""Every key of the config does something: each leaf is changed once, and the change is seen.

Keys whose values are traced data are seen in the losses of one pack, a member a key; all others in the set-up, the trained
parameters, the plan, or the files.
"""

from __future__ import annotations

import hashlib
import json
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lora_jax.adapters.inject import inject_layout
from lora_jax.adapters.layout import resolve, unite
from lora_jax.adapters.partition import partition
from lora_jax.config.doors import METHODS, TASKS
from lora_jax.config.load import with_values
from lora_jax.config.messages import valid_keys
from lora_jax.config.schema import TaskConfig
from lora_jax.packing.execution import PackMode, configured_mode
from lora_jax.packing.pack import Pack, static_key
from lora_jax.packing.planner import Planner
from lora_jax.parallel.program import memory_limit
from lora_jax.sweeps.run import run_sweep
from lora_jax.sweeps.space import members_of
from lora_jax.training.loop import train_pack
from lora_jax.training.setup import Preparer, set_up

pytestmark = pytest.mark.usefixtures("compile_cache")

# Seen in the loss after a few steps; all in one pack with the unchanged config.
TRACED = {
    "adapter.rank": 3,
    "adapter.alpha": 4.0,
    "adapter.targets": ["k_proj", "v_proj"],
    "adapter.exclude": ["v_proj"],
    "adapter.layers": "last:1",
    "adapter.rank_pattern": {"v_proj": 1},
    "adapter.alpha_pattern": {"v_proj": 3.0},
    "adapter.rslora": True,
    "adapter.dropout": 0.4,
    "adapter.nested_init": False,
    "adapter.init": "gaussian",
    "optimizer.learning_rate": 0.02,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 2,
    "optimizer.weight_decay": 0.5,
    "optimizer.b1": 0.5,
    "optimizer.b2": 0.5,
    "optimizer.eps": 0.01,
    "optimizer.clip_norm": 0.01,
    "optimizer.b_lr_ratio": 4.0,
    "optimizer.head_lr_ratio": 4.0,
    "training.seed": 1,
}
# Seen in which parameters train.
STRUCTURAL = {"adapter.method": "full", "adapter.bias": "all", "adapter.modules_to_save": ["pooler"]}
# Seen in the set-up: key -> (new value, and the other changes it needs). LLAMA, OTHER and EVAL stand for files.
SET_UP = {
    "model.source": ("LLAMA", {"task.label_words": ["bad", "good"]}),
    "model.dtype": ("bfloat16", {}),
    "model.remat": ("full", {}),
    "model.scan_layers": (False, {}),
    "model.dropout": (0.1, {}),
    "task.source": ("OTHER", {}),
    "task.eval_source": ("OTHER", {}),
    "task.eval_size": (24, {}),
    "task.train_size": (40, {}),
    "task.split_seed": (1, {}),
    "task.max_length": (6, {}),
    "task.drop": ({"kind": ["plot"]}, {}),
    "task.test_source": ("OTHER", {}),
    "task.test_size": (24, {}),
    "task.text": ("kind", {"task.source": "OTHER", "task.eval_size": 1, "training.batch_size": 2}),
    "task.label": ("kind", {}),
    "task.labels": (["pos", "neg"], {}),
    "task.label_words": (["poor", "fine"], {"model.source": "LLAMA", "task.label_words": ["bad", "good"]}),
    "task.template": ("What is {text} :", {"model.source": "LLAMA", "task.label_words": ["bad", "good"]}),
    "task.pooling": ("mean", {}),
    "training.steps": (7, {}),
    "training.extend_steps": (2, {}),
    "training.batch_size": (12, {}),
    "training.accumulate": (2, {}),
    "training.batching": ("padded", {}),
    "training.data_seed": (1, {}),
    "mesh.data": (2, {}),
    "mesh.fsdp": (2, {}),
    "mesh.tensor": (2, {}),
    "mesh.sweep": (2, {}),
}
# Each in a test of its own below, or elsewhere: `sweep.reference` in test_space.py, `task.teacher` in test_teacher.py, `task.head` in
# test_word_tasks.py, the keys of single optimizers in training/test_optimizers.py, the trunk cache's keys in test_trunk_cache.py,
# `tracking.compile_cache` in test_compile_cache.py.
OTHERS = {
    "name", "tracking.dir", "tracking.log_every", "tracking.tensorboard", "tracking.save", "tracking.checkpoint_every",
    "tracking.keep_checkpoints", "tracking.profile", "tracking.compile_cache",
    "training.eval_every", "training.epochs", "training.pack", "training.chunk",
    "training.cache_trunk", "training.trunk_memory_gb", "training.trunk_disk_gb",
    "sweep.grid", "sweep.zip", "sweep.random.count", "sweep.random.seed", "sweep.random.keys", "sweep.members", "sweep.seeds",
    "sweep.where", "sweep.reference", "sweep.halving.metric", "sweep.halving.factor", "sweep.halving.rungs",
    "sweep.max_pack", "sweep.max_padding", "sweep.memory_limit", "task.kind", "task.teacher", "task.prompt", "task.response",
    "task.messages", "task.date", "task.target", "task.source_language", "task.target_language", "task.chat", "task.system",
    "task.max_new_tokens", "task.decoded_rows", "task.metrics", "task.temperature", "task.top_p",
    "model.transforms",  # tests/models/transforms
    "model.quantized",  # tests/models/test_held.py
    "model.train_batch_stats",  # tests/training/test_batch_stats.py
    # tests/tasks/test_teachers.py
    "task.distill.teacher", "task.distill.temperature", "task.distill.alpha", "task.distill.top_k", "task.distill.disk_gb",
    "task.projection",
    "adapter.init_batches",  # tests/training/test_statistics.py
    "optimizer.kind", "optimizer.clip_threshold", "optimizer.decay_rate", "optimizer.delta", "optimizer.momentum", "optimizer.nesterov",
    "optimizer.parameter_scale", "optimizer.rms",
    # tests/tasks/test_preference.py
    "task.chosen", "task.rejected", "task.loss", "task.beta", "task.label_smoothing", "task.per_token", "task.simpo_gamma",
    "task.orpo_lambda", "task.desirable_weight", "task.undesirable_weight",
    "task.question", "task.context", "task.answers", "task.stride", "task.max_answer", "task.head",
    "task.environment", "task.physics", "task.environments", "task.rollout", "task.update_epochs", "task.minibatches", "task.gamma",
    "task.gae_lambda", "task.clip", "task.entropy", "task.value", "task.eval_episodes",  # tests/tasks/test_ppo.py
    "task.columns", "task.sources", "task.token_cache",  # tests/data
}  # fmt: skip


# Keys of one method alone, LoRA's aside: the tests of that method know them.
OF_METHODS = {
    f"adapter.{key}"
    for method in METHODS.all().values()
    for key in method.section.model_fields.keys() - METHODS.get("lora", "method").section.model_fields.keys()
}


# The same of tasks.
OF_TASKS = {f"task.{key}" for task in TASKS.all().values() for key in task.section.model_fields.keys() - TaskConfig.model_fields.keys()}
OF_TASKS = (OF_TASKS & set(valid_keys())) - {*TRACED, *STRUCTURAL, *SET_UP, *OTHERS}  # a section is no key, what is in it is


def test_no_key_is_forgotten():
    assert sorted({*TRACED, *STRUCTURAL, *SET_UP, *OTHERS, *OF_METHODS, *OF_TASKS}) == sorted(valid_keys())


@pytest.mark.parametrize("key", sorted(OF_METHODS | OF_TASKS))
def test_a_key_of_one_method_or_task_is_in_its_tests(key):
    tests, (section, name) = Path(__file__).parents[1], key.split(".")
    folders = {"adapter": ("adapters", "interop"), "task": ("tasks", "data")}[section]
    files = [path for folder in folders for path in (tests / folder).rglob("*.py")]
    assert any(name in path.read_text(encoding="utf-8") for path in files)


@pytest.mark.slow
def test_traced_numbers_change_the_losses(hub, tmp_path):
    base = hub.config(tmp_path, {"training.steps": 5, "training.eval_every": 0, "adapter.targets": ["q_proj", "v_proj"]})
    configs = [base, base, *(with_values(base, {key: value}) for key, value in TRACED.items())]
    assert len({static_key(c) for c in configs}) == 1
    setup = set_up(base)
    pack = Pack.build(setup.model, configs, setup.steps, setup.mesh)
    listener: Any = types.SimpleNamespace(
        on_start=lambda step: None, on_save=lambda step: None, on_train=lambda *_: None, on_eval=lambda *_: None
    )
    losses = train_pack(pack, setup, eval_every=0, log_every=100, listener=listener).final["loss"]
    assert losses[0] == losses[1]
    unchanged = [key for key, loss in zip(TRACED, losses[2:], strict=True) if abs(loss - losses[0]) < 1e-6]
    assert not unchanged, f"these keys change nothing: {unchanged}"


@pytest.mark.parametrize("key", STRUCTURAL)
def test_what_trains(hub, tmp_path, key):
    base = hub.config(tmp_path)
    setup = set_up(base)

    def labels(config):
        return partition(inject_layout(setup.model, unite(setup.model, [resolve(setup.model, config.adapter)]))).labels

    assert labels(with_values(base, {key: STRUCTURAL[key]})) != labels(base)


def fingerprint(config):
    """Everything a set-up decides."""
    setup: Any = set_up(config)
    plan, base = setup.plan, setup.model.base

    def digest(batch):
        return hashlib.sha256(b"".join(np.ascontiguousarray(batch[name]).tobytes() for name in sorted(batch))).hexdigest()

    kinds = (
        type(setup.model).__name__,
        str(base.embed.embedding.dtype),
        base.layers.remat,
        base.layers.scan,
        base.dropout,
        str(getattr(setup.model, "shape", None)),
    )
    words = None if setup.data.class_token_ids is None else setup.data.class_token_ids.tolist()
    held_out = [digest(b) for b in plan.eval_batches()]
    test = None if setup.data.test is None else [digest(b) for b in plan.eval_batches(setup.data.test)]
    return (
        tuple(setup.mesh.shape.values()),
        plan.rows,
        plan.length,
        plan.targets,
        setup.steps,
        digest(plan.batch(0)),
        held_out,
        test,
        setup.data.classes,
        words,
        kinds,
    )


@pytest.mark.parametrize("key", SET_UP)
@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs the devices that tests/conftest.py makes")
def test_what_is_set_up(hub, tmp_path, key):
    lines = hub.reviews.read_text().splitlines()
    other = tmp_path / "other.csv"
    other.write_text(
        "\n".join([lines[0], *(line.rpartition(",")[0] + f",kind {'a film ' * (i % 3)}{i % 17}" for i, line in enumerate(lines[1:81]))])
    )
    files = {"LLAMA": str(hub.llama), "OTHER": str(other)}
    value, needs = SET_UP[key]
    needs = {k: files.get(v, v) if isinstance(v, str) else v for k, v in needs.items()}
    before = hub.config(tmp_path, {k: v for k, v in needs.items() if key != "model.source"})
    section, _, leaf = key.partition(".")
    value = files.get(value, value) if isinstance(value, str) else value
    after = hub.config(tmp_path, needs | ({"mesh": {leaf: value}} if section == "mesh" else {key: value}))
    assert fingerprint(after) != fingerprint(before)


def test_the_ways_to_train_a_language_model(hub, tmp_path):
    prompted = {"task.prompt": None, "task.response": None}
    ways = [
        {},
        {"task.prompt": "response", "task.response": "prompt"},
        {"task.prompt": "response"},
        {"task.response": "prompt"},
        prompted | {"task.text": "response"},
        prompted | {"task.messages": "messages"},
    ]
    prints = [json.dumps(fingerprint(hub.config(tmp_path, way, causal=True))) for way in ways]
    assert len(set(prints)) == len(ways)


def test_the_ways_to_generate_texts(hub, tmp_path):
    rows = [json.loads(line) for line in hub.questions.read_text().splitlines()]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row | {"other": "good " + row["prompt"]}) + "\n" for row in rows))
    task = {"kind": "generation", "source": str(source), "prompt": "prompt", "response": "response", "eval_size": 20}
    task |= {"max_length": 32, "max_new_tokens": 8, "decoded_rows": 10}
    other = {"kind": "summarisation", "text": "prompt", "target": "response"}
    languages = {"kind": "translation", "text": "prompt", "target": "response", "source_language": "red", "target_language": "blue"}
    bare = {key: value for key, value in task.items() if key not in ("prompt", "response")}
    ways = [
        task, task | {"prompt": "other"}, task | {"response": "other"}, task | {"template": "What {text} :"}, task | {"chat": True},
        task | {"chat": True, "system": "good"}, task | {"max_new_tokens": 28}, task | {"decoded_rows": 11}, task | {"metrics": ["bleu"]},
        task | {"temperature": 0.7}, task | {"temperature": 0.7, "top_p": 0.9}, task | {"split_seed": 1},
        bare | other, bare | other | {"target": "other"}, bare | other | {"text": "other"}, bare | languages,
        bare | languages | {"source_language": "good"}, bare | languages | {"target_language": "good"},
    ]  # fmt: skip

    def decided(way):
        data = Preparer(weights=False)(hub.config(tmp_path, {"task": way}, causal=True)).data
        learned = [(t.tolist(), y.tolist()) for t, y in zip(data.train.tokens, data.train.targets, strict=True)]
        prompts: Any = data.held_out.prompts
        chosen = (prompts.max_new_tokens, prompts.temperature, prompts.top_p, prompts.seed)
        return [learned, data.metrics, [t.tolist() for t in prompts.tokens], chosen]

    assert len({repr(decided(way)) for way in ways}) == len(ways)


def test_the_ways_to_answer_questions(hub, tmp_path):
    other = tmp_path / "other.jsonl"
    rows = [json.loads(line) for line in hub.facts.read_text().splitlines()]
    other.write_text("".join(json.dumps(row | {"asked": "What red", "text": row["context"] + " it", "first": "is"}) + "\n" for row in rows))
    ways = [{}, {"question": "asked"}, {"context": "text"}, {"answers": "first"}, {"stride": 5}]
    task = hub.answering() | {"source": str(other)}
    assert len({json.dumps(fingerprint(hub.config(tmp_path, {"task": task | way}))) for way in ways}) == len(ways)
    # How long an answer may be shows where the logits say a longer one: from the first of the context's tokens to its last.
    spans = []
    for most in (1, 30):
        held_out: Any = set_up(hub.config(tmp_path, {"task": task | {"max_answer": most}})).data.held_out
        ends = [np.stack([-np.arange(n), np.arange(n)]).astype(np.float32) for n in held_out.lengths]
        spans.append(held_out.score(ends))
    assert spans[0] != spans[1]


def test_epochs_are_passes_over_the_rows(hub, tmp_path):
    for epochs, steps in ((1.0, 12), (2.5, 30)):  # 100 rows, 8 at a time
        assert set_up(hub.config(tmp_path, {"training.steps": None, "training.epochs": epochs})).steps == steps


def test_sweep_keys(hub, tmp_path):
    config = hub.config(tmp_path, {"sweep": {"grid": {"training.seed": [0, 1, 2]}, "max_pack": 2}})
    assert [len(p.members) for p in Planner(config, Preparer(), largest=config.sweep.max_pack).packs(members_of(config))] == [2, 1]
    assert memory_limit(config) is None and memory_limit(with_values(config, {"sweep.memory_limit": "3 MB"})) == 3_000_000
    ranks = hub.config(tmp_path, {"sweep": {"grid": {"adapter.rank": [1, 64]}}, "training.steps": 10**7})
    for share, packs in ((0.0, 2), (0.9, 1)):
        planner = Planner(with_values(ranks, {"sweep.max_padding": share}), Preparer(), largest=16)
        assert len(planner.packs(members_of(ranks))) == packs


def test_how_a_pack_is_run(hub, tmp_path):
    modes = [
        configured_mode(hub.config(tmp_path, {"training.pack": pack, "training.chunk": 3})) for pack in ("auto", "vmap", "scan", "chunk")
    ]
    assert modes == [None, PackMode(), PackMode(1), PackMode(3)]


@pytest.mark.slow
def test_tracking_keys(hub, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def run(folder, changes):
        (tmp_path / folder).mkdir()
        member = run_sweep(hub.config(tmp_path / folder, changes, name=folder)).path / "main"
        events = EventAccumulator(str(member)).Reload()
        scalars = {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        return {p.name for p in member.iterdir() if not p.name.startswith("events")}, scalars

    files, scalars = run("plain", {})
    assert files == {"best", "final", "results.json"}
    assert scalars["train/loss"] == [2, 4, 6] and scalars["eval/loss"] == [3, 6]
    assert (tmp_path / "plain" / "runs" / "plain" / "config.yaml").is_file()
    elsewhere = {"dir": str(tmp_path / "elsewhere"), "log_every": 3, "save": "best"}
    files, scalars = run("other", {"tracking": elsewhere, "training.eval_every": 2})
    assert files == {"best", "results.json"}
    assert scalars["train/loss"] == [3, 6] and scalars["eval/loss"] == [2, 4, 6]
    assert (tmp_path / "elsewhere" / "other").is_dir() and not (tmp_path / "other" / "runs").exists()
    assert run("silent", {"tracking.tensorboard": False, "tracking.save": "final"}) == ({"final", "results.json"}, {})
    assert run("none", {"tracking.save": "none"})[0] == {"results.json"}


@pytest.mark.slow
def test_checkpoint_keys_and_the_profile(hub, tmp_path):
    def run(folder, changes):
        path = run_sweep(hub.config(tmp_path, changes, name=folder)).path
        (pack,) = (path / "checkpoints").iterdir()
        return sorted(int(p.name) for p in pack.iterdir() if p.name.isdecimal()), list(path.glob("profile/**/*.xplane.pb"))

    assert run("plain", {}) == ([6], [])
    assert run("often", {"tracking.checkpoint_every": 2})[0] == [4, 6]
    steps, traces = run("all", {"tracking.checkpoint_every": 2, "tracking.keep_checkpoints": 5, "tracking.profile": 2})
    assert steps == [2, 4, 6] and len(traces) == 1
