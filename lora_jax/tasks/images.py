"""What tasks over images share: their keys, and how a source's images are read for a base."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from ..config.types import Bytes, Fraction, PositiveInt, TaskConfig
from ..data.batching import Scorer
from ..data.image_batches import Augment, ImageCache, ImageExamples
from ..data.images import BrokenImage, StoredImage, check_images, fitted, values_of
from ..data.sources import ROW, Table
from ..errors import InputError
from ..models.vision import VisionBase
from ..weights.pixels import PixelSpec
from .base import HeadTaskConfig, Rows

# A list of two numbers.
TWO = Field(min_length=2, max_length=2)
Share = Annotated[float, Field(gt=0, le=1)]


class ImagesConfig(HeadTaskConfig):
    """The keys of every task over images."""

    image_size: PositiveInt | Annotated[list[PositiveInt], TWO] | None = Field(
        default=None, description="Side, or [height, width], in pixels that images are resized and cut to. Default: the model's own."
    )
    random_crop: Annotated[list[Share], TWO] | None = Field(
        default=None, description="In training, a random part of so large a share of the area, [least, most], resized. Default: none."
    )
    flip: Fraction = Field(default=0.0, description="In training, the probability that an image is mirrored.")
    color_jitter: Fraction = Field(default=0.0, description="In training, brightness, contrast and saturation change by up to this share.")
    cache_bytes: Bytes = Field(default=2 * 10**9, description="Decoded images that are kept, in bytes or as 2GB.")
    cache: Literal["memory", "file"] = Field(default="memory", description="Where they are kept; file: in the temporary folder.")
    workers: PositiveInt = Field(default=4, description="Threads that decode images.")
    skip_broken: bool = Field(default=False, description="Leave out images that cannot be decoded, and say how many, instead of an error.")

    @model_validator(mode="after")
    def _images(self) -> ImagesConfig:
        if self.max_length != TaskConfig.model_fields["max_length"].default:  # a written config has every key
            raise ValueError("'max_length' counts tokens of texts; for images give 'image_size'")
        if self.token_cache != TaskConfig.model_fields["token_cache"].default:
            raise ValueError("'token_cache' keeps tokens of texts; of images 'cache' and 'cache_bytes' say what is kept")
        if self.random_crop is not None and self.random_crop[0] > self.random_crop[1]:
            raise ValueError(f"'random_crop' is [least, most], got {self.random_crop}")
        return self

    @property
    def augment(self) -> Augment:
        """What changes images at random."""
        crop = None if self.random_crop is None else (self.random_crop[0], self.random_crop[1])
        return Augment(crop, self.flip, self.color_jitter)


def pixel_spec(section: ImagesConfig, base: VisionBase, *, whole: bool = False) -> PixelSpec:
    """How images are prepared: as the checkpoint says, at the size that the section asks for.

    Args:
        whole: nothing is cut off: the sides are stretched to the size.
    """
    size = section.image_size
    spec = base.pixels if size is None else base.pixels.at((size, size) if isinstance(size, int) else (size[0], size[1]))
    return dataclasses.replace(spec, crop_pct=1.0, squash=True) if whole else spec


class Reader:
    """Decodes a section's images for a base.

    Args:
        section: of the task.
        base: the model.
        whole: as in `pixel_spec`.

    Attributes:
        notes: what was left out.
    """

    def __init__(self, section: ImagesConfig, base: VisionBase, *, whole: bool = False):
        self._section, self.spec, self.notes = section, pixel_spec(section, base, whole=whole), list[str]()
        self._length = base.tokens(self.spec.size)
        self._cache = ImageCache(section.cache_bytes, in_file=section.cache == "file")

    def kept(self, table: Table, source: str, key: str, image: str) -> tuple[Rows, Table]:
        """The rows of a table whose images, in the column `image`, can be decoded; and the table."""
        broken = self.broken(table[image], key)
        lost = sum(error is not None for error in broken)
        if lost:
            first = next(error for error in broken if error is not None)
            self.notes.append(f"{key}: {lost} of {len(broken)} images are broken and left out (task.skip_broken), the first: {first}")
        keep = np.array([i for i, error in enumerate(broken) if error is None], np.int64)
        if not len(keep):
            raise InputError(f"{key}: none of the images of {source} can be decoded.")
        columns = {name: values for name, values in table.columns.items() if name != ROW}
        return Rows(source, columns, np.array(table[ROW])).take(keep), table

    def broken(self, images: Sequence[StoredImage], key: str) -> list[BrokenImage | None]:
        """What is the matter with each image; `InputError` for the first one unless the section skips them."""
        spec, whole = self.spec, self._section.augment.crop is not None

        def look(image: StoredImage) -> None:
            if whole:
                self._cache.get(image, "whole", lambda: values_of(image.decode(spec.channels)))
            else:
                self._cache.get(image, "fitted", lambda: values_of(fitted(image.decode(spec.channels), spec)))

        found = check_images(images, look, workers=self._section.workers)
        first = next((error for error in found if error is not None), None)
        if first is not None and not self._section.skip_broken:
            raise InputError(f"{key}: {first} task.skip_broken: true leaves such images out.")
        return found

    def examples(self, images: Sequence[StoredImage], ids: np.ndarray, augment: Augment, score: Scorer | None) -> ImageExamples:
        """Images as examples."""
        return ImageExamples(list(images), ids, self.spec, self._length, self._cache, augment, score, self._section.workers)
