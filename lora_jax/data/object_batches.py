"""Batches of images with objects in them: as of images, and for each image the classes and boxes of its objects."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .batching import Batch, Painter
from .coco import Objects
from .image_batches import ImageExamples, ImagePlan, LazyBatches, crop_window

# Numbers of an object: whether it is one, its class, and centre x, centre y, width and height in [0, 1].
WIDTH = 6


@dataclasses.dataclass(frozen=True)
class ObjectExamples(ImageExamples):
    """Images with objects; all of an image is seen, or of a random crop, so that its sides may be stretched.

    Attributes:
        objects: of each image.
        sizes: (width, height) of each, in the pixels that boxes are in.
        most: how many objects there is room for.
        visible: share of an object's box that a random crop must leave for the object to count; its box is then what is left.
    """

    objects: Sequence[Objects] = ()
    sizes: Sequence[tuple[int, int]] = ()
    most: int = 1
    visible: float = 0.0

    @classmethod
    def of(
        cls,
        images: ImageExamples,
        objects: Sequence[Objects],
        sizes: Sequence[tuple[int, int]],
        *,
        most: int,
        visible: float = 0.0,
        picture: Painter | None = None,
    ) -> ObjectExamples:
        """Images with what is in them."""
        own: dict[str, Any] = {field.name: getattr(images, field.name) for field in dataclasses.fields(images)}
        own["picture"] = picture
        return cls(**own, objects=objects, sizes=sizes, most=most, visible=visible)

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits of all that is learned of."""
        whole = hashlib.sha256(ImageExamples.digest.func(self).encode())
        for found in self.objects:
            for array in (found.classes, found.boxes, found.crowd):
                whole.update(array.tobytes())
        if self.augment.crop is not None:
            whole.update(repr(self.visible).encode())
        return whole.hexdigest()[:16]

    def take(self, chosen: Sequence[int]) -> ObjectExamples:
        """The examples at these indices, without what scores them all."""
        own = {name: [getattr(self, name)[i] for i in chosen] for name in ("images", "objects", "sizes")}
        return dataclasses.replace(self, **own, classes=self.classes[list(chosen)], score=None, picture=None)

    def values(self, index: int, seed: Sequence[int] | None = None) -> np.ndarray:
        """(most * WIDTH,) float32: the objects of an image, as it is seen with this seed; boxes around groups are left out."""
        found, (width, height), kept = self.objects[index], self.sizes[index], ~self.objects[index].crowd
        boxes, flipped = found.boxes, False
        if seed is not None:
            # What `augmented` draws with the seed, in the same order.
            random = np.random.default_rng(np.random.SeedSequence(list(seed)))
            window = None if self.augment.crop is None else crop_window((width, height), self.augment.crop, random)
            if window is not None:
                left, top, width, height = window
                boxes, share = _within(boxes - np.array([left, top, 0, 0], np.float32), (width, height))
                kept = kept & (share > 0) & (share >= self.visible)
            flipped = self.augment.flip > 0 and random.random() < self.augment.flip
        boxes = boxes / np.array([width, height, width, height], np.float32)
        boxes = np.concatenate([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], axis=1)
        boxes[:, 0] = 1 - boxes[:, 0] if flipped else boxes[:, 0]
        rows = np.concatenate([np.ones((len(found), 1)), found.classes[:, None], boxes], axis=1)[kept]
        return np.pad(rows, [(0, self.most - len(rows)), (0, 0)]).astype(np.float32).reshape(-1)

    def described(self, index: int) -> str:
        """An example in a line, for a person to read."""
        return f"{ImageExamples.described(self, index)}, {len(self.objects[index])} objects"


def _within(boxes: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """What of boxes (n, 4), left, top, width and height, lies in an image of this (width, height); and its share of each box (n,)."""
    least = np.clip(boxes[:, :2], 0, size)
    sides = np.clip(boxes[:, :2] + boxes[:, 2:], 0, size) - least
    return np.concatenate([least, sides], axis=1).astype(np.float32), sides.prod(1) / boxes[:, 2:].prod(1)


class ObjectPlan(ImagePlan):
    """The batches of a run over `ObjectExamples`: those of an `ImagePlan`, and `target_values`, (targets, most * WIDTH) float32."""

    _train: ObjectExamples
    _held_out: ObjectExamples

    def batch(self, step: int) -> Batch:
        """The batch of a 0-based step; its arrays have a leading micro-batch axis."""
        epoch, chosen = self._chosen(int(step))
        found = np.stack([self._train.values(i, [self._seed, epoch, i]) for i in chosen.tolist()])
        return super().batch(step) | {"target_values": np.stack([self._filled(part) for part in np.split(found, self._accumulate)])}

    def eval_batches(self, examples: ImageExamples | None = None) -> Sequence[Batch]:
        """Every held-out example (or those given) exactly once, in order, without the micro axis."""
        of, groups = examples or self._held_out, self.eval_groups(examples)
        assert isinstance(of, ObjectExamples)
        plain = super().eval_batches(examples)

        def make(number: int) -> Batch:
            return plain[number] | {"target_values": self._filled(np.stack([of.values(i) for i in groups[number].tolist()]))}

        return LazyBatches(range(len(groups)), make)

    def _filled(self, values: np.ndarray) -> np.ndarray:
        return np.pad(values, [(0, self.targets - len(values)), (0, 0)])
