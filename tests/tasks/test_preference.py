"""The task of preferences: examples, what is refused, and that a member trains alike packed, alone, resumed, accumulated, on a mesh."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments.fuzz import bits_of_run, differing
from lora_jax.data.batching import NO_TARGET
from lora_jax.errors import InputError, Stopped
from lora_jax.models.load import load_model
from lora_jax.packing.pack import Pack
from lora_jax.sweeps.run import run_sweep
from lora_jax.tasks.base import task_section
from lora_jax.tasks.prepare import prepare
from lora_jax.training.evaluation import evaluate_pack
from lora_jax.training.setup import Preparer, set_up
from lora_jax.training.shared import keep_values, values_of
from lora_jax.training.trunk_cache import keep_shared
from lora_jax.weights.tokenizer import load_tokenizer
from tests import tiny
from tests.stopping import stop_at
from tests.tiny_hub import FILLER, call

pytestmark = pytest.mark.usefixtures("compile_cache")

PAIR = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
SINGLE = {"prompt": "prompt", "response": "response", "label": "label"}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Files of 60 rows: `texts`, `chats`, and `single` responses with labels. "good" is in a chosen response, "bad" in a rejected one."""
    folder, rng = tmp_path_factory.mktemp("preferences"), np.random.default_rng(0)
    words = lambda n: " ".join(FILLER[i] for i in rng.integers(0, len(FILLER), n))
    made = {"texts": [], "chats": [], "single": []}
    for i in range(60):
        prompt, good, bad = f"What is {words(1 + i % 4)} :", f"{words(1 + i % 3)} good", f"bad {words(1 + i % 2)}"
        made["texts"].append({"prompt": prompt, "chosen": good, "rejected": bad})
        asked = [{"role": "user", "content": prompt}]
        if i % 2:
            asked = [{"role": "user", "content": "it"}, {"role": "assistant", "content": "yes"}, *asked]
        said = [[{"role": "assistant", "content": text}] for text in (good, bad)]
        made["chats"].append({"prompt": asked, "chosen": said[0], "rejected": said[1]})
        made["single"].append({"prompt": prompt, "response": bad if i % 3 else good, "label": not i % 3})
    for name, lines in made.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def section(rows, **values):
    names = SINGLE if values.get("file") == "single" else PAIR
    source = str(rows / f"{values.pop('file', 'texts')}.jsonl")
    return {"kind": "preference", "source": source, "eval_size": 16, "max_length": 24} | names | values


def config(hub, folder, rows, changes=None, name="tiny", **values):
    folder.mkdir(exist_ok=True)
    common = {"task": section(rows, **values), "training.batch_size": 8, "tracking.tensorboard": False}
    return hub.config(folder, common | (changes or {}), causal=True, name=name)


# Examples.


@pytest.fixture(scope="module")
def tokenizer(hub):
    return load_tokenizer(str(hub.llama))


def read(tokenizer, rows, **values):
    return prepare(task_section(**section(rows, **values)), tokenizer, decoder=True)


def texts_of(tokenizer, examples, i):
    """(role, whole text, what is to be predicted) of each text of an example."""
    found = []
    for text, role in zip(examples.texts(i), examples.parts[i][:, 1].tolist(), strict=True):
        targets = examples.targets[i][text]
        assert (targets[:-1][targets[:-1] != NO_TARGET] == examples.tokens[i][text][1:][targets[:-1] != NO_TARGET]).all()
        found.append((role, tokenizer.decode(examples.tokens[i][text]), tokenizer.decode(targets[targets != NO_TARGET])))
    return found


def test_a_pair_is_two_texts_with_the_loss_on_the_responses(tokenizer, rows):
    data = read(tokenizer, rows)
    lines = [json.loads(line) for line in (rows / "texts.jsonl").read_text().splitlines()]
    wanted = {
        tuple((role, f"{line['prompt']} {line[name]} </s>", f"{line[name]} </s>") for role, name in enumerate(("chosen", "rejected")))
        for line in lines
    }
    found = [tuple(texts_of(tokenizer, part, i)) for part in (data.train, data.held_out) for i in range(len(part.tokens))]
    assert len(found) == 60 and set(found) == wanted


