"""`image_classification` over a tiny vision transformer: what holds of every pack holds here, and from a file of images to an export."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from experiments.fuzz import bits_of_run, differing
from lora_jax.config.load import load_config
from lora_jax.config.schema import MeshConfig
from lora_jax.errors import Stopped
from lora_jax.models.load import load_model
from lora_jax.packing.pack import Pack
from lora_jax.parallel.constraints import place_batch
from lora_jax.parallel.mesh import make_mesh
from lora_jax.sweeps.run import run_sweep
from lora_jax.tracking import Progress
from lora_jax.training.setup import place_model, set_up
from tests import tiny
from tests.stopping import stop_at
from tests.tiny_hub import call
from tests.tiny_images import save_folders, save_squares, save_vision

pytestmark = pytest.mark.usefixtures("compile_cache")

STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for kind in ("vit", "dinov2", "siglip_vision_model", "resnet"):
        save_vision(folder / kind, kind)
    save_squares(folder / "train.npz", 48)
    save_squares(folder / "val.npz", 18, seed=1)
    return folder


def write(folder, name, **changes):
    """A config file in the folder; `a__b` means `a.b`."""
    values = {
        "name": name,
        "model": {"source": str(folder / "vit")},
        "task": {"kind": "image_classification", "source": str(folder / "train.npz"), "eval_source": str(folder / "val.npz")},
        "adapter": {"rank": 4, "targets": "all-linear"},
        "optimizer": {"learning_rate": 0.003},
        "training": {"steps": STEPS, "batch_size": 8, "eval_every": 3},
        "tracking": {"dir": str(folder / "runs")},
    }
    for key, value in changes.items():
        part, _, rest = key.partition("__")
        if rest:
            values.setdefault(part, {})[rest] = value
        else:
            values[part] = value
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(values))
    return path


MEMBERS = [
    {"adapter": {"rank": 2, "targets": "attention", "layers": "last:1"}},
    {"adapter": {"rank": 4, "targets": "mlp", "layers": "last:2"}, "optimizer": {"learning_rate": 1e-3}, "training": {"seed": 3}},
]


def members(folder, kind, **changes):
    """The configs of `MEMBERS`."""
    made = []
    for number, member in enumerate(MEMBERS):
        sections = {section: dict(values) for section, values in member.items()}
        flat = {f"{section}__{key}": value for section, values in sections.items() for key, value in values.items()}
        made.append(
            load_config(write(folder, f"member{number}", model__source=str(folder / kind), optimizer__eps=1e-3, **(flat | changes)))
        )
    return made


def trained(setup, configs, mesh=None):
    """Losses of each step (steps, members), and the pack's last state."""
    pack = Pack.build(setup.model, configs, STEPS, mesh)
    state, losses = pack.state, []
    for step in range(STEPS):
        batch = setup.plan.batch(step)
        placed = batch if mesh is None else place_batch(mesh, batch, row_axis=1)
        state, metrics = pack.programs.train(state, pack.fixed, pack.part.frozen, placed, np.int32(step))
        losses.append(np.asarray(metrics.loss))
    assert pack.programs.train.traces.count == 1
    return np.stack(losses), state, pack


@pytest.mark.parametrize(
    "kind", ["vit", pytest.param("dinov2", marks=pytest.mark.slow), pytest.param("siglip_vision_model", marks=pytest.mark.slow)]
)
def test_a_pack_equals_its_solo_runs_and_compiles_once(folder, kind):
    configs = members(folder, kind, task__mixup=0.3, task__flip=0.5)
    setup = set_up(configs[0])
    together, state, pack = trained(setup, configs)
    for number, config in enumerate(configs):
        alone, own, solo = trained(setup, [config])
        np.testing.assert_allclose(together[:, number], alone[:, 0], rtol=1e-5)
        ours, theirs = (p.member_arrays(setup.model, i, s.trainable) for p, i, s in ((pack, number, state), (solo, 0, own)))
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            assert np.linalg.norm(array - theirs[name]) <= 1e-5 * max(np.linalg.norm(theirs[name]), 1e-3), name


@pytest.mark.slow
@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs the eight CPU devices that tests/conftest.py makes")
@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_the_mesh_is_invisible(folder, kind):
    configs = members(folder, kind, task__mixup=0.3)
    setup = set_up(configs[0])
    wanted, _, _ = trained(setup, configs)
    for sizes in ({"data": 8}, {"fsdp": 4, "data": 2}):
        mesh = make_mesh(MeshConfig(**sizes))
        place_model(setup.model, mesh)
        found, _, _ = trained(setup, configs, mesh)
        np.testing.assert_allclose(found, wanted, rtol=2e-5)


