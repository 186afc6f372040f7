"""Objects in images: a class and a box each, by the heads of a detector (DETR, or detection tokens on any vision transformer)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field

from ..config.doors import TASKS
from ..config.types import Fraction, NonNegativeFloat, PositiveInt
from ..data.coco import CocoFile, Objects, read_coco
from ..data.image_batches import Augment
from ..data.images import StoredImage, load_images
from ..data.object_batches import WIDTH, ObjectExamples, ObjectPlan
from ..data.sources import HELD_OUT, ROW, TEST, Table, Taken
from ..errors import InputError
from ..models.detector import Detector
from ..models.heads import TaskModel
from ..models.vision import VisionBase
from ..weights.load import resolve
from .base import Columns, Encoded, Prediction, Rows, Task, TaskData, TaskMetrics, ToAnswer
from .detection_metrics import coco_scores, detections
from .detection_pictures import IMAGES, detections_png
from .evaluators import Evaluator, register
from .images import ImagesConfig, Reader
from .objectives import Means, Objective
from .prepare import Part, split
from .set_matching import MatchWeights, set_loss

for _name in ("class_loss", "box_loss", "giou_loss"):
    register(Evaluator(_name, False))

# Detections less likely than this are no part of what `predict` writes.
LEAST_SCORE = 0.3


class ObjectDetectionConfig(ImagesConfig):
    kind: Literal["object_detection"] = Field(default="object_detection", description="A class and a box for each object in an image.")
    source: str = Field(description="COCO's JSON: images, annotations with a bbox each, and categories.")
    queries: PositiveInt = Field(default=100, description="Objects looked for in an image, where the model brings no queries of its own.")
    no_object: NonNegativeFloat = Field(default=0.1, description="Weight of the cross-entropy where there is no object.")
    box_weight: NonNegativeFloat = Field(default=5.0, description="Weight of the L1 distance of boxes, in the loss and in the matching.")
    giou_weight: NonNegativeFloat = Field(default=2.0, description="Weight of 1 - GIoU of boxes, in the loss and in the matching.")
    min_visible: Fraction = Field(default=0.3, description="Share of an object's box that `random_crop` must leave for it to count.")
    min_score: Fraction = Field(default=LEAST_SCORE, description="Least probability of the objects that predictions name.")


class ObjectDetection(Task):
    """A class and a box for each object."""

    name, section, head, targets = "object_detection", ObjectDetectionConfig, "object_detection", 1
    tokenized = False
    loss_keys = frozenset({"no_object", "box_weight", "giou_weight", "min_score"})

    def columns(self, section: ObjectDetectionConfig) -> Columns:
        """Images and the objects in them."""
        return Columns(("image", "objects"), targets=("objects",))

    def encode(self, section: Any, rows: Rows, tokenizer: Any, *, decoder: bool, classes: tuple[str, ...] | None) -> Encoded:
        """Images are not read with a tokenizer.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"the task '{self.name}' reads no texts")

    def metrics(self, section: ObjectDetectionConfig, classes: tuple[str, ...] | None) -> TaskMetrics:
        """Average precision at an IoU of a half is what members are compared by; the parts of the loss beside it."""
        return TaskMetrics(("loss", "map50", "map", "map75", "class_loss", "box_loss", "giou_loss"), "map50")

    def check_base(self, section: ObjectDetectionConfig, base: Any, source: str) -> None:
        """The base is one over images that has queries, or can be given some."""
        if not isinstance(base, VisionBase):
            raise InputError(f"model.source: {source} is no model over images, which task.kind: {self.name} needs.")

    def needs_classes(self, section: ObjectDetectionConfig, *, decoder: bool) -> bool:
        """Always: the head has an output for each."""
        return True

    def model(self, section: ObjectDetectionConfig, base: Any, classes: tuple[str, ...] | None, class_token_ids: Any = None) -> Any:
        """The base with new heads."""
        return Detector(base, len(classes or ()), queries=section.queries, rngs=nnx.Rngs(0))

    def loss(self, section: ObjectDetectionConfig) -> Objective:
        """The loss of DETR (`set_matching.py`)."""
        both = {"box_cost": section.box_weight, "giou_cost": section.giou_weight}
        weights = MatchWeights(**both, box=section.box_weight, giou=section.giou_weight, no_object=section.no_object)

        def matched(model: TaskModel, features: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, Means]:
            found = model.readout()(features)
            wanted = batch["target_values"].reshape(found.shape[0], -1, WIDTH)
            images = batch["target_weights"]
            parts = set_loss(
                found[..., :-4], found[..., -4:], wanted[..., 1].astype(jnp.int32), wanted[..., 2:], wanted[..., 0] > 0, images, weights
            )
            count = images.sum()
            means = {f"{name}_loss": (jax.lax.stop_gradient(parts[name]) * count, count) for name in ("class", "box", "giou")}
            return parts["loss"] * count, jax.lax.stop_gradient(parts["right"]) * count, means

        return matched

    def own_data(self, section: ObjectDetectionConfig, base: Any, known: tuple[str, ...]) -> TaskData:
        """Images of the sources with their objects, split."""
        files: dict[str, CocoFile] = {}
        reader = Reader(section, base, whole=True)

        def load(source: str, key: str, splits: tuple[str, ...], renamed: Mapping[str, str]) -> tuple[Rows, Table]:
            path = _coco_path(source, key, splits)
            found = files[key] = read_coco(path, key)
            reader.notes += [f"{key}: {note}" for note in found.notes]
            rows, table = reader.kept(_table(found, path), source, key, "image")
            _check_sizes(rows, key)
            return rows, table

        for name in ("drop", "columns", "sources"):
            if getattr(section, name):
                raise InputError(f"task.{name}: COCO's files have no columns, and one is read at a time.")
        parts, tables = split(self, section, load)
        training = parts[0]
        names = known or files["task.source"].names
        for key, file in files.items():
            if unknown := [name for name in file.names if name not in names]:
                raise InputError(f"{key}: the category '{unknown[0]}' is none of {', '.join(names)}.")
        queries = base.queries or section.queries
        every = [objects for part in parts for objects in part.rows.take(part.at).columns["objects"]]
        most = max((int((~o.objects.crowd).sum()) for o in every), default=1)
        if most > queries:
            key = "task.queries" if not base.queries else "model.source"
            raise InputError(f"{key}: {queries} objects are looked for in an image, and one has {most}.")
        metrics, notes = self.metrics(section, names), reader.notes

        def examples(part: Part) -> tuple[ObjectExamples, Taken]:
            rows = part.rows.take(part.at)
            found = [o.renumbered(files[part.key].names, names) for o in rows.columns["objects"]]
            there = {int(c) for o in found for c in o.objects.classes}
            if missing := [name for i, name in enumerate(names) if i not in there]:
                notes.append(f"{part.name}: no object of {len(missing)} of the {len(names)} classes: {', '.join(missing[:6])}.")
            own = section.augment if part is training else Augment()
            objects, sizes = [o.objects for o in found], [o.size for o in found]
            scorer = _scorer(objects, sizes, len(names))
            plain = reader.examples(rows.columns["image"], np.zeros(len(found), np.int32), own, scorer)
            picture = _drawing(plain.images, found, names, section.min_score) if part is parts[1] else None
            made = ObjectExamples.of(plain, objects, sizes, most=max(most, 1), visible=section.min_visible, picture=picture)
            beside = 0 if part is not training else sum(len(other.at) for other in parts[1:] if other.key == training.key)
            counts = {"others": part.others, "sampled": len(part.at) < len(part.rows) - beside}
            return made, Taken(part.name, part.rows.source, len(part.rows), len(part.at), 0, {}, **counts)

        made = [examples(part) for part in parts]
        data: list[Any] = [one[0] for one in made]
        of_parts = [note for part in parts for note in part.notes]
        said = tuple(dict.fromkeys(note for note in [*(table.note for table in tables.values()), *of_parts, *notes] if note))
        taken, test = tuple(one[1] for one in made), data[2] if len(data) > 2 else None
        return TaskData(data[0], data[1], metrics, names, None, True, taken, said, test, batches=ObjectPlan)  # pyright: ignore[reportArgumentType]

    def rows_to_answer(self, section: ObjectDetectionConfig, base: Any, source: str, classes: tuple[str, ...] | None) -> ToAnswer:
        """Images of a source: COCO's JSON with or without annotations, or a folder of images."""
        assert classes is not None
        path = resolve(source, key="--source")
        reader = Reader(section, base, whole=True)
        if path.suffix.lower() == ".json":
            file = read_coco(path, "--source")
            if unknown := [name for name in file.names if name not in classes]:
                raise InputError(f"--source: the category '{unknown[0]}' is none of {', '.join(classes)}.")
            table, labelled = _table(file, path), any(len(o) for o in file.objects)
            table.columns["objects"] = [o.renumbered(file.names, classes) for o in table["objects"]]
        else:
            found = load_images(source, key="--source", image="image", label="label", splits=TEST + HELD_OUT, labelled=False)
            table, labelled = found, False
        images = table["image"]
        broken = reader.broken(images, "--source")
        there = [i for i, error in enumerate(broken) if error is None]
        known = table.columns.get("objects")
        found = [known[i] if known else _Found(Objects.none(), images[i].decode(3).size) for i in there]
        plain = reader.examples([images[i] for i in there], np.zeros(len(there), np.int32), Augment(), None)
        most = max((len(o.objects) for o in found), default=1)
        examples = ObjectExamples.of(plain, [o.objects for o in found], [o.size for o in found], most=max(most, 1))

        def predictions(answers: list[np.ndarray]) -> list[Prediction]:
            given = {
                i: _named(answer[0], own.size, classes, section.min_score) for i, own, answer in zip(there, found, answers, strict=True)
            }
            right = {i: _written(own, classes) for i, own in zip(there, found, strict=True)} if labelled else {}
            return [Prediction(image.name, given.get(i), right.get(i)) for i, image in enumerate(images)]

        return ToAnswer(np.array(table[ROW]), labelled, examples, ObjectPlan, predictions)


