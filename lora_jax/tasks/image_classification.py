"""One class for each image, by a head over a vision transformer or a convolutional net."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ..config.doors import TASKS
from ..config.types import NonNegativeFloat
from ..data.image_batches import Augment, ImageExamples, ImagePlan
from ..data.images import load_images
from ..data.sources import HELD_OUT, ROW, TEST, Table, Taken
from ..errors import InputError
from ..models.vision import VisionBase
from .base import Columns, Encoded, Prediction, Rows, TaskData, TaskMetrics, ToAnswer
from .classification import Labelled, class_f1
from .evaluators import Evaluator, register
from .images import ImagesConfig, Reader, pixel_spec
from .prepare import Part, split

register(Evaluator("top5_accuracy", True, percent=True))
TOP5 = 5


class ImageClassificationConfig(ImagesConfig):
    kind: Literal["image_classification"] = Field(default="image_classification", description="A class for each image.")
    image: str = Field(default="image", description="Image column of a table: files' bytes, paths, or datasets' Image.")
    label: str = Field(default="label", description="Label column of a table. In a folder of folders, their names are the labels.")
    labels: list[str] | None = Field(default=None, description="Class names in order. Default: those in the data, sorted.")
    mixup: NonNegativeFloat = Field(default=0.0, description="Mixup (arXiv:1710.09412): a of Beta(a, a). 0: off.")

    @property
    def augment(self) -> Augment:
        """What changes images at random."""
        return dataclasses.replace(super().augment, mixup=self.mixup)


class ImageClassification(Labelled):
    """A class for each image."""

    name, section, head, targets = "image_classification", ImageClassificationConfig, "image_classification", 1
    tokenized = False

    def columns(self, section: ImageClassificationConfig) -> Columns:
        """Images and labels."""
        return Columns((section.image, section.label), targets=(section.label,), nonempty=(section.label,))

    def encode(self, section: Any, rows: Rows, tokenizer: Any, *, decoder: bool, classes: tuple[str, ...] | None) -> Encoded:
        """Images are not read with a tokenizer.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"the task '{self.name}' reads no texts")

    def metrics(self, section: ImageClassificationConfig, classes: tuple[str, ...] | None) -> TaskMetrics:
        """Accuracy, and whether the right class is among five where there are more; recorded are the classes' F1 and the confusion."""
        more = ("top5_accuracy",) if classes is not None and len(classes) > TOP5 else ()
        tables = ("confusion", "class_f1")
        return TaskMetrics(("loss", "accuracy", *more, "macro_f1"), "accuracy", training=("accuracy",), tables=tables)

    def check_base(self, section: ImageClassificationConfig, base: Any, source: str) -> None:
        """The base is one over images, and takes images of this size."""
        if not isinstance(base, VisionBase):
            raise InputError(f"model.source: {source} is no model over images, which task.kind: {self.name} needs.")
        spec = pixel_spec(section, base)
        if min(spec.size) < base.smallest:
            raise InputError(
                f"task.image_size: {spec.size[0]} x {spec.size[1]} pixels are too few: the model takes {base.smallest} or more."
            )

    def own_data(self, section: ImageClassificationConfig, base: Any, known: tuple[str, ...]) -> TaskData:
        """Images of the sources, split; each is decoded once here, so that a broken one shows before anything is trained."""
        reader = Reader(section, base)

        def load(source: str, key: str, splits: tuple[str, ...], renamed: Mapping[str, str]) -> tuple[Rows, Table]:
            options = {"splits": splits, "drop": section.drop, "renamed": renamed}
            table = load_images(source, key=key, image=section.image, label=section.label, **options)
            return reader.kept(table, source, key, section.image)

        parts, tables = split(self, section, load)
        training = parts[0]
        classes = self.classes(section, training.rows, known)
        for part in parts[1:]:
            if part.key != training.key:
                self.check_held_out(section, part.rows, classes)
        metrics = self.metrics(section, classes)
        notes = [*(table.note for table in tables.values()), *(note for part in parts for note in part.notes), *reader.notes]

        def examples(part: Part) -> tuple[ImageExamples, Taken]:
            rows = part.rows.take(part.at)
            ids = np.array([classes.index(label) for label in rows.columns[section.label]], np.int32)
            missing = [name for i, name in enumerate(classes) if i not in set(ids.tolist())]
            if missing:
                shown = ", ".join(missing[:6]) + (", ..." if len(missing) > 6 else "")
                notes.append(f"{part.name}: no image of {len(missing)} of the {len(classes)} classes: {shown}.")
            own = section.augment if part is training else Augment()
            made = reader.examples(rows.columns[section.image], ids, own, _scorer(ids, len(classes)))
            beside = 0 if part is not training else sum(len(other.at) for other in parts[1:] if other.key == training.key)
            dropped = dict(tables[part.key].dropped) if part is training or part.key != training.key else {}
            counts = {"others": part.others, "sampled": len(part.at) < len(part.rows) - beside}
            return made, Taken(part.name, part.rows.source, len(part.rows), len(part.at), 0, dropped, **counts)

        made = [examples(part) for part in parts]
        test = made[2][0] if len(made) > 2 else None
        every: list[Any] = [one[0] for one in made]
        taken, said = tuple(one[1] for one in made), tuple(dict.fromkeys(note for note in notes if note))
        return TaskData(every[0], every[1], metrics, classes, None, True, taken, said, test, batches=ImagePlan)  # pyright: ignore[reportArgumentType]

    def rows_to_answer(self, section: ImageClassificationConfig, base: Any, source: str, classes: tuple[str, ...] | None) -> ToAnswer:
        """Images of a source, with or without labels; what is broken is answered with nothing where `skip_broken` says so."""
        assert classes is not None
        reader = Reader(section, base)
        table = load_images(source, key="--source", image=section.image, label=section.label, splits=TEST + HELD_OUT, labelled=False)
        images, labels = table[section.image], table.columns.get(section.label)
        if labels is not None:
            self.check_held_out(section, Rows(source, {section.label: labels}, np.array(table[ROW])), classes)
        broken = reader.broken(images, "--source")
        there = [i for i, error in enumerate(broken) if error is None]
        ids = np.array([classes.index(labels[i]) if labels is not None else 0 for i in there], np.int32)

        def predictions(answers: list[np.ndarray]) -> list[Prediction]:
            given = {i: classes[int(answer[0][0])] for i, answer in zip(there, answers, strict=True)}
            right = labels or [None] * len(images)
            scores = [None if label is None else float(given.get(i) == label) for i, label in enumerate(right)]
            return [Prediction(image.name, given.get(i), right[i], scores[i]) for i, image in enumerate(images)]

        examples = reader.examples([images[i] for i in there], ids, Augment(), None)
        return ToAnswer(np.array(table[ROW]), labels is not None, examples, ImagePlan, predictions)


TASKS.register("image_classification", ImageClassification())


def _scorer(right: np.ndarray, classes: int) -> Callable[[Sequence[np.ndarray]], dict[str, Any]]:
    """Scores answers, the likeliest classes of each image: as `confusion_scorer`, and `top5_accuracy`.

    Args:
        right: (n,) the classes.
        classes: how many there are.
    """

    def score(answers: Sequence[np.ndarray]) -> dict[str, Any]:
        likeliest = np.stack([answer[0] for answer in answers])  # (n, up to five)
        counts = np.zeros((classes, classes), np.int64)
        np.add.at(counts, (right, likeliest[:, 0]), 1)
        f1, top5 = class_f1(counts), float((likeliest == right[:, None]).any(1).mean())
        return {"macro_f1": float(np.nanmean(f1)), "confusion": counts, "class_f1": f1, "top5_accuracy": top5}

    return score
