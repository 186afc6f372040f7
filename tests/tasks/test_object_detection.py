"""`object_detection` over a tiny vision transformer: packs, the mesh, resuming, and from COCO's JSON to predictions."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("pycocotools")

from experiments.fuzz import bits_of_run, differing
from lora_jax.config.load import load_config
from lora_jax.config.schema import MeshConfig
from lora_jax.data.coco import Objects
from lora_jax.data.image_batches import Augment, ImageCache, ImageExamples, crop_window
from lora_jax.data.images import StoredImage
from lora_jax.data.object_batches import ObjectExamples
from lora_jax.errors import Stopped
from lora_jax.packing.pack import Pack
from lora_jax.parallel.constraints import place_batch
from lora_jax.parallel.mesh import make_mesh
from lora_jax.sweeps.run import run_sweep
from lora_jax.tasks.base import task_of
from lora_jax.tasks.detection_pictures import RIGHT, SAID
from lora_jax.tracking import Progress
from lora_jax.training.setup import place_model, set_up
from lora_jax.weights.pixels import PixelSpec
from tests import tiny
from tests.stopping import stop_at
from tests.tiny_hub import call
from tests.tiny_images import SIDE, save_vision

pytestmark = pytest.mark.usefixtures("compile_cache")

STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


def save_boxes(folder: Path, name: str, count: int, *, seed: int = 0) -> Path:
    """Noise with one to three bright red or blue rectangles, as PNG files and COCO's JSON."""
    from PIL import Image

    random = np.random.default_rng(seed)
    images, annotations = [], []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = random.integers(0, 60, (SIDE * 2, SIDE * 2, 3))
        for _ in range(int(random.integers(1, 4))):
            kind = int(random.integers(2))
            width, height = random.integers(8, 17, 2).tolist()
            left, top = int(random.integers(0, 2 * SIDE - width + 1)), int(random.integers(0, 2 * SIDE - height + 1))
            pixels[top : top + height, left : left + width, 2 * kind] = 240
            box = [left, top, width, height]
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": kind + 1, "bbox": box, "iscrowd": 0})
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{name}{i}.png")
        images.append({"id": i, "file_name": f"images/{name}{i}.png", "width": 2 * SIDE, "height": 2 * SIDE})
    found = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]}
    (folder / f"{name}.json").write_text(json.dumps(found))
    return folder / f"{name}.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("boxes")
    save_vision(folder / "vit", "vit")
    save_boxes(folder, "train", 24)
    save_boxes(folder, "val", 8, seed=1)
    return folder


def write(folder, name, **changes):
    """A config file in the folder; `a__b` means `a.b`."""
    task = {"kind": "object_detection", "source": str(folder / "train.json"), "eval_source": str(folder / "val.json"), "queries": 6}
    values = {
        "name": name,
        "model": {"source": str(folder / "vit")},
        "task": task,
        "adapter": {"rank": 4, "targets": "all-linear"},
        "optimizer": {"learning_rate": 0.003},
        "training": {"steps": STEPS, "batch_size": 8, "eval_every": 2},
        "tracking": {"dir": str(folder / "runs")},
    }
    for key, value in changes.items():
        part, _, rest = key.partition("__")
        if rest:
            values[part][rest] = value
        else:
            values[part] = value
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(values))
    return path


def members(folder):
    """Two configs of unequal rank, sites, rate and seed."""
    other = {"adapter__rank": 2, "adapter__targets": "attention", "adapter__layers": "last:1", "training__seed": 3}
    options = {"optimizer__eps": 1e-3, "task__flip": 0.5}
    return [load_config(write(folder, f"member{n}", **(options | more))) for n, more in enumerate(({}, other))]


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