def test_of_a_chat_only_the_response_bears_loss(tokenizer, rows):
    data = read(tokenizer, rows, file="chats")
    for i in range(len(data.train.tokens)):
        for role, whole, predicted in texts_of(tokenizer, data.train, i):
            assert whole.endswith(f"<|assistant|> {predicted}") and predicted.endswith("<|end|>")
            assert ("good" in predicted) == (role == 0) and "yes" not in predicted
    assert any("yes" in texts_of(tokenizer, data.train, i)[0][1] for i in range(len(data.train.tokens)))


@pytest.mark.parametrize("file", ["single", "texts"])
def test_kto_has_a_label_and_an_unrelated_response(tokenizer, rows, file):
    data = read(tokenizer, rows, file=file, loss="kto")
    assert len(data.train.tokens) == (44 if file == "single" else 88)
    roles = set()
    for i in range(len(data.train.tokens)):
        (role, own, answer), (other, whole, _) = texts_of(tokenizer, data.train, i)
        assert ("good" in answer) == (role == 0) and other == 2
        assert whole.startswith(own.removesuffix(answer))  # the same prompt
        roles.add(role)
    assert roles == {0, 1}


def test_a_reward_has_one_target_a_text(tokenizer, rows):
    data = read(tokenizer, rows, loss="reward")
    for i in range(len(data.train.tokens)):
        ends = [text.stop - 1 for text in data.train.texts(i)]
        assert np.flatnonzero(data.train.targets[i] != NO_TARGET).tolist() == ends


def test_what_is_cut_away_is_left_out_and_said(tokenizer, tmp_path):
    long = " ".join(["film"] * 20)
    lines = [
        {"prompt": "What is it :", "chosen": "good", "rejected": "bad"},
        {"prompt": "What is the film :", "chosen": "good", "rejected": "bad"},
        {"prompt": long, "chosen": "good", "rejected": "bad"},  # both responses
        {"prompt": "is it", "chosen": f"{long} good", "rejected": f"{long} bad"},  # what tells them apart
    ]
    sources = {key: str(tmp_path / f"{key}.jsonl") for key in ("source", "eval_source")}
    for source in sources.values():
        Path(source).write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {"kind": "preference", "eval_size": "all", "max_length": 12} | sources | PAIR
    data = prepare(task_section(**values), tokenizer, decoder=True)
    assert len(data.train.tokens) == 2 and data.dropped == 4
    assert any("1 pairs left out (their responses differ only beyond task.max_length = 12 tokens)" in line for line in data.lines())
    with pytest.raises(InputError, match="no example has anything to predict within task.max_length = 3"):
        prepare(task_section(**values | {"max_length": 3}), tokenizer, decoder=True)


# What is refused.


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"task.chosen": None}, "'chosen' and 'rejected' go together"),
        ({"task.chosen": None, "task.rejected": None}, "preference needs 'chosen' and 'rejected', or for kto 'response' and 'label'"),
        ({"task.response": "response", "task.label": "label"}, "preference needs 'chosen' and 'rejected', or for kto"),
        ({"task.chosen": None, "task.rejected": None, "task.response": "chosen", "task.label": "rejected"}, "are for kto; dpo needs"),
        ({"task.rejected": "chosen"}, "a column is named twice"),
        ({"task.loss": "dop"}, "task.loss"),
        ({"task.simpo_gamma": 1.0}, "'simpo_gamma' belongs to simpo, not dpo"),
        ({"task.loss": "orpo", "task.beta": 0.1}, "'beta' belongs to dpo and ipo and simpo and kto, not orpo"),
        ({"task.label_smoothing": 0.5}, "task.label_smoothing"),
        ({"task.chosen": "better"}, "has no column 'better'"),
        ({"task.betta": 0.1}, "Did you mean"),
    ],
)
def test_sections_that_are_wrong(hub, tmp_path, rows, changes, told):
    values = section(rows)
    for key, value in changes.items():
        values[key.removeprefix("task.")] = value
    path = hub.write(tmp_path, {"task": {k: v for k, v in values.items() if v is not None}}, causal=True)
    result = call("train", path)
    assert result.code == 2 and told in result.err and "Traceback" not in result.err and len(result.err.splitlines()) <= 8, result.err


