"""Distillation of logits: the loss beside its formula in float64, and runs with a teacher beside runs without."""

from __future__ import annotations

import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.fuzz import bits_of_run, differing
from lora_jax.errors import InputError, Stopped
from lora_jax.models.load import load_model
from lora_jax.sweeps.run import run_sweep
from lora_jax.tasks import objectives
from lora_jax.tasks.objectives import summed_distillation, taught
from lora_jax.tasks.teachers import TEACHER
from lora_jax.training.setup import set_up
from tests import tiny
from tests.stopping import stop_at
from tests.tiny_hub import call

pytestmark = pytest.mark.usefixtures("compile_cache")

N, WIDTH, CLASSES = 13, 8, 11
RNG = np.random.default_rng(0)
X, W = RNG.standard_normal((N, WIDTH)).astype(np.float32), RNG.standard_normal((WIDTH, CLASSES)).astype(np.float32)
THEIRS = 2 * RNG.standard_normal((N, CLASSES)).astype(np.float32)
IDS = RNG.integers(0, CLASSES, N).astype(np.int32)
WEIGHTS = np.where(RNG.random(N) < 0.3, 0, RNG.random(N)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def by_hand(x: np.ndarray, w: np.ndarray, temperature: float, alpha: float, top: int | None) -> float:
    """sum of weights * (alpha T^2 KL + (1 - alpha) cross-entropy), in float64; the rest of the classes as one where `top` are kept."""
    logits = x.astype(np.float64) @ w.astype(np.float64)
    theirs, ours = softmax(THEIRS.astype(np.float64) / temperature), softmax(logits / temperature)
    total = 0.0
    for i in range(N):
        p, q = theirs[i], ours[i]
        if top is not None:
            chosen = np.argsort(-p)[:top]
            p, q = (np.append(a[chosen], np.delete(a, chosen).sum()) for a in (p, q))
        kl, ce = float((p * np.log(p / q)).sum()), -float(np.log(softmax(logits[i])[IDS[i]]))
        total += float(WEIGHTS[i]) * (alpha * temperature**2 * kl + (1 - alpha) * ce)
    return total


@pytest.mark.parametrize("chunk", [10**9, 5 * CLASSES])
@pytest.mark.parametrize(("temperature", "alpha", "top"), [(2.0, 0.5, None), (3.0, 1.0, 4), (1.0, 0.25, 1)])
def test_the_loss_and_its_gradient_are_the_papers(monkeypatch, chunk, temperature, alpha, top):
    monkeypatch.setattr(objectives, "CHUNK_FLOATS", chunk)
    teacher = taught(jnp.asarray(THEIRS / temperature), top)

    def loss(x, w):
        return summed_distillation(
            lambda h: h @ w, x, jnp.asarray(IDS), jnp.asarray(WEIGHTS), teacher, temperature=temperature, alpha=alpha
        )[0]

    value, (dx, dw) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(X, W)
    assert float(value) == pytest.approx(by_hand(X, W, temperature, alpha, top), rel=2e-5)
    for array, grad, set_ in ((X, dx, lambda a: (a, W)), (W, dw, lambda a: (X, a))):
        for at in [(0, 0), (3, 2), (7, 5)]:
            step = np.zeros(array.shape)
            step[at] = 1e-5
            up, down = (by_hand(*set_(array.astype(np.float64) + s), temperature, alpha, top) for s in (step, -step))
            assert float(grad[at]) == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-4)


def test_the_divergence_of_the_likeliest_is_at_most_that_of_all():
    full, few = (taught(jnp.asarray(THEIRS), top) for top in (None, 3))
    logits = jnp.asarray(X @ W)
    whole, part = objectives.divergence(logits, full), objectives.divergence(logits, few)
    assert (part <= whole + 1e-5).all() and (part >= -1e-6).all()
    assert np.allclose(objectives.divergence(jnp.asarray(THEIRS), few), 0, atol=1e-5)


PRUNED: list[dict[str, Any]] = [{"kind": "prune", "sparsity": 0.6}]


def causal(hub: Any, folder: Any, distill: dict[str, Any] | None, changes: dict[str, Any] | None = None, name: str = "tiny") -> Any:
    more = {"model.transforms": PRUNED, "training.eval_every": 0, "adapter.targets": "all-linear"}
    folder.mkdir(exist_ok=True)
    return hub.config(folder, {"task.distill": distill, **more, **(changes or {})}, causal=True, name=name)


