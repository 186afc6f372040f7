"""Images of a source: where each lies, what its pixels are, and how they get the size that a model takes. Pillow decodes.

A source is a folder with a folder for each class (or `train`, `val`, ... with these), a folder of images without classes, a table
(.parquet, .jsonl, .csv, hub) with a column of images, NumPy arrays (.npz, .npy) or MNIST's idx files.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import re
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..weights.load import resolve
from ..weights.pixels import INTERPOLATIONS, PixelSpec
from .files import as_text, kind_of
from .sources import HELD_OUT, ROW, TRAINING, Table, load_rows

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jfif")
_ARRAYS = (".npz", ".npy")
_IDX = re.compile(r"(?P<start>.*)images[-.]idx3-ubyte(?P<gz>\.gz)?")


class BrokenImage(InputError):
    """An image that cannot be decoded."""


@dataclasses.dataclass(frozen=True, eq=False)
class StoredImage:
    """An image as its source has it.

    Attributes:
        name: for messages.
        path: of its file, where it has one.
        data: an encoded file's bytes, or decoded values (height, width) or (height, width, channels), otherwise.
    """

    name: str
    path: Path | None = None
    data: bytes | np.ndarray | None = None

    def __str__(self) -> str:
        """A digest of what it shows: equal images are copies of one another."""
        return self.digest

    @property
    def digest(self) -> str:
        """32 hex digits of its bytes."""
        if isinstance(self.data, np.ndarray):
            whole = f"{self.data.shape} {self.data.dtype}".encode() + np.ascontiguousarray(self.data).tobytes()
        else:
            whole = self._bytes()
        return hashlib.blake2b(whole, digest_size=16).hexdigest()

    def _bytes(self) -> bytes:
        if isinstance(self.data, bytes):
            return self.data
        assert self.path is not None
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise BrokenImage(f"{self.name}: cannot be read ({error.strerror}).") from None

    def decode(self, channels: int) -> Any:
        """The image for Pillow, upright, grey (`L`) for one channel and else `RGB`.

        Transparency is left out. Of 16 bits a channel the upper 8 are taken, rounded.

        Raises:
            BrokenImage: it is damaged, or of a kind that is not supported.
        """
        from PIL import Image, ImageOps

        mode = "L" if channels == 1 else "RGB"
        if isinstance(self.data, np.ndarray):
            return Image.fromarray(_eight_bits(self.data, self.name)).convert(mode)
        try:
            with Image.open(io.BytesIO(self._bytes())) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):  # whole numbers of 16 or 32 bits, which Pillow would cut off at 255
                    return Image.fromarray(_eight_bits(np.asarray(image), self.name)).convert(mode)
                if image.mode == "F":
                    return Image.fromarray(_eight_bits(np.asarray(image), self.name)).convert(mode)
                return image.convert(mode)
        except InputError:
            raise
        except Exception as error:  # Pillow's decoders raise many unrelated kinds
            raise BrokenImage(f"{self.name}: no image that can be decoded ({_reason(error)}).") from None


def _reason(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":
        return "it is of no format that is known"
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:120]


def _eight_bits(values: np.ndarray, name: str) -> np.ndarray:
    """Values as uint8: 16 bits are rounded to 8, floats are fractions of white."""
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[-1] not in (3, 4)) or not values.size:
        raise BrokenImage(f"{name}: an array of shape {values.shape} is no image (height, width) or (height, width, 1, 3 or 4).")
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    least, most = float(values.min()), float(values.max())
    if np.issubdtype(values.dtype, np.floating) and least >= 0 and most <= 1:
        return np.rint(values * 255).astype(np.uint8)
    if np.issubdtype(values.dtype, np.integer) and least >= 0 and most < 2**16:
        # Whole numbers wider than a byte: 16 bits, unless they were only stored so.
        wide = values.dtype in (np.dtype(np.uint16), np.dtype(">u2")) or most > 255
        return np.rint(values / 257).astype(np.uint8) if wide else values.astype(np.uint8)
    raise BrokenImage(f"{name}: values from {least:g} to {most:g} of {values.dtype}; bytes, 16 bits or fractions 0 to 1 are expected.")


def fitted(image: Any, spec: PixelSpec) -> Any:
    """A Pillow image as a model takes it: resized, and the centre cut out."""
    height, width = spec.resized
    if not spec.squash:
        scale = max(height / image.height, width / image.width)  # so that nothing of the crop is beyond the image
        short = min(image.width, image.height)
        if height == width:  # the long side is rounded down, as transformers does
            height, width = height * image.height // short, width * image.width // short
        else:
            height, width = max(height, int(image.height * scale)), max(width, int(image.width * scale))
    if (image.height, image.width) != (height, width):
        image = image.resize((width, height), INTERPOLATIONS.index(spec.interpolation))
    top, left = (height - spec.size[0]) // 2, (width - spec.size[1]) // 2
    return image.crop((left, top, left + spec.size[1], top + spec.size[0]))


def values_of(image: Any) -> np.ndarray:
    """(height, width, channels) uint8 of a Pillow image."""
    array = np.asarray(image, np.uint8)
    return array[..., None] if array.ndim == 2 else array


def load_images(
    source: str,
    *,
    key: str,
    image: str,
    label: str,
    splits: tuple[str, ...] = TRAINING,
    drop: dict[str, list[str]] | None = None,
    renamed: Mapping[str, str] | None = None,
    labelled: bool = True,
) -> Table:
    """The rows of a source: in the column `image` a `StoredImage` each, in `label` the name of its class.

    Args:
        source: see above; also `package://...` and `hf://org/name[@revision]`.
        key: the config key the source came from, for messages.
        image, label: columns of a table; of other sources they name what is found.
        splits: names, best first, of the split wanted of a source that has several.
        drop: as `task.drop`.
        renamed: what a table calls a column -> what it is called here.
        labelled: whether there must be labels; the table has no such column where there are none.

    Raises:
        InputError: nothing is there, it cannot be read, or there is no image, or no label.
    """
    if not source.startswith("hf://"):
        path = resolve(source, key=key)
        found = _plain_images(path, f"{key}: {source}", splits)
        if found is not None:
            images, labels, files = found
            if not images:
                raise InputError(f"{key}: {source} holds no image ({', '.join(SUFFIXES[:4])}, ...).")
            if labels is None and labelled:
                raise InputError(f"{key}: {source} holds images but no labels. Put those of each class into a folder of the class's name.")
            columns = {image: images} | ({} if labels is None else {label: labels})
            return _without_dropped(columns, drop or {}, label, files, source)
    optional = () if labelled else (label,)
    named = {image: "task.image", label: "task.label"}
    options = {"drop": drop, "splits": splits, "named_by": named, "optional": optional, "as_files": True, "renamed": renamed}
    table = load_rows(source, key=key, columns=[image, label], **options)
    folder = Path(table.files[0]).parent if not source.startswith("hf://") else Path()
    rows = zip(table[ROW], table[image], strict=True)
    table.columns[image] = [_cell(value, f"{key}: row {number} of {source}", folder) for number, value in rows]
    if label in table.columns:
        numbered = zip(table[ROW], table[label], strict=True)
        table.columns[label] = [_label(value, f"{key}: row {number} of {source}", label) for number, value in numbered]
    return table


def _label(value: Any, where: str, column: str) -> str:
    text = as_text(value)
    if text is None or text == "":
        raise InputError(f"{where} has no '{column}'.")
    return text


def _cell(value: Any, where: str, folder: Path) -> StoredImage:
    """A table's cell: bytes, a path, datasets' {bytes, path}, or a list of values."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return StoredImage(where, data=value)
    if isinstance(value, str) and value:
        path = Path(value) if Path(value).is_absolute() else folder / value
        if not path.is_file():
            raise InputError(f"{where}: no file '{path}'.")
        return StoredImage(f"{where} ({path})", path)
    if isinstance(value, list):
        return StoredImage(where, data=np.asarray(value))
    raise InputError(f"{where}: {'no value' if value is None else f'a {type(value).__name__}'} where an image should be.")