TASKS.register("object_detection", ObjectDetection())


@dataclasses.dataclass(frozen=True, eq=False)
class _Found:
    """What is in an image, and its (width, height) in pixels."""

    objects: Objects
    size: tuple[int, int]

    def renumbered(self, old: Sequence[str], new: Sequence[str]) -> _Found:
        """With the numbers that the classes have in another order."""
        place = np.array([new.index(name) for name in old], np.int32)
        return dataclasses.replace(self, objects=dataclasses.replace(self.objects, classes=place[self.objects.classes]))


def _coco_path(source: str, key: str, splits: tuple[str, ...]) -> Path:
    """The JSON file of a source, or of the split in a folder."""
    path = resolve(source, key=key)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*.json") if len(p.relative_to(path).parts) <= 2)
        chosen = [p for split in splits for p in files if split in p.stem.lower()]
        if not chosen:
            raise InputError(f"{key}: {path} holds no JSON file of the split {splits[0]}; name one file.")
        path = chosen[0]
    if path.suffix.lower() != ".json":
        raise InputError(f"{key}: {path} is no JSON file in COCO's form.")
    return path


def _table(found: CocoFile, path: Path) -> Table:
    images = [StoredImage(str(image), image) for image in found.images]
    objects = [_Found(o, size) for o, size in zip(found.objects, found.sizes, strict=True)]
    columns: dict[str, list[Any]] = {"image": images, "objects": objects, ROW: list(range(1, len(images) + 1))}
    return Table(columns, files=(str(path.resolve()),))