@pytest.mark.slow
def test_its_own_base_unpruned_is_held_once_where_it_is_equal(hub, tmp_path):
    setup = set_up(causal(hub, tmp_path, {"top_k": 5}))
    assert setup.shared is not None and setup.shared.name == TEACHER and setup.shared.numbers == 11
    teacher: Any = setup.shared.model
    base: Any = setup.base
    own, theirs = base.embed.embedding[...], teacher.base.embed.embedding[...]
    assert own.unsafe_buffer_pointer() == theirs.unsafe_buffer_pointer()
    plain: Any = load_model(str(hub.llama))
    kernels = [np.asarray(m.layers.segments[0].block.mlp.up_proj.kernel[...]) for m in (plain, teacher.base, base)]
    assert np.array_equal(kernels[0], kernels[1]) and not np.array_equal(kernels[0], kernels[2])
    # Without transforms it is the base itself.
    setup = set_up(causal(hub, tmp_path, {"top_k": 5}, {"model.transforms": []}, name="plain"))
    shared: Any = setup.shared
    assert shared.model.base is setup.base
    # And a step's array says of each target what the teacher says of it.
    batch = setup.plan.batch(0)
    found = np.asarray(setup.step_inputs(0, batch, None)[TEACHER])
    tokens, segments, index = (batch[n][0] for n in ("tokens", "segment_ids", "target_index"))
    model: Any = plain
    logits = np.asarray(model(jnp.asarray(tokens), positions=jnp.asarray(batch["positions"][0]), segment_ids=jnp.asarray(segments)))
    real = batch["target_weights"][0] > 0
    wanted = np.asarray(taught(jnp.asarray(logits.reshape(-1, logits.shape[-1])[index]) / 2.0, 5))
    assert tiny.relative(found[0][real], wanted[real]) < 1e-4 and (found[0][~real] == 0).all()


@pytest.mark.long
def test_a_taught_pack_equals_its_solo_runs_resumes_exactly_and_is_evaluated_as_untaught(hub, tmp_path, monkeypatch):
    distill = {"top_k": 5, "temperature": 3.0, "alpha": 0.7, "disk_gb": 1.0}
    changes = {"sweep": {"grid": {"adapter.rank": [2, 3]}}, "tracking.checkpoint_every": 2}
    done = run_sweep(causal(hub, tmp_path / "a", distill, changes))
    solo = run_sweep(causal(hub, tmp_path / "b", distill, changes), solo=True)
    for a, b in zip(done.results, solo.results, strict=True):
        assert a.final["loss"] == pytest.approx(b.final["loss"], rel=1e-5)
    config = causal(hub, tmp_path / "c", distill, changes)
    stop_at(monkeypatch, 3)
    with pytest.raises(Stopped):
        run_sweep(config)
    assert list((tmp_path / "c" / "runs" / ".teacher-cache").glob("*.npy"))
    assert not differing(bits_of_run(done.path), bits_of_run(run_sweep(config).path))
    # Where the step does nothing, the held-out loss is that of the base, with a teacher and without.
    still = {"optimizer.learning_rate": 1e-30, "training.steps": 1}
    with_one, without = (run_sweep(causal(hub, tmp_path / n, d, still)).results[0].final for n, d in (("d", distill), ("e", None)))
    assert with_one["loss"] == pytest.approx(without["loss"], rel=1e-6) and set(with_one) == set(without)


@pytest.mark.long
def test_a_pruned_student_learns_its_teacher(hub, tmp_path):
    """Of random models: the divergence that a step tells falls by more with a teacher than without one it could."""
    distill = {"alpha": 1.0, "temperature": 1.0, "top_k": 30}
    changes = {"training.steps": 60, "tracking.log_every": 10, "adapter.rank": 8}
    run_sweep(causal(hub, tmp_path, distill, changes))
    events = EventAccumulator(str(tmp_path / "runs" / "tiny" / "main")).Reload()
    (tag,) = [tag for tag in events.Tags()["scalars"] if tag.endswith("teacher_kl")]
    told = [event.value for event in events.Scalars(tag)]
    assert told[-1] < 0.6 * told[0], told


def classes(hub: Any, folder: Any, distill: dict[str, Any] | None, changes: dict[str, Any] | None = None) -> Any:
    return hub.config(folder, {"task.distill": distill, **(changes or {})})