def _without_dropped(columns: dict[str, list[Any]], drop: dict[str, list[str]], label: str, files: Sequence[Path], source: str) -> Table:
    """The table of a source without other columns, less what `task.drop` names."""
    others = [column for column in drop if column != label]
    if others:
        raise InputError(f"task.drop: {source} has no column '{others[0]}'. Columns: {', '.join(columns)}.")
    labels, unwanted = columns.get(label, []), set(drop.get(label, ()))
    kept = [i for i in range(len(next(iter(columns.values())))) if not unwanted or labels[i] not in unwanted]
    if not kept:
        raise InputError(f"task.drop: drops every row of {source}.")
    dropped = Counter((label, value) for value in labels if value in unwanted)
    table = {name: [values[i] for i in kept] for name, values in columns.items()}
    values = {label: set(labels)} if drop else {}
    return Table(table | {ROW: [i + 1 for i in kept]}, dropped, values, tuple(str(f.resolve()) for f in files))


Found = tuple[list[StoredImage], list[str] | None, list[Path]]


def _plain_images(path: Path, where: str, splits: tuple[str, ...]) -> Found | None:
    """Images, labels and files of a source that is no table; None of one that is."""
    if path.is_file():
        if path.suffix.lower() in SUFFIXES:
            return [StoredImage(str(path), path)], None, [path]
        if path.suffix.lower() in _ARRAYS:
            return _arrays(path, where, splits)
        return _idx(path, where) if _IDX.fullmatch(path.name) else None
    inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    files = [p for p in inside if p.is_file()]
    idx = [p for p in files if _IDX.fullmatch(p.name)]
    if idx:
        words = [w for split in splits for w in (split, *(("t10k",) if split == "test" else ()))]
        chosen = next((p for word in words for p in idx if word in re.split(r"[^a-z0-9]+", p.name.lower())), None)
        if chosen is None and len(idx) > 1:
            raise InputError(f"{where}: none of {', '.join(p.name for p in idx)} is of the split {splits[0]}; name one file.")
        return _idx(chosen or idx[0], where)
    arrays = [p for p in files if p.suffix.lower() == ".npz"]
    if len(arrays) == 1 and not any(kind_of(p) for p in files):
        return _arrays(arrays[0], where, splits)
    folders = [p for p in inside if p.is_dir()]
    if not folders:
        images = [p for p in files if p.suffix.lower() in SUFFIXES]
        return ([StoredImage(str(p), p) for p in images], None, images) if images and not any(kind_of(p) for p in files) else None
    if any(kind_of(p) for p in files):
        return None
    of_split = {p.name.lower(): p for p in folders}
    if set(of_split) <= {*TRAINING, *HELD_OUT}:  # each holds the classes' folders
        chosen = next((of_split[s] for s in splits if s in of_split), None)
        if chosen is None:
            raise InputError(f"{where} holds no {splits[0]} folder, only {', '.join(p.name for p in folders)}; name one folder.")
        folders = sorted(p for p in chosen.iterdir() if p.is_dir() and not p.name.startswith("."))
    pairs = [(p, folder.name) for folder in folders for p in sorted(folder.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
    return [StoredImage(str(p), p) for p, _ in pairs], [name for _, name in pairs], [p for p, _ in pairs]


def _arrays(path: Path, where: str, splits: tuple[str, ...]) -> Found:
    """A .npy of images; a .npz with images and labels, under any of the usual names, or with a split's name in them (`x_train`)."""
    try:
        loaded = np.load(path, allow_pickle=False)
        held = {"images": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except Exception as error:  # a damaged archive raises many kinds
        raise InputError(f"{where}: cannot be read as {path.suffix[1:]} ({_reason(error)}).") from None
    if not isinstance(loaded, np.ndarray):
        loaded.close()

    def pick(words: Sequence[str]) -> np.ndarray | None:
        for split in (*splits, ""):
            for name, array in held.items():
                parts = set(re.split(r"[^a-z]+", name.lower())) - {""}
                if parts & set(words) and (split in parts if split else not parts & {*TRAINING, *HELD_OUT}):
                    return array
        return None

    images, labels = pick(("images", "image", "x", "data")), pick(("labels", "label", "y", "target", "targets"))
    if images is None or images.ndim not in (3, 4):
        shapes = ", ".join(f"{name} {array.shape}" for name, array in held.items())
        raise InputError(f"{where}: no array of images (count, height, width[, channels]) called images, x or data. It holds {shapes}.")
    if labels is not None and labels.shape != images.shape[:1]:
        raise InputError(f"{where}: {images.shape[0]} images, but labels of shape {labels.shape}.")
    stored = [StoredImage(f"image {i + 1} of {path}", data=array) for i, array in enumerate(images)]
    return stored, None if labels is None else [str(v) for v in labels.tolist()], [path]


def _idx(path: Path, where: str) -> Found:
    """MNIST's format: images in one file, labels in another beside it."""
    match = _IDX.fullmatch(path.name)
    assert match is not None
    images = _idx_array(path, 3, where)
    stored = [StoredImage(f"image {i + 1} of {path}", data=array) for i, array in enumerate(images)]
    wanted = path.name.replace("images", "labels").replace("idx3", "idx1")
    names = (wanted, wanted.removesuffix(".gz"), wanted.removesuffix(".gz") + ".gz")
    beside = next((path.parent / name for name in names if (path.parent / name).is_file()), None)
    if beside is None:
        return stored, None, [path]
    labels = _idx_array(beside, 1, where)
    if len(labels) != len(images):
        raise InputError(f"{where}: {len(images)} images in {path.name}, {len(labels)} labels in {beside.name}.")
    return stored, [str(v) for v in labels.tolist()], [path, beside]


def _idx_array(path: Path, axes: int, where: str) -> np.ndarray:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            whole = file.read()
        start = 4 + 4 * axes
        zero, kind, found = struct.unpack(">HBB", whole[:4])
        shape = struct.unpack(f">{axes}I", whole[4:start])
        if (zero, kind, found) != (0, 8, axes):
            raise ValueError(f"it does not begin as bytes with {axes} axes do")
        return np.frombuffer(whole, np.uint8, offset=start).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise InputError(f"{where}: {path.name} cannot be read as an idx file ({_reason(error)}).") from None


def check_images(images: Sequence[StoredImage], look: Callable[[StoredImage], Any], *, workers: int) -> list[BrokenImage | None]:
    """What is the matter with each image; all are looked at once, in threads.

    Args:
        look: decodes one, or raises `BrokenImage`.
    """

    def one(image: StoredImage) -> BrokenImage | None:
        try:
            look(image)
        except BrokenImage as error:
            return error
        return None

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, images))