def _check_sizes(rows: Rows, key: str) -> None:
    """`InputError` where an image has another size than the file says: its boxes would lie elsewhere."""
    for image, found in zip(rows.columns["image"], rows.columns["objects"], strict=True):
        size = image.decode(3).size
        if size != found.size:
            raise InputError(f"{key}: {image.name} has {size[0]} x {size[1]} pixels, and the file says {found.size[0]} x {found.size[1]}.")


def _scorer(objects: Sequence[Objects], sizes: Sequence[tuple[int, int]], classes: int) -> Callable[[Sequence[np.ndarray]], dict[str, Any]]:
    """Scores answers, (1, queries, classes + 5) for each image: average precision."""
    wanted = [{"classes": o.classes, "boxes": o.boxes, "crowd": o.crowd, "areas": o.areas} for o in objects]

    def score(answers: Sequence[np.ndarray]) -> dict[str, Any]:
        return coco_scores(sizes, wanted, [detections(a[0, :, :-4], a[0, :, -4:]) for a in answers], classes)

    return score


def _drawing(
    images: Sequence[StoredImage], found: Sequence[_Found], classes: Sequence[str], least: float
) -> Callable[[Sequence[np.ndarray]], bytes]:
    """Draws answers, as `_scorer` is given them, on the first images."""

    def picture(answers: Sequence[np.ndarray]) -> bytes:
        right = [[(o["class"], o["box"]) for o in _written(own, classes)] for own in found[:IMAGES]]
        said = [_named(a[0], own.size, classes, least) for a, own in zip(answers[:IMAGES], found[:IMAGES], strict=True)]
        labelled = [[(f"{o['class']} {o['score']:.2f}", o["box"]) for o in reversed(one)] for one in said]
        return detections_png(images[:IMAGES], right, labelled, least=least)

    return picture


def _named(answer: np.ndarray, size: tuple[int, int], classes: Sequence[str], least: float) -> list[dict[str, Any]]:
    """The objects that a detector names in an image, the likeliest first; boxes in pixels: left, top, width, height."""
    scores, kinds, boxes = detections(answer[:, :-4], answer[:, -4:])
    order = [i for i in np.argsort(-scores, kind="stable").tolist() if scores[i] >= least]
    boxes = boxes * np.array([*size, *size])
    return [{"class": classes[int(kinds[i])], "score": round(float(scores[i]), 4), "box": boxes[i].round(2).tolist()} for i in order]


def _written(found: _Found, classes: Sequence[str]) -> list[dict[str, Any]]:
    pairs = zip(found.objects.classes, found.objects.boxes, strict=True)
    return [{"class": classes[int(kind)], "box": [round(float(x), 2) for x in box]} for kind, box in pairs]