@pytest.mark.slow
def test_a_pack_equals_its_solo_runs_and_compiles_once(folder):
    configs = members(folder)
    setup = set_up(configs[0])
    together, state, pack = trained(setup, configs)
    for number, config in enumerate(configs):
        alone, own, solo = trained(setup, [config])
        np.testing.assert_allclose(together[:, number], alone[:, 0], rtol=1e-5)
        ours, theirs = (p.member_arrays(setup.model, i, s.trainable) for p, i, s in ((pack, number, state), (solo, 0, own)))
        assert any("detection_tokens" in name for name in ours)
        for name, array in ours.items():
            assert np.linalg.norm(array - theirs[name]) <= 1e-5 * max(np.linalg.norm(theirs[name]), 1e-3), name


@pytest.mark.long
@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs the eight CPU devices that tests/conftest.py makes")
def test_the_mesh_is_invisible(folder):
    configs = members(folder)
    setup = set_up(configs[0])
    wanted, _, _ = trained(setup, configs)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    place_model(setup.model, mesh)
    found, _, _ = trained(setup, configs, mesh)
    np.testing.assert_allclose(found, wanted, rtol=2e-5)


@pytest.mark.long
def test_a_resumed_run_ends_with_the_bits_of_one_that_went_through(folder, monkeypatch):
    options = {"sweep": {"grid": {"adapter.rank": [1, 2]}}, "task__flip": 0.5, "tracking__checkpoint_every": 1}
    whole, broken = (load_config(write(folder, name, **options)) for name in ("whole", "broken"))
    run_sweep(whole, progress=Progress(enabled=False))
    stop_at(monkeypatch, 3)
    with pytest.raises(Stopped):
        run_sweep(broken, progress=Progress(enabled=False))
    run_sweep(broken, progress=Progress(enabled=False))
    assert not differing(bits_of_run(folder / "runs" / "whole"), bits_of_run(folder / "runs" / "broken"))


def test_boxes_follow_a_mirrored_image(folder):
    setup = set_up(load_config(write(folder, "flips", task__flip=0.99, task__min_visible=0.4)))
    examples: Any = setup.data.train
    assert examples.visible == 0.4
    plain, mirrored = examples.pixels(0), examples.augmented(0, [1])
    np.testing.assert_array_equal(mirrored, plain[:, ::-1])
    before, after = (examples.values(0, seed).reshape(-1, 6) for seed in (None, [1]))
    real = before[:, 0] > 0
    np.testing.assert_allclose(after[real, 2], 1 - before[real, 2], rtol=1e-6)
    np.testing.assert_array_equal(after[:, [0, 1, 3, 4, 5]], before[:, [0, 1, 3, 4, 5]])


def test_boxes_follow_a_random_crop(tmp_path):
    """Beside the bright pixels of the crop; an object of which too little is left does not count."""
    from PIL import Image

    canvas = np.zeros((90, 120, 3), np.uint8)
    canvas[30:60, 20:80] = 255
    Image.fromarray(canvas).save(tmp_path / "a.png")
    found = Objects(np.array([1], np.int32), np.array([[20, 30, 60, 30]], np.float32), np.array([1800], np.float32), np.array([False]))
    spec, augment = PixelSpec((128, 128), squash=True, interpolation="bilinear"), Augment((0.1, 0.5), flip=0.5)
    plain = ImageExamples([StoredImage("a", tmp_path / "a.png")], np.zeros(1, np.int32), spec, 1, ImageCache(10**6), augment)
    examples = ObjectExamples.of(plain, [found], [(120, 90)], most=1, visible=0.4)
    counts = [0, 0]
    for number in range(40):
        seed = [5, number]
        window = crop_window((120, 90), (0.1, 0.5), np.random.default_rng(np.random.SeedSequence(seed)))
        assert window is not None
        left, top, width, height = window
        share = (canvas[top : top + height, left : left + width, 0] > 0).sum() / 1800
        row, bright = examples.values(0, seed), examples.augmented(0, seed)[..., 0] > 127
        counts[int(row[0])] += 1
        assert (row[0] == 1) == (share >= 0.4)
        if row[0]:
            rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
            edges = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 128
            np.testing.assert_allclose([*(row[2:4] - row[4:] / 2), *(row[2:4] + row[4:] / 2)], edges, atol=0.02)
            assert row[1] == 1
        else:
            assert not row.any()
    assert min(counts) > 5