SWEEP = {"adapter__layers": "last:1", "sweep": {"grid": {"adapter.rank": [1, 2]}}, "training__steps": 8, "training__eval_every": 4}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layers"), [("vit", 2), ("resnet", 1)])
def test_the_trunk_cache_changes_no_bit(folder, kind, layers):
    runs, own = [], {"model__source": str(folder / kind), "task__image_size": 40}  # 10 x 10 pixels of four positions, not all alike
    own |= {} if kind == "vit" else {"adapter__targets": "convolutions"}
    for cache in ("off", "on"):
        path = write(folder, f"{kind}-{cache}", training__cache_trunk=cache, **own, **SWEEP)
        done = call("sweep", path)
        assert done.code == 0, done.err
        assert (f"trunk cache: {layers} layers of 66 examples" in done.err + done.out) == (cache == "on"), done.err
        runs.append(folder / "runs" / f"{kind}-{cache}")
    assert not differing(*map(bits_of_run, runs))
    if kind != "vit":
        return
    done = call("sweep", write(folder, "flipped", training__cache_trunk="on", task__flip=0.5, **SWEEP))
    assert "trunk cache: off, because every epoch sees the training examples otherwise" in done.err + done.out


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_bits_of_one_that_went_through(folder, monkeypatch):
    options = SWEEP | {"task__random_crop": [0.4, 1.0], "task__flip": 0.5, "task__color_jitter": 0.2, "tracking__checkpoint_every": 2}
    whole, broken = (load_config(write(folder, name, **options)) for name in ("whole", "broken"))
    run_sweep(whole, progress=Progress(enabled=False))
    stop_at(monkeypatch, 5)
    with pytest.raises(Stopped):
        run_sweep(broken, progress=Progress(enabled=False))
    run_sweep(broken, progress=Progress(enabled=False))
    assert not differing(bits_of_run(folder / "runs" / "whole"), bits_of_run(folder / "runs" / "broken"))


@pytest.mark.slow
def test_from_images_to_predictions_and_an_export(folder):
    save_folders(folder / "photos", 30, side=20)
    save_folders(folder / "photos", 9, split="val", side=20)
    changes = {"adapter": {"method": "full"}, "training__steps": 30, "training__eval_every": 0, "model__source": str(folder / "dinov2")}
    path = write(folder, "photos", task__source=str(folder / "photos"), task__eval_source=str(folder / "photos"), **changes)
    done = call("train", path)
    assert done.code == 0, done.err
    result = json.loads(next((folder / "runs" / "photos").glob("**/results.json")).read_text())
    assert result["final"]["accuracy"] > 0.9 and np.trace(result["final"].get("confusion", np.eye(3) * 9)) >= 8

    output = folder / "said.jsonl"
    done = call("predict", folder / "runs" / "photos", "--source", folder / "photos" / "val" / "blue", "--output", output)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["output"] for line in lines] == ["blue"] * 3 and all(line["reference"] is None for line in lines)

    done = call("export", folder / "runs" / "photos", "--format", "hf", "--out", folder / "exported")
    assert done.code == 0, done.err
    model = load_model(str(folder / "exported"), head="image_classification")
    assert model.class_names == ("blue", "green", "red")
    assert json.loads((folder / "exported" / "config.json").read_text())["architectures"] == ["Dinov2ForImageClassification"]
    assert (folder / "exported" / "preprocessor_config.json").is_file()


def test_bad_input_is_named(folder):
    def error(**changes):
        done = call("train", write(folder, "bad", **({"task__eval_source": None, "task__eval_size": 3} | changes)))
        assert done.code == 2 and "Traceback" not in done.err
        return done.err

    place = folder / "broken"
    save_folders(place, 12)
    (place / "train" / "blue" / "text.jpg").write_text("no image")
    assert "text.jpg: no image that can be decoded" in (said := error(task__source=str(place))) and "task.skip_broken" in said
    own = {"task__source": str(place), "task__eval_source": None, "task__eval_size": 3, "training__steps": 1}
    done = call("train", write(folder, "skipped", task__skip_broken=True, task__cache_bytes=1000, **own))
    assert "1 of 13 images are broken and left out" in done.out + done.err
    (place / "val" / "down").mkdir(parents=True)
    (place / "train" / "blue" / "text.jpg").replace(place / "val" / "down" / "0.png")
    (place / "val" / "down" / "0.png").write_bytes((place / "train" / "blue" / "0.png").read_bytes())
    assert "label 'down'" in error(task__source=str(place), task__eval_source=str(place))
    assert "reads texts, but" in error(task={"kind": "classification", "source": str(place), "text": "text", "label": "label"})
    assert "task.image_size: 3 x 3 pixels are too few" in error(task__image_size=3)
    assert "'max_length' counts tokens" in error(task__max_length=64)


def test_a_class_without_an_image_in_one_part_is_said(folder):
    place = folder / "lopsided"
    save_folders(place, 12)
    save_folders(place, 2, split="val")
    done = call("train", write(folder, "lopsided", task__source=str(place), task__eval_source=str(place), training__steps=1))
    assert done.code == 0 and "held-out: no image of 1 of the 3 classes: red" in done.out + done.err