CHAT = [{"role": "user", "content": "it"}]
SAID = [{"role": "assistant", "content": "good"}]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "it", "chosen": "good", "rejected": "good"}, "row 1 of .*: 'chosen' and 'rejected' are equal"),
        ({"prompt": CHAT, "chosen": SAID, "rejected": SAID}, "row 1 of .*: 'chosen' and 'rejected' are equal"),
        ({"prompt": "it", "chosen": "", "rejected": "bad"}, "row 1 of .* has no 'chosen'"),
        ({"prompt": "it", "chosen": "good", "rejected": " \n"}, "row 1 of .*: 'rejected' is empty"),
        ({"prompt": "it", "rejected": "bad"}, "no column 'chosen'"),
        ({"prompt": "it", "chosen": SAID, "rejected": SAID}, "'prompt' is a text, and 'chosen' a list of messages"),
        ({"prompt": CHAT, "chosen": CHAT, "rejected": SAID}, "'chosen' ends with a message of 'user', not of the assistant"),
        ({"prompt": [{"role": "user"}], "chosen": SAID, "rejected": CHAT}, "'prompt' is not a list of messages"),
        ({"prompt": CHAT, "chosen": [{"role": "assistant", "content": ""}], "rejected": SAID}, "'chosen' is empty"),
    ],
)
def test_rows_that_are_wrong(tokenizer, tmp_path, row, told):
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
    values = {"kind": "preference", "source": str(tmp_path / "bad.jsonl"), "eval_size": 1} | PAIR
    with pytest.raises(InputError, match=told):
        prepare(task_section(**values), tokenizer, decoder=True)


def test_other_rows_that_are_wrong(hub, tokenizer, rows, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "it", "response": "good", "label": "maybe"}\n')
    values = {"kind": "preference", "source": str(tmp_path / "bad.jsonl"), "eval_size": 1, "loss": "kto"} | SINGLE
    with pytest.raises(InputError, match="row 1 of .*: 'label' is 'maybe'; it must be true or false"):
        prepare(task_section(**values), tokenizer, decoder=True)
    lines = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in (("it", "good", "bad"), (CHAT, SAID, [SAID[0] | {"content": "bad"}]))]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match="'prompt' of .* is a text in row 1 and a list of messages in row 2"):
        prepare(
            task_section(**values | PAIR | {"response": None, "label": None, "source": str(tmp_path / "mixed.jsonl")}),
            tokenizer,
            decoder=True,
        )
    with pytest.raises(InputError, match="preference needs a decoder"):
        set_up(hub.config(tmp_path, {"task": section(rows)}))


# Training.


def test_reference_log_probabilities_are_the_bases(hub, rows, tmp_path):
    """Of the batches that training and evaluation see, against the base's own logits, text by text; computed once."""
    setup: Any = set_up(config(hub, tmp_path, rows, {"training.accumulate": 2}))
    base = load_model(str(hub.llama))
    calls = []
    program = setup.shared._held_out
    setup.shared.__dict__["_held_out"] = lambda *a: calls.append(1) or program(*a)

    def check(batch, values):
        for i in np.flatnonzero(batch["target_weights"] > 0)[::7]:
            row, at = divmod(int(batch["target_index"][i]), batch["tokens"].shape[1])
            start = at - int(batch["positions"][row, at])
            logits = tiny.outputs(base, batch["tokens"][row : row + 1, start : start + 16])[0, at - start].astype(np.float64)
            assert values[i] == pytest.approx(logits[batch["target_ids"][i]] - np.log(np.exp(logits).sum()), abs=1e-4)
        assert not values[batch["target_weights"] == 0].any()

    for step in range(2):
        batch = setup.plan.batch(step)
        values = np.asarray(setup.step_inputs(step, batch, None)["target_reference"])
        check({name: a[0] for name, a in batch.items()}, values[0])
    held = setup.plan.eval_batches()
    check(held[0], np.asarray(setup.held_out_inputs(held[0], None)["target_reference"]))
    setup.held_out_inputs(held[0], None)
    assert len(calls) == len(setup.plan.eval_batches(setup.plan.seen())) + 1