@pytest.mark.slow
def test_a_few_validation_images_are_drawn_with_what_is_found(folder):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"sweep": {"grid": {"adapter.rank": [1, 2]}}, "task__min_score": 0.0, "task__random_crop": [0.3, 1.0]}
    done = call("sweep", write(folder, "drawn", **options))
    assert done.code == 0, done.err
    run, drawn = folder / "runs" / "drawn", []
    for file in sorted(run.glob("*/results.json")):
        drawn.append((file.parent / "predictions.png").read_bytes())
        images = EventAccumulator(str(file.parent)).Reload().Images("eval/predictions")
        assert [image.step for image in images] == [2, 4] and images[-1].encoded_image_string == drawn[-1]
        picture = np.asarray(Image.open(io.BytesIO(drawn[-1])).convert("RGB")).reshape(-1, 3)
        for color in (RIGHT, SAID):
            assert (picture == color).all(-1).sum() > 500
    page = (run / "report.html").read_text()
    assert len(drawn) == 2 and sum(base64.b64encode(png).decode() in page for png in drawn) == 1
    assert "at its last evaluation, on the first validation images" in page


@pytest.mark.slow
def test_from_annotations_to_predictions(folder):
    many = {"task__source": str(save_boxes(folder, "many", 160, seed=2)), "training__batch_size": 16}
    changes = {"adapter": {"method": "full"}, "training__steps": 300, "training__eval_every": 0, "optimizer__learning_rate": 1.5e-3}
    done = call("train", write(folder, "learned", task__min_score=0.0, **many, **changes))
    assert done.code == 0, done.err
    result = json.loads(next((folder / "runs" / "learned").glob("**/results.json")).read_text())
    # A detector that has learned nothing is below 0.01.
    assert result["final"]["map50"] > 0.08, result["final"]

    output = folder / "found.jsonl"
    done = call("predict", folder / "runs" / "learned", "--source", folder / "val.json", "--output", output)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 8 and all(len(line["output"]) == 6 and line["reference"] for line in lines)
    first = lines[0]["output"][0]
    assert first["class"] in ("red", "blue") and 0 <= first["score"] <= 1 and len(first["box"]) == 4
    done = call("predict", folder / "runs" / "learned", "--source", folder / "images", "--output", folder / "more.jsonl")
    assert done.code == 0 and len((folder / "more.jsonl").read_text().splitlines()) == 192


def test_bad_input_is_named(folder):
    def error(**changes):
        done = call("train", write(folder, "bad", **changes))
        assert done.code == 2 and "Traceback" not in done.err
        return done.err

    def changed(name, change):
        found = json.loads((folder / "train.json").read_text())
        change(found)
        (folder / f"{name}.json").write_text(json.dumps(found))
        return str(folder / f"{name}.json")

    assert "task.queries: 2 objects are looked for" in error(task__queries=2)
    assert "the category 'green' is none of red, blue" in error(
        task__eval_source=changed("green", lambda f: f["categories"][0].update(name="green"))
    )
    assert "the file says 64 x 32" in error(task__source=changed("wide", lambda f: f["images"][0].update(width=64)))
    assert "no file" in error(task__source=changed("gone", lambda f: f["images"][0].update(file_name="gone.png")))
    assert "no JSON file in COCO's form" in error(task__source=str(folder / "images" / "train0.png"))


