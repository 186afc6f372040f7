"""Batches of images: one image a row, as bytes; where steps change them at random, by the run's seed, the epoch and the image alone.

So any batch can be made from its step number, a resumed run sees the same pixels, and so does every member of a pack.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..errors import InputError
from ..weights.pixels import INTERPOLATIONS, PixelSpec
from .batching import DATA_ORDER, Batch, Painter, Scorer
from .images import StoredImage, fitted, values_of
from .order import epoch_order


@dataclasses.dataclass(frozen=True)
class Augment:
    """How training steps change images at random.

    Attributes:
        crop: least and largest share of the area that is cut out, at a ratio of sides from 3:4 to 4:3, and resized (Inception's crop);
            None: the centre, as in evaluations.
        flip: probability of being mirrored.
        jitter: brightness, contrast and saturation are each multiplied by a number of 1 +- this.
        mixup: a of Beta(a, a), by which the shares of two images of a step are drawn (arXiv:1710.09412); 0: none.
    """

    crop: tuple[float, float] | None = None
    flip: float = 0.0
    jitter: float = 0.0
    mixup: float = 0.0

    @property
    def varies(self) -> bool:
        """Whether it changes anything."""
        return self.crop is not None or self.flip > 0 or self.jitter > 0 or self.mixup > 0


class ImageCache:
    """Decoded images, up to a limit; what is beyond it is decoded whenever it is needed.

    Args:
        limit: in bytes.
        in_file: whether they lie in an unnamed file of the temporary folder; else in memory.
    """

    def __init__(self, limit: int, *, in_file: bool = False):
        self._limit, self._used, self._lock = limit, 0, threading.Lock()
        self._file = tempfile.TemporaryFile() if in_file else None  # noqa: SIM115 - open as long as the cache is
        self._kept: dict[tuple[int, str], tuple[StoredImage, Any]] = {}

    def get(self, image: StoredImage, kind: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What `make` gives for an image, kept by the image and by what it is made into."""
        found = self._kept.get((id(image), kind))
        if found is not None:
            return found[1] if self._file is None else self._read(*found[1])
        array = make()
        with self._lock:
            if self._used + array.nbytes <= self._limit and (id(image), kind) not in self._kept:
                kept: Any = array
                if self._file is not None:
                    os.pwrite(self._file.fileno(), array.tobytes(), self._used)
                    kept = self._used, array.shape
                self._kept[id(image), kind] = image, kept  # with the image, so that its id stays its own
                self._used += array.nbytes
        return array

    def _read(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        assert self._file is not None
        return np.frombuffer(os.pread(self._file.fileno(), math.prod(shape), offset), np.uint8).reshape(shape)


@dataclasses.dataclass(frozen=True)
class ImageExamples:
    """Images with a class each, with the face of `Examples`.

    Attributes:
        images: as they are stored.
        classes: (n,) int32.
        spec: what they become.
        length: positions that an image has in the model.
        cache: of what is decoded.
        augment: of training steps.
        score: the task's own metrics.
        picture: shows a few images with answers.
        workers: threads that decode.
    """

    images: list[StoredImage]
    classes: np.ndarray
    spec: PixelSpec
    length: int
    cache: ImageCache
    augment: Augment = Augment()
    score: Scorer | None = None
    workers: int = 4
    picture: Painter | None = None
    prompts = types = values = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def varies(self) -> bool:
        """Whether a training step sees an image otherwise than the step of another epoch."""
        return self.augment.varies

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits of all that is learned of: how images are prepared, each image, and its class."""
        whole = hashlib.sha256(repr((self.spec, self.augment)).encode() + self.classes.tobytes())
        for image in self.images:
            whole.update(image.digest.encode())
        return whole.hexdigest()[:16]

    @property
    def target_counts(self) -> np.ndarray:
        """(n,) int64: one each."""
        return np.ones(len(self), np.int64)

    def wanted(self, index: int) -> np.ndarray:
        """(1,) int32: the class."""
        return self.classes[index : index + 1]

    def take(self, chosen: Sequence[int]) -> ImageExamples:
        """The examples at these indices, without what scores them all."""
        return dataclasses.replace(
            self, images=[self.images[i] for i in chosen], classes=self.classes[list(chosen)], score=None, picture=None
        )

    def pixels(self, index: int) -> np.ndarray:
        """(height, width, channels) uint8: an image as evaluations see it."""
        image = self.images[index]
        return self.cache.get(image, "fitted", lambda: values_of(fitted(image.decode(self.spec.channels), self.spec)))

    def augmented(self, index: int, seed: Sequence[int]) -> np.ndarray:
        """The same as a training step sees it; the seed says all that is drawn."""
        augment, random = self.augment, np.random.default_rng(np.random.SeedSequence(list(seed)))
        if augment.crop is not None:
            image = self.images[index]
            whole = self.cache.get(image, "whole", lambda: values_of(image.decode(self.spec.channels)))
            values = values_of(_random_crop(_picture(whole), augment.crop, self.spec, random))
        else:
            values = self.pixels(index)
        if augment.flip and random.random() < augment.flip:
            values = values[:, ::-1]
        return _jittered(values, augment.jitter, random) if augment.jitter else values

    @staticmethod
    def spans(batch: Mapping[str, np.ndarray]) -> Iterator[tuple[int, int, bytes]]:
        """Where the positions of each image of a batch start and stop when they are flattened, and a digest of its pixels."""
        length = batch["segment_ids"].shape[-1]
        real = batch["segment_ids"].reshape(-1, length)[:, 0] > 0
        pixels = batch["pixels"].reshape(-1, *batch["pixels"].shape[-3:])
        for row in np.flatnonzero(real).tolist():
            yield row * length, (row + 1) * length, _name(pixels[row])

    def named(self) -> Iterator[tuple[bytes, int]]:
        """Of every image the same digest, and how many positions it has."""
        return ((_name(self.pixels(i)), self.length) for i in range(len(self)))

    def described(self, index: int) -> str:
        """An example in a line, for a person to read."""
        height, width, channels = self.pixels(index).shape
        return f"{self.images[index].name}: {height} x {width} x {channels}, {self.length} positions"


def _name(pixels: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=16).digest()


def _picture(values: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(values[..., 0] if values.shape[-1] == 1 else np.ascontiguousarray(values))


def _random_crop(image: Any, area: tuple[float, float], spec: PixelSpec, random: np.random.Generator) -> Any:
    """A random part of an image, resized to `spec.size`."""
    window = crop_window(image.size, area, random)
    if window is None:
        return fitted(image, spec)
    left, top, width, height = window
    size = spec.size[1], spec.size[0]
    return image.resize(size, INTERPOLATIONS.index(spec.interpolation), (left, top, left + width, top + height))


def crop_window(size: tuple[int, int], area: tuple[float, float], random: np.random.Generator) -> tuple[int, int, int, int] | None:
    """Left, top, width and height of a random part of an image; None of one so long that no such part fits.

    Args:
        size: (width, height) of the image.
        area: as `Augment.crop`.
    """
    for _ in range(10):
        share, ratio = random.uniform(*area) * size[0] * size[1], math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(share * ratio)), round(math.sqrt(share / ratio))
        if 0 < width <= size[0] and 0 < height <= size[1]:
            return int(random.integers(size[0] - width + 1)), int(random.integers(size[1] - height + 1)), width, height
    return None


def _jittered(values: np.ndarray, most: float, random: np.random.Generator) -> np.ndarray:
    from PIL import ImageEnhance

    image = _picture(values)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[: 3 if values.shape[-1] == 3 else 2]:
        image = change(image).enhance(random.uniform(max(0.0, 1 - most), 1 + most))
    return values_of(image)


class LazyBatches(Sequence[Batch]):
    """Batches that are made when they are asked for: all of an evaluation's images at once could fill the memory."""

    def __init__(self, groups: Sequence[Any], make: Callable[[Any], Batch]):
        self._groups, self._make = groups, make

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: Any) -> Any:
        found = self._groups[index]
        return [self._make(group) for group in found] if isinstance(index, slice) else self._make(found)


class ImagePlan:
    """The batches of a run over images, with the face of a `BatchPlan`, whose arguments these are.

    A batch holds `pixels`, (rows, height, width, channels) uint8; `segment_ids`, (rows, length) int32, 1 at the positions of an image and
    0 in rows without one; and for each target `target_index`, the first of the flattened positions of its image, `target_ids` and
    `target_weights`. With mixup an image has two targets, whose weights add up to 1.
    """

    order = DATA_ORDER

    def __init__(
        self,
        train: ImageExamples,
        held_out: ImageExamples,
        *,
        batch_size: int,
        accumulate: int = 1,
        batching: str = "packed",
        seed: int = 0,
        per_example: bool = True,
        row_multiple: int = 1,
        steps: int | None = None,
        epochs: float | None = None,
        extra_steps: int = 0,
        test: ImageExamples | None = None,
    ):
        if batch_size > len(train):
            raise InputError(f"training.batch_size: {batch_size}, but there are only {len(train)} training examples.")
        self._train, self._held_out, self._seed, self._accumulate = train, held_out, seed, accumulate
        self.micro_batch = batch_size // accumulate
        self.rows, self.length = -(-self.micro_batch // row_multiple) * row_multiple, train.length
        self.targets = self.micro_batch * (2 if train.augment.mixup else 1)
        self.steps_per_epoch = len(train) // batch_size
        self.steps = (steps if steps is not None else max(1, round((epochs or 0) * self.steps_per_epoch))) + extra_steps
        self._epoch = functools.lru_cache(maxsize=4)(lambda epoch: epoch_order(len(train), seed=seed, epoch=epoch))
        self._pool = ThreadPoolExecutor(train.workers)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps `start` to `stop` (exclusive), made ahead in the background."""
        import grain  # slow to import, and only a run needs it

        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        yield from grain.MapDataset.range(start, stop).map(self.batch).to_iter_dataset(options)

    def batch(self, step: int) -> Batch:
        """The batch of a 0-based step; its arrays have a leading micro-batch axis."""
        epoch, chosen = self._chosen(int(step))
        seeds = [[self._seed, epoch, i] for i in chosen.tolist()]
        pixels = np.stack(list(self._pool.map(self._train.augmented, chosen.tolist(), seeds)))
        ids, weights = self._train.classes[chosen][:, None], np.ones((len(chosen), 1), np.float32)
        if self._train.augment.mixup:
            pixels, ids, weights = self._mixed(pixels, ids[:, 0], step)
        cut = [np.split(array, self._accumulate) for array in (pixels, ids, weights)]
        micros = [self._assembled(*arrays) for arrays in zip(*cut, strict=True)]
        return {name: np.stack([m[name] for m in micros]) for name in micros[0]}

    def eval_batches(self, examples: ImageExamples | None = None) -> Sequence[Batch]:
        """Every held-out example (or those given) exactly once, in order, without the micro axis."""
        of = examples or self._held_out

        def make(group: np.ndarray) -> Batch:
            pixels = np.stack(list(self._pool.map(of.pixels, group.tolist())))
            return self._assembled(pixels, of.classes[group][:, None], np.ones((len(group), 1), np.float32))

        return LazyBatches(self.eval_groups(of), make)

    def eval_groups(self, examples: ImageExamples | None = None) -> list[np.ndarray]:
        """Which examples are in each of `eval_batches`."""
        count = len(examples or self._held_out)
        return [np.arange(i, min(i + self.micro_batch, count)) for i in range(0, count, self.micro_batch)]

    def seen(self) -> ImageExamples:
        """The training examples that the run's batches hold, each once, in the order of the data."""
        whole = [self._epoch(epoch)[: self.steps_per_epoch * self._step_size] for epoch in range(-(-self.steps // self.steps_per_epoch))]
        rest = self.steps - (len(whole) - 1) * self.steps_per_epoch
        whole[-1] = whole[-1][: rest * self._step_size]
        return self._train.take(np.unique(np.concatenate(whole)).tolist())

    @property
    def summary(self) -> dict[str, float]:
        """As of a `BatchPlan`: nothing is padded, but for rows that devices share."""
        padding = 1 - self.micro_batch / self.rows
        shape = {"rows": self.rows, "length": self.length, "tokens_per_step": float(self._step_size * self.length)}
        return shape | {"padding_share": padding, "dynamic_padding_share": padding}

    @property
    def _step_size(self) -> int:
        return self.micro_batch * self._accumulate

    def _chosen(self, step: int) -> tuple[int, np.ndarray]:
        """The epoch of a step, and the examples it has."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch, self._epoch(epoch)[within * self._step_size : (within + 1) * self._step_size]

    def _mixed(self, pixels: np.ndarray, classes: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each image with a share of another of the step: pixels, (n, 2) classes and (n, 2) shares."""
        random = np.random.default_rng(np.random.SeedSequence([self._seed, int(step), 0x313]))
        other, share = random.permutation(len(classes)), random.beta(*[self._train.augment.mixup] * 2, size=len(classes)).astype(np.float32)
        own = share[:, None, None, None]
        blend = np.rint(own * pixels + (1 - own) * pixels[other]).astype(np.uint8)
        return blend, np.stack([classes, classes[other]], 1), np.stack([share, 1 - share], 1)

    def _assembled(self, pixels: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> Batch:
        """The arrays of one micro-batch; `ids` and `weights` are (images, targets of each)."""
        count, each = ids.shape
        rows, filler = self.rows - count, self.targets - count * each
        segments = np.zeros((self.rows, self.length), np.int32)
        segments[:count] = 1
        return {
            "pixels": np.pad(pixels, [(0, rows), *[(0, 0)] * 3]),
            "segment_ids": segments,
            "target_index": np.pad(np.repeat(np.arange(count) * self.length, each), (0, filler)).astype(np.int32),
            "target_ids": np.pad(ids.reshape(-1), (0, filler)).astype(np.int32),
            "target_weights": np.pad(weights.reshape(-1), (0, filler)).astype(np.float32),
        }