@pytest.fixture(scope="module")
def taught_bert(hub, tmp_path_factory):
    """A checkpoint with a head for the reviews' classes, in another order than theirs."""
    folder = tmp_path_factory.mktemp("taught") / "bert"
    shutil.copytree(hub.bert, folder)
    weights = {f"bert.{n}": a for n, a in load_file(folder / "model.safetensors").items()}
    rng = np.random.default_rng(3)
    weights |= {"classifier.weight": rng.standard_normal((2, 32)).astype(np.float32), "classifier.bias": np.array([1, -1], np.float32)}
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "pos", "1": "neg"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.long
def test_a_classifiers_classes_are_put_in_the_tasks_order(hub, tmp_path, taught_bert):
    setup = set_up(classes(hub, tmp_path, {"teacher": str(taught_bert), "temperature": 1.0}))
    assert setup.data.classes == ("neg", "pos") and setup.shared is not None and setup.shared.numbers == 2
    batch = setup.plan.batch(0)
    found = np.asarray(setup.step_inputs(0, batch, None)[TEACHER])[0]
    teacher: Any = load_model(str(taught_bert), head="classification")
    texts = [batch["tokens"][0][batch["example_ids"][0] == n] for n in range(8)]
    for n, tokens in enumerate(texts):
        logits = np.asarray(teacher(jnp.asarray(tokens[None])), np.float64)[0, ::-1]
        assert found[n] == pytest.approx(np.log(softmax(logits)), rel=1e-4, abs=1e-5)


@pytest.mark.long
def test_a_classifier_is_taught(hub, tmp_path, taught_bert):
    done = call("train", hub.write(tmp_path, {"task.distill": {"teacher": str(taught_bert)}, "model.transforms": PRUNED}))
    assert done.code == 0, done.err
    assert call("evaluate", tmp_path / "runs" / "tiny").code == 0


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("bert", "task.distill.teacher: missing"),
        ("llama", "a vocabulary of 31 tokens, and the model has one of 33|head|classification|vocabulary"),
    ],
)
def test_what_cannot_teach_is_refused(hub, tmp_path, task, words):
    with pytest.raises(InputError, match=words):
        if task == "bert":
            set_up(classes(hub, tmp_path, {}))
        else:
            set_up(causal(hub, tmp_path, {"teacher": str(hub.bert)}))


@pytest.mark.parametrize(
    ("distill", "words"),
    [({"temperature": 0}, "task.distill.temperature"), ({"alpha": 0.0}, "alpha"), ({"alpha": 2.0}, "alpha"), ({"techer": "x"}, "teacher")],
)
def test_what_a_section_may_not_say(hub, tmp_path, distill, words):
    with pytest.raises(InputError, match=words):
        causal(hub, tmp_path, distill)


@pytest.mark.long
def test_hidden_states_of_another_width_are_met_through_a_trained_layer(hub, tmp_path):
    wide = tmp_path / "wide"
    shutil.copytree(hub.bert, wide)
    weights = load_file(wide / "model.safetensors")
    config = json.loads((wide / "config.json").read_text()) | {"hidden_size": 64}
    rng = np.random.default_rng(0)

    def grown(array: np.ndarray) -> np.ndarray:
        return (rng.standard_normal([64 if n == 32 else n for n in array.shape]) * array.std()).astype(np.float32)

    save_file({n: grown(a) for n, a in weights.items()}, wide / "model.safetensors")
    (wide / "config.json").write_text(json.dumps(config))
    task = {"kind": "distillation", "source": str(hub.reviews), "text": "text", "teacher": str(wide), "eval_size": 20}
    with pytest.raises(InputError, match="task.projection: 64"):
        set_up(hub.config(tmp_path, {"task": task}))
    with pytest.raises(InputError, match="task.projection: 48, but"):
        set_up(hub.config(tmp_path, {"task": task | {"projection": 48}}))
    changes = {"task": task | {"projection": 64}, "training.steps": 40, "training.eval_every": 0, "optimizer.learning_rate": 1e-2}
    path = hub.write(tmp_path, changes)
    assert call("train", path).code == 0
    assert call("evaluate", tmp_path / "runs" / "tiny").code == 0
    (tmp_path / "still").mkdir()
    still = run_sweep(hub.config(tmp_path / "still", changes | {"optimizer.learning_rate": 1e-30, "training.steps": 1}))
    learned = json.loads((tmp_path / "runs" / "tiny" / "main" / "results.json").read_text())["final"]["loss"]
    assert learned < 0.8 * still.results[0].final["loss"]