def references_of(made, folder):
    """(the reference array of a training and of a held-out batch, how often the base was asked, what was said) of a new set-up."""
    calls, said = [], []
    setup: Any = set_up(made)
    program = setup.shared._held_out
    setup.shared.__dict__["_held_out"] = lambda *a: calls.append(1) or program(*a)
    keep_shared(setup, folder, said.append)
    batch, held_out = setup.plan.batch(1), setup.plan.eval_batches()[0]
    arrays = setup.step_inputs(1, batch, None), setup.held_out_inputs(held_out, None)
    return [np.asarray(inputs["target_reference"]) for inputs in arrays], len(calls), said


@pytest.mark.slow
def test_what_is_kept_on_disk_is_what_would_be_computed_and_nothing_else_is_used(hub, rows, tmp_path):
    """Found by a later run of the same base, tokens and batches; not where one of them is another, or a file is not whole."""
    made = config(hub, tmp_path / "a", rows)
    without, asked, said = references_of(config(hub, tmp_path / "b", rows, disk_gb=0), tmp_path)
    assert asked == 5 + 1 and not said and not (tmp_path / ".reference-cache").exists()  # of the run, and one held-out
    first, asked, said = references_of(made, tmp_path)
    assert asked == 5 + 2 and f"reference cache: 110 texts, 0.0 MB in {tmp_path / '.reference-cache'}" in said
    again, asked, said = references_of(made, tmp_path)
    assert asked == 0 and "found in" in said[0]
    assert tiny.arrays_equal(without, first) and tiny.arrays_equal(first, again)

    # Another base, other tokens, other batches.
    weights = load_file(hub.llama / "model.safetensors")
    shutil.copytree(hub.llama, tmp_path / "base")
    save_file({name: a * 1.01 for name, a in weights.items()}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "texts.jsonl").write_text((rows / "texts.jsonl").read_text().replace(" good", " fine"))
    for other in (
        config(hub, tmp_path / "c", rows, {"model.source": str(tmp_path / "base")}),
        config(hub, tmp_path / "d", tmp_path / "rows"),
    ):
        found, asked, _ = references_of(other, tmp_path)
        assert asked == 5 + 2 and not tiny.arrays_equal(found, first)
    assert references_of(config(hub, tmp_path / "e", rows, {"training.batch_size": 4}), tmp_path)[1] > 7

    # Files that are damaged, half-written, or cut.
    files = tmp_path / ".reference-cache"
    keys = [path for path in sorted(files.iterdir(), key=lambda path: path.stat().st_mtime)]
    for path in keys:
        whole = bytearray(path.read_bytes())
        whole[-3] ^= 4
        path.write_bytes(whole)
    assert references_of(made, tmp_path)[1] == 5 + 2 and references_of(made, tmp_path)[1] == 0
    for path in files.glob("*.npy"):
        path.rename(files / f".{path.stem.partition('-')[0]}.{socket.gethostname()}.{2**22 + 1}.part")
    found, asked, _ = references_of(made, tmp_path)
    assert asked == 5 + 2 and tiny.arrays_equal(found, first) and not list(files.glob("*.part"))
    assert "more than its disk_gb allows" in references_of(config(hub, tmp_path / "f", rows, disk_gb=1e-9), tmp_path)[2][0]


def test_what_is_kept_outlives_another_loss_and_no_other_batches(hub, rows, tmp_path):
    prepare_one = Preparer(weights=False)
    shared = [
        prepare_one(config(hub, tmp_path, rows, {"training.batch_size": size}, beta=beta)).shared
        for size, beta in ((8, 0.1), (8, 2.0), (4, 2.0))
    ]
    assert shared[0] is shared[1] and shared[1] is not shared[2]
    assert prepare_one(config(hub, tmp_path, rows, loss="orpo")).shared is None


def test_equal_texts_with_other_targets_are_both_kept():
    batch = lambda index: {
        "tokens": np.array([[5, 6, 7]]),
        "segment_ids": np.array([[1, 1, 1]]),
        "target_index": np.array([index, 0]),
        "target_weights": np.array([1.0, 0.0]),
    }
    known = {}
    for index, value in ((1, 10.0), (0, 20.0)):
        assert np.isnan(values_of(known, batch(index))[0])
        keep_values(known, batch(index), np.array([value, 99.0], np.float32))
    assert [values_of(known, batch(i)).tolist() for i in (1, 0)] == [[10.0, 0.0], [20.0, 0.0]]