def test_odd_images_boxes_without_an_area_and_classes_missing_in_a_part(folder):
    """One pixel, grey, 16-bit and CMYK images are seen as the model takes them; what is left out or missing is said."""
    from PIL import Image

    place = folder / "odd"
    place.mkdir(exist_ok=True)
    ramp = np.arange(100, dtype=np.uint16).reshape(10, 10)
    pictures = {
        "one.png": Image.new("RGB", (1, 1), (200, 0, 0)),
        "grey.png": Image.fromarray(ramp.astype(np.uint8)),
        "deep.png": Image.fromarray(ramp * 257),
        "print.tiff": Image.new("CMYK", (10, 10), (0, 255, 255, 0)),
    }
    images, annotations = [], []
    for i, (name, picture) in enumerate(pictures.items()):
        picture.save(place / name)
        images.append({"id": i, "file_name": name, "width": picture.width, "height": picture.height})
        annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, picture.width, picture.height]})
    annotations += [
        {"id": 8, "image_id": 1, "category_id": 2, "bbox": [3, 3, 0, 4]},
        {"id": 9, "image_id": 1, "category_id": 1, "bbox": [8, 8, 9, 9]},
    ]
    found = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]}
    (place / "val.json").write_text(json.dumps(found))
    setup = set_up(load_config(write(folder, "odd", task__eval_source=str(place / "val.json"), task__eval_size="all")))
    said = "\n".join(setup.data.notes)
    assert "1 boxes of val.json without an area left out" in said and "1 boxes of val.json cut to their image" in said
    assert "held-out: no object of 1 of the 2 classes: blue" in said
    examples: Any = setup.data.held_out
    at = {Path(image.name).name: i for i, image in enumerate(examples.images)}
    one, grey, deep, red = (examples.pixels(at[name]) for name in pictures)
    assert (one == [200, 0, 0]).all() and one.shape == (SIDE, SIDE, 3)
    assert np.array_equal(grey, deep) and np.ptp(grey.reshape(-1, 3), axis=1).max() == 0
    assert red[..., 0].min() > 200 and red[..., 1:].max() < 60
    np.testing.assert_allclose(examples.values(at["one.png"]).reshape(-1, 6)[0], [1, 0, 0.5, 0.5, 1, 1])
    np.testing.assert_allclose(examples.values(at["grey.png"]).reshape(-1, 6)[:2, 2:], [[0.5, 0.5, 1, 1], [0.9, 0.9, 0.2, 0.2]], rtol=1e-6)

    (place / "one.png").write_text("no image")
    done = call("train", write(folder, "text", task__eval_source=str(place / "val.json")))
    assert done.code == 2 and "one.png: no image that can be decoded" in done.err and "Traceback" not in done.err


def test_the_parts_of_the_loss_weigh_as_the_config_says(folder):
    random, parts = np.random.default_rng(0), {}
    found = np.concatenate([random.normal(size=(2, 6, 3)), random.uniform(0.1, 0.9, (2, 6, 4))], axis=-1).astype(np.float32)
    wanted = np.array([[1, 0, 0.5, 0.5, 0.2, 0.2], [1, 1, 0.2, 0.3, 0.1, 0.2]], np.float32)
    batch = {"target_values": np.stack([wanted.reshape(-1)] * 2), "target_weights": np.ones(2, np.float32)}

    class Model:
        def readout(self):
            return lambda features: features

    model: Any = Model()

    def loss(**weights):
        section: Any = load_config(write(folder, "weights", **weights)).task
        objective: Any = task_of(section).loss(section)
        total, _, means = objective(model, found, batch)
        parts.update({name: float(value) / 2 for name, (value, _) in means.items()})
        return float(total) / 2

    assert loss(task__box_weight=0.0, task__giou_weight=0.0) == pytest.approx(parts["class_loss"], rel=1e-6)
    weighed = loss(task__box_weight=3.0, task__giou_weight=0.5)
    assert weighed == pytest.approx(parts["class_loss"] + 3 * parts["box_loss"] + 0.5 * parts["giou_loss"], rel=1e-6)
    before = parts["class_loss"]
    loss(task__box_weight=3.0, task__giou_weight=0.5, task__no_object=1.0)
    assert parts["class_loss"] != pytest.approx(before, rel=1e-3)
