"""Training of encoder-decoders: packs, meshes, whole runs that stop and go on."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from experiments.fuzz import bits_of_run, differing
from lora_jax import load_tokenizer
from lora_jax.adapters.layout import resolve, unite
from lora_jax.config.schema import MeshConfig
from lora_jax.errors import InputError, Stopped
from lora_jax.packing.execution import SCAN, VMAP
from lora_jax.packing.pack import Pack
from lora_jax.parallel.constraints import place_batch
from lora_jax.parallel.mesh import make_mesh
from lora_jax.sweeps.run import run_sweep
from lora_jax.tasks.base import task_section
from lora_jax.tasks.objectives import cross_entropy
from lora_jax.tasks.prepare import prepare
from lora_jax.training.setup import place_model
from lora_jax.training.statistics import gather
from lora_jax.training.trunk import trunk_depth
from tests import tiny, tiny_pairs
from tests.stopping import stop_at
from tests.tiny_hub import call

pytestmark = pytest.mark.usefixtures("compile_cache")

STEPS = 6
MEMBERS = [
    {"adapter__rank": 4, "adapter__targets": "all-linear", "adapter__layers": "last:1", "adapter__dropout": 0.1, "training__seed": 1},
    {"adapter__rank": 3, "adapter__targets": ["cross_attn.k_proj", "cross_attn.v_proj", "mlp.down_proj"], "training__seed": 2},
]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def train(model, plan, members, *, mode=VMAP, mesh=None):
    """(losses (steps, members), each member's trained arrays) of training on two batches in turn."""
    configs = [tiny.config(optimizer__eps=1e-3, **m) for m in members]
    if mesh is not None:
        place_model(model, mesh)
    pack = Pack.build(model, configs, STEPS, mode=mode, **({} if mesh is None else {"mesh": mesh}))
    state, found = pack.state, []
    for step in range(STEPS):
        batch = plan.batch(step % 2)
        batch = batch if mesh is None else place_batch(mesh, batch, row_axis=1)
        state, metrics = pack.programs.train(state, pack.fixed, pack.part.frozen, batch, np.int32(step))
        found.append(jax.device_get(metrics.loss))
    pack.programs.check()
    return np.stack(found), [pack.member_arrays(model, k, state.trainable) for k in range(len(members))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mode"),
    [("t5", VMAP), *(pytest.param(*pair, marks=pytest.mark.long) for pair in (("bart", SCAN), ("pegasus", VMAP)))],
    ids=str,
)
def test_packed_equals_solo_and_learns(family, mode):
    plan = tiny_pairs.plan()
    losses, arrays = train(tiny_pairs.model(family), plan, MEMBERS, mode=mode)
    assert np.isfinite(losses).all() and (losses[-2:].mean(0) < losses[:2].mean(0) - 1e-3).all()
    for k in (0, 1) if mode is SCAN else (0,):
        curve, (alone,) = train(tiny_pairs.model(family), plan, [MEMBERS[k]], mode=mode)
        np.testing.assert_allclose(losses[:, k], curve[:, 0], rtol=1e-5)
        for name, array in alone.items():
            assert tiny.relative(arrays[k][name], array) < 1e-5, name


@pytest.mark.long
def test_packed_rows_and_padded_rows_are_one():
    """The same examples in rows of several and of one: equal losses."""
    member = MEMBERS[1:]
    packed, padded = (train(tiny_pairs.model("bart"), tiny_pairs.plan(batching=b), member)[0] for b in ("packed", "padded"))
    np.testing.assert_allclose(packed, padded, rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_the_mesh_is_invisible(mesh):
    plan = tiny_pairs.plan(row_multiple=8, batch_size=16)
    alone, _ = train(tiny_pairs.model(), plan, MEMBERS)
    losses, _ = train(tiny_pairs.model(), plan, MEMBERS, mesh=make_mesh(MeshConfig(**mesh)))
    np.testing.assert_allclose(losses, alone, rtol=1e-5)


def test_how_much_is_common_follows_from_what_trains():
    """An encoder that nothing adapts is common as a whole; what the decoder's layers have in common is no part of the trunk."""
    micro = {name: array[0] for name, array in tiny_pairs.plan().batch(0).items()}
    for layers, targets, depth in (
        ("decoder:all", "attention", 3),
        ("encoder:last:1, decoder:1", "attention", 2),
        ("last:2", ["mlp.down_proj"], 1),
        (None, "attention", 0),
        (None, "embedding", 0),
    ):
        config = tiny.config(adapter__targets=targets, adapter__layers=layers)
        assert trunk_depth(Pack.build(tiny_pairs.model(), [config], STEPS).part, micro) == depth, (layers, targets)


@pytest.mark.slow
def test_statistics_count_what_a_site_is_given():
    """The encoder's tokens, the decoder's, and at the projections of the source the encoder's again; padding is none."""
    model, mesh, micro = tiny_pairs.model(), make_mesh(tiny.config().mesh), tiny_pairs.plan().batch(0)
    layout = unite(model, [resolve(model, tiny.adapter(targets=["q_proj", "cross_attn.k_proj"], layers="last:1"))])
    found = gather(model, layout.sites, frozenset({"moment"}), [place_batch(mesh, micro, row_axis=1)], cross_entropy, seed=0, mesh=mesh)
    read, told = (int((micro[name] > 0).sum()) for name in ("segment_ids", "decoder_segment_ids"))
    assert read != told
    wanted = {"encoder.layers.attn.q_proj": read, "decoder.layers.attn.q_proj": told, "decoder.layers.cross_attn.k_proj": read}
    assert {name.removeprefix("base."): seen.tokens for (name, _), seen in found.items()} == wanted | {
        "decoder.layers.cross_attn.q_proj": told
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return {family: tiny_pairs.write(folder / family, family) for family in ("t5", "bart")}


ARCHITECTURES = {"t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration"}
SWEEP = {"training.cache_trunk": "on", "tracking.checkpoint_every": 2, "sweep": {"grid": {"adapter.layers": ["decoder:all", "last:1"]}}}


@pytest.mark.long
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_run_stops_and_goes_on(hub, folders, tmp_path, monkeypatch, family):
    changes = {"model.source": str(folders[family]), "adapter.targets": "attention", **SWEEP}
    if family == "t5":  # evaluated by what the members write, all at once
        own = {"kind": "generation", "max_new_tokens": 4, "decoded_rows": 6, "template": "answer : {text}", "metrics": ["token_f1"]}
        changes |= {f"task.{key}": value for key, value in own.items()}
    whole = run_sweep(hub.config(tmp_path, changes, causal=True, name="whole"))
    config = hub.config(tmp_path, changes, causal=True, name="stopped")
    stop_at(monkeypatch, 3)
    with pytest.raises(Stopped):
        run_sweep(config)
    assert not differing(bits_of_run(whole.path), bits_of_run(run_sweep(config).path))
    output = tmp_path / "predictions.jsonl"
    predicted = call("predict", whole.path, "--source", hub.questions, "--output", output)
    assert predicted.code == 0 and len(output.read_text().splitlines()) == 60, predicted
    answers = call("generate", whole.path, "-p", "What is film", "--max-new-tokens", 4, "--num-beams", 2)
    assert answers.code == 0 and answers.out.strip(), answers
    exported = call("export", whole.path, "--out", tmp_path / "hf")
    assert exported.code == 0 and json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == [ARCHITECTURES[family]]
    assert call("export", whole.path, "--format", "peft", "--out", tmp_path / "peft").code == 0
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"


def test_rows_of_prompts_and_responses(hub, folders):
    section = task_section(kind="causal_lm", source=str(hub.questions), prompt="prompt", response="response", eval_size=20, max_length=8)
    from lora_jax.data.pairs import Shift

    data = prepare(section, load_tokenizer(str(folders["t5"])), decoder=False, shift=Shift(0))
    assert data.train.decoder_tokens is not None
    for source, fed, targets in zip(data.train.tokens, data.train.decoder_tokens, data.train.targets, strict=True):
        assert source[-1] == 1 and fed[0] == 0 and fed[1:].tolist() == targets[:-1].tolist() and len(source) <= 8
        assert targets[-1] == 1 or len(targets) == 8
    assert data.taken[0].cut > 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"task.prompt": None, "task.response": None, "task.text": "prompt"}, "learns responses to prompts alone"),
        ({"adapter.layers": "encodr:0"}, "there is no stack 'encodr'"),
        ({"adapter.layers": "decoder:2"}, "there is no layer 2; the decoder has layers 0 to 1"),
        ({"task": "classification"}, "'classification' does not train encoder-decoders"),
        ({"task.max_length": 80, "model.source": "bart"}, "64 positions"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_is_told(hub, folders, tmp_path, changes, told):
    source = folders[changes.get("model.source", "t5")]
    changes = {**changes, "model.source": str(source)}
    if changes.get("task") == "classification":
        changes["task"] = hub.values()["task"]
    if "task.max_length" in changes:
        long = tmp_path / "long.jsonl"
        long.write_text("".join(json.dumps({"prompt": "film " * 70, "response": f"red {i}"}) + "\n" for i in range(40)))
        changes |= {"task.source": str(long), "task.eval_size": 4}
    result = call("train", hub.write(tmp_path, changes, causal=True))
    assert result.code == 2 and told in result.err and "Traceback" not in result.err, result


def test_an_encoder_decoder_is_no_teacher():
    from lora_jax.tasks.distillation import DistillationConfig, _check_teacher

    section = DistillationConfig(source="texts.txt", text="text", teacher="hf://org/t5")
    with pytest.raises(InputError, match="is an encoder-decoder"):
        _check_teacher(tiny_pairs.base(), tiny.encoder(2), section)