def test_nothing_is_preferred_before_the_first_step(hub, rows, tmp_path):
    """The identity at step 0: the adapter is off, as in the reference, so that the loss is log 2 and nothing has moved."""
    made = config(hub, tmp_path, rows)
    setup = set_up(made)
    pack = Pack.build(setup.model, [made], setup.steps, setup.mesh)
    found = evaluate_pack(pack, setup, pack.state.trainable)
    assert found["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert all(abs(found[name]) < 1e-5 for name in ("margin", "chosen_reward", "rejected_reward", "kl"))


SWEEP = {"sweep": {"grid": {"adapter.rank": [1, 3]}}, "training.steps": 6, "training.eval_every": 0, "training.pack": "vmap"}


@pytest.fixture(scope="module")
def packed(hub, rows, tmp_path_factory):
    """Runs of two members in one pack, by loss."""
    made = {}

    def run(loss, changes=None, **values):
        if loss not in made:
            folder = tmp_path_factory.mktemp(loss)
            made[loss] = run_sweep(config(hub, folder, rows, SWEEP | (changes or {}), loss=loss, **values))
        return made[loss]

    return run


def arrays(run, member):
    return load_weights(next(p.parent for p in run.path.glob("*/results.json") if member in p.parent.name) / "final")


def load_weights(folder):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return {name: np.asarray(a) for name, a in checkpointer.restore((folder / "arrays").resolve()).items()}


SLOW, LONG = pytest.mark.slow, pytest.mark.long


def same_as_in(together, alone, tolerance):
    """A run of one member, against the member of the same rank in a pack."""
    (b,) = alone.results
    a = next(r for r in together.results if r.settings["adapter.rank"] == 3)
    assert a.status == b.status == "finished" and set(a.final) == set(b.final)
    for name, value in a.final.items():
        assert value == pytest.approx(b.final[name], rel=tolerance, abs=1e-5), name
    one, other = arrays(together, a.name), arrays(alone, b.name)
    assert all(tiny.relative(one[name], other[name]) < 1e-3 for name in other)


ALONE = {"adapter.rank": 3, "training.steps": 6, "training.eval_every": 0, "training.pack": "vmap"}
LOSSES = ["dpo", *(pytest.param(name, marks=LONG) for name in ("kto", "reward", "ipo", "orpo", "simpo"))]


@SLOW
@pytest.mark.parametrize("loss", LOSSES)
def test_a_pack_is_its_solo_runs_and_one_program(hub, rows, tmp_path, packed, loss):
    together = packed(loss)
    same_as_in(together, run_sweep(config(hub, tmp_path, rows, ALONE, loss=loss)), 1e-5)
    assert together.compiled_programs == 2
    metrics = {"loss", "accuracy", "chosen_reward", "rejected_reward"}
    metrics |= set() if loss == "kto" else {"margin"}
    assert set(together.results[0].final) == metrics | (set() if loss in ("orpo", "simpo", "reward") else {"kl"})


@SLOW
@pytest.mark.parametrize(
    ("changes", "loss"),
    [
        ({"training.accumulate": 4}, "dpo"),
        pytest.param({"training.batching": "padded"}, "dpo", marks=LONG),
        pytest.param({"training.accumulate": 2}, "reward", marks=LONG),
    ],
)
def test_neither_micro_batches_nor_rows_matter(hub, rows, tmp_path, packed, changes, loss):
    same_as_in(packed(loss), run_sweep(config(hub, tmp_path, rows, ALONE | changes, loss=loss)), 1e-5)


@SLOW
@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs the devices that tests/conftest.py makes")
@pytest.mark.parametrize(
    ("loss", "mesh"), [("dpo", {"data": 2}), pytest.param("reward", {"fsdp": 2}, marks=LONG), pytest.param("kto", {"data": 2}, marks=LONG)]
)
def test_the_mesh_is_invisible(hub, rows, tmp_path, packed, loss, mesh):
    same_as_in(packed(loss), run_sweep(config(hub, tmp_path, rows, ALONE | {"mesh": mesh}, loss=loss)), 1e-5)


@SLOW
def test_a_resumed_run_has_the_bits_it_would_have_had(hub, rows, tmp_path, monkeypatch):
    """Stopped in the second epoch; without a file, the base's log-probabilities are computed again, in the same batches."""
    changes = ALONE | {"training.steps": 9, "training.eval_every": 4, "tracking.checkpoint_every": 3}
    whole = run_sweep(config(hub, tmp_path / "whole", rows, changes))
    stop_at(monkeypatch, 5)
    with pytest.raises(Stopped):
        run_sweep(config(hub, tmp_path / "cut", rows, changes))
    again = run_sweep(config(hub, tmp_path / "cut", rows, changes))
    assert not differing(bits_of_run(whole.path), bits_of_run(again.path))


@SLOW
def test_it_learns_and_what_it_learned_can_be_used(hub, rows, tmp_path):
    """Held-out accuracy from chats; then evaluate, generate, export and merge as for any causal LM."""
    changes = {"training.steps": 40, "training.eval_every": 20, "tracking.tensorboard": True, "task.test_size": 8}
    made = config(hub, tmp_path, rows, changes, file="chats", name="dpo")
    path = tmp_path / "dpo.yaml"
    assert call("train", path).code == 0
    run = tmp_path / "runs" / made.name
    result = json.loads(next(run.glob("*/results.json")).read_text())
    assert result["metric"] == "accuracy" and result["final"]["accuracy"] > 0.9 and result["final"]["margin"] > 0.1
    assert result["final"]["kl"] > 0 and sum(result["test_batches"]["targets"]) == 8
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = EventAccumulator(str(next(run.glob("*/results.json")).parent)).Reload().Tags()["scalars"]
    names = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "kl")
    assert {f"{part}/{name}" for part in ("train", "eval") for name in names} <= set(tags)
    found = call("evaluate", run)
    assert found.code == 0 and "accuracy" in found.out
    generated = call("generate", run, "--prompt", "it", "--chat", "--max-new-tokens", "4")
    assert generated.code == 0 and generated.out.strip()
    (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": CHAT}) + "\n")
    options = ("--max-new-tokens", "3", "--output")
    for source, right in (("asked.jsonl", None), (str(rows / "chats.jsonl"), "good")):
        out = tmp_path / f"said {right}.jsonl"
        assert call("predict", run, "--source", tmp_path / source, *options, out).code == 0
        first = json.loads(out.read_text().splitlines()[0])
        assert isinstance(first["output"], str) and (first["reference"] is None if right is None else right in first["reference"])
    for form in ("peft", "hf"):
        out = call("export", run, "--format", form, "--out", tmp_path / form)
        assert out.code == 0, out.err
    merged, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", hub.llama))
    assert any(not np.array_equal(base[name], array) for name, array in merged.items() if "q_proj" in name)


@LONG
def test_a_reward_head_scores_responses_and_leaves_for_transformers(hub, rows, tmp_path):
    config(hub, tmp_path, rows, {"training.steps": 20}, loss="reward", name="reward")
    assert call("train", tmp_path / "reward.yaml").code == 0
    run, out = tmp_path / "runs" / "reward", tmp_path / "scores.jsonl"
    assert call("predict", run, "--source", rows / "texts.jsonl", "--output", out).code == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 60 and np.mean([line["score"] for line in lines]) > 0.9
    assert all((line["output"]["chosen"] > line["output"]["rejected"]) == line["score"] for line in lines)
    (tmp_path / "asked.jsonl").write_text('{"prompt": "it"}\n')
    refused = call("predict", run, "--source", tmp_path / "asked.jsonl", "--output", tmp_path / "none.jsonl")
    assert refused.code == 2 and "needs the column 'chosen'" in refused.err
    assert call("generate", run, "--prompt", "it").code == 2
    assert call("export", run, "--format", "hf", "--out", tmp_path / "hf").code == 0
    said = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert said["architectures"] == ["LlamaForSequenceClassification"] and len(said["id2label"]) == 1
