"""Distillation: members meet another model's hidden states; against transformers-free NumPy sums over the models' own outputs."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.errors import InputError
from lora_jax.models.load import load_model
from lora_jax.sweeps.run import run_sweep
from lora_jax.tasks.objectives import summed_squared_error
from lora_jax.tasks.prepare import prepare
from lora_jax.training.setup import set_up
from lora_jax.weights.tokenizer import load_tokenizer
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")

VALUE = {False: "encoder.layer.1.attention.self.value.weight", True: "model.layers.1.self_attn.v_proj.weight"}


@pytest.fixture(scope="module")
def teachers(hub, tmp_path_factory):
    """(encoder, decoder): the hub's, with a rank-1 update of one layer's value projection."""
    made = {}
    for causal, source in ((False, hub.bert), (True, hub.llama)):
        folder = tmp_path_factory.mktemp("teachers") / source.name
        shutil.copytree(source, folder)
        weights = load_file(folder / "model.safetensors")
        rng = np.random.default_rng(5)
        weight = weights[VALUE[causal]]
        weights[VALUE[causal]] = weight + 0.2 * np.outer(*(rng.standard_normal(n).astype(np.float32) for n in weight.shape))
        save_file(weights, folder / "model.safetensors")
        made[causal] = folder
    return made


def config(hub, tmp_path, teacher, changes=None, *, causal=False, name="tiny"):
    task = {"kind": "distillation", "source": str(hub.reviews), "text": "text", "teacher": str(teacher), "eval_size": 20, "max_length": 24}
    return hub.config(tmp_path, {"task": task, "adapter.targets": ["v_proj"], **(changes or {})}, causal=causal, name=name)


def test_the_error_is_a_mean_over_numbers_and_a_sum_over_targets():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 5, 7)).astype(np.float32)
    weights = np.array([1, 0, 2, 0.5, 0], np.float32)
    loss, grad = jax.value_and_grad(summed_squared_error)(jnp.asarray(x), y, weights)
    difference = x.astype(np.float64) - y
    np.testing.assert_allclose(loss, (weights * (difference**2).mean(-1)).sum(), rtol=1e-6)
    np.testing.assert_allclose(grad, 2 * weights[:, None] * difference / 7, rtol=1e-5, atol=1e-7)


@pytest.mark.long
@pytest.mark.parametrize("causal", [False, True])
def test_the_loss_is_that_of_the_models_outputs(hub, tmp_path, teachers, causal):
    source = hub.llama if causal else hub.bert
    outcome = run_sweep(
        config(hub, tmp_path, teachers[causal], {"optimizer.learning_rate": 1e-20, "training.eval_every": 0}, causal=causal)
    )
    data = prepare(config(hub, tmp_path, teachers[causal], causal=causal).task, load_tokenizer(str(source)), decoder=causal)
    base, teacher = load_model(str(source)), load_model(str(teachers[causal]))
    total, count = 0.0, 0
    for tokens in data.held_out.tokens:
        ours, theirs = (tiny.outputs(m, tokens[None], method="hidden").astype(np.float64) for m in (base, teacher))
        total, count = total + ((ours - theirs) ** 2).mean(-1).sum(), count + len(tokens)
    final = outcome.results[0].final
    assert set(final) == {"loss"} and final["loss"] == pytest.approx(total / count, rel=1e-5) and final["loss"] > 1e-4


@pytest.mark.long
def test_a_pack_learns_what_its_solo_runs_do(hub, tmp_path, teachers):
    zipped = {"adapter.layers": [1, 0], "adapter.rank": [1, 3]}
    changes = {"sweep": {"zip": zipped}, "training.steps": 60, "training.accumulate": 2, "training.eval_every": 0}
    packed = run_sweep(config(hub, tmp_path, teachers[False], changes))
    solo = run_sweep(config(hub, tmp_path, teachers[False], changes, name="solo"), solo=True)
    for a, b in zip(packed.results, solo.results, strict=True):
        assert a.final["loss"] == pytest.approx(b.final["loss"], rel=1e-4)
    untaught = run_sweep(config(hub, tmp_path, teachers[False], {"training.steps": 1, "training.eval_every": 0}, name="untaught"))
    assert packed.results[0].final["loss"] < 0.75 * untaught.results[0].final["loss"]  # layer 1 is where the teacher's update is


@pytest.mark.long
@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs the devices that tests/conftest.py makes")
def test_the_mesh_is_invisible(hub, tmp_path, teachers):
    one, two = (run_sweep(config(hub, tmp_path, teachers[False], c, name=n)) for n, c in (("one", {}), ("two", {"mesh": {"data": 2}})))
    assert two.results[0].final["loss"] == pytest.approx(one.results[0].final["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_teacher_like_the_base_has_nothing_to_teach(hub, tmp_path):
    assert run_sweep(config(hub, tmp_path, hub.bert, {"training.steps": 1, "training.eval_every": 0})).results[0].final["loss"] < 1e-9


def test_what_cannot_teach_is_refused(hub, tmp_path, teachers):
    with pytest.raises(InputError, match=r"task.teacher: .*vocabulary of 33 tokens, and the model has .* 31"):
        set_up(config(hub, tmp_path, hub.llama))
    with pytest.raises(InputError, match="task.teacher"):
        set_up(config(hub, tmp_path, tmp_path / "nothing"))
    bad = [
        ({"task.teacher": None}, "task.teacher: missing"),
        ({"task.text": None}, "task.text: missing"),
        ({"task.prompt": "text"}, "'task.prompt' belongs to causal_lm"),
        ({"task.label": "tag"}, "'task.label' belongs to classification or "),
    ]
    for change, words in bad:
        with pytest.raises(InputError, match=words):
            config(hub, tmp_path, hub.bert, change)
