"""Object detection data in COCO's JSON form: images, annotations with a box each, and categories."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..weights.checkpoint import read_json


@dataclasses.dataclass(frozen=True)
class Objects:
    """What is to be found in one image.

    Attributes:
        classes: (n,) int32, indices of the class names.
        boxes: (n, 4) float32, left, top, width, height in pixels of the image as it is stored.
        areas: (n,) float32, in pixels: the annotation's `area`, which is a segment's where there is one.
        crowd: (n,) bool, whether the box is around a group; such boxes are not trained on, and no detection in them counts as wrong.
    """

    classes: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray

    def __len__(self) -> int:
        return len(self.classes)

    @classmethod
    def none(cls) -> Objects:
        """No object."""
        return _objects([])


@dataclasses.dataclass(frozen=True)
class CocoFile:
    """A file's images, in its order.

    Attributes:
        names: of the classes, in the order of their ids.
        images: path of each.
        sizes: (width, height) of each, in pixels, as the file says.
        objects: what is in each; an image without any is there too.
        notes: what was left out or changed.
    """

    names: tuple[str, ...]
    images: list[Path]
    sizes: list[tuple[int, int]]
    objects: list[Objects]
    notes: tuple[str, ...]


def read_coco(path: Path, key: str) -> CocoFile:
    """Reads COCO's JSON. The images' `file_name`s are relative to the file's folder, or to a folder `images` or `<name of the file>` in it.

    Boxes that reach beyond their image are cut to it. Those without an area are left out; both are counted in `notes`.

    Args:
        path: of the JSON file.
        key: the config key it came from, for messages.

    Raises:
        InputError: it is no such file, an id is unknown or stands twice, a box is no four finite numbers, or an image is not there.
    """
    found = read_json(path, "COCO annotations")
    where = f"{key}: {path}"
    for part in ("images", "annotations", "categories"):
        if not isinstance(found.get(part), list) or not all(isinstance(entry, dict) for entry in found[part]):
            raise InputError(f"{where}: has no list '{part}'; COCO's form has images, annotations and categories.")
    if not found["images"]:
        raise InputError(f"{where}: has no images.")
    categories = _by_id(found["categories"], "category", ("name",), where)
    order = sorted(categories)
    images = _by_id(found["images"], "image", ("file_name", "width", "height"), where)
    files, sizes = {}, {}
    for number, entry in images.items():
        files[number] = _image_path(path, str(entry["file_name"]), number, where)
        sizes[number] = (_side(entry, "width", number, where), _side(entry, "height", number, where))
    kept: dict[Any, list[tuple[int, list[float], float, bool]]] = {number: [] for number in images}
    empty = cut = 0
    for entry in _by_id(found["annotations"], "annotation", ("image_id", "category_id", "bbox"), where).values():
        number, image, category = entry["id"], entry["image_id"], entry["category_id"]
        if not isinstance(image, int | str) or image not in images:
            raise InputError(f"{where}: annotation {number} is of image {image!r}, and no image has this id.")
        if not isinstance(category, int | str) or category not in categories:
            known = ", ".join(f"{c} ({categories[c]['name']})" for c in order[:10])
            raise InputError(f"{where}: annotation {number} is of category {category!r}, and there is none. Categories: {known}.")
        box, changed = _box(entry["bbox"], sizes[image], f"{where}: annotation {number} (image {files[image].name})")
        if box is None:
            empty += 1
            continue
        cut += changed
        area = entry.get("area", box[2] * box[3])
        if isinstance(area, bool) or not isinstance(area, int | float) or not np.isfinite(area) or area < 0:
            raise InputError(f"{where}: annotation {number}: area must be a number from 0 on, got {area!r}.")
        kept[image].append((order.index(category), box, float(area), bool(entry.get("iscrowd", 0))))
    notes = []
    if empty:
        notes.append(f"{empty:,} boxes of {path.name} without an area left out")
    if cut:
        notes.append(f"{cut:,} boxes of {path.name} cut to their image")
    objects = [_objects(kept[number]) for number in images]
    names = tuple(str(categories[c]["name"]) for c in order)
    return CocoFile(names, list(files.values()), list(sizes.values()), objects, tuple(notes))


def _by_id(entries: list[dict[str, Any]], what: str, needed: tuple[str, ...], where: str) -> dict[Any, dict[str, Any]]:
    """id -> entry; `InputError` where an id is missing or stands twice, or a key is missing."""
    found: dict[Any, dict[str, Any]] = {}
    for place, entry in enumerate(entries):
        number = entry.get("id")
        if isinstance(number, bool) or not isinstance(number, int | str):
            raise InputError(f"{where}: {what} {place} of the list has no id.")
        if number in found:
            raise InputError(f"{where}: two entries have the {what} id {number}.")
        if missing := [name for name in needed if name not in entry]:
            raise InputError(f"{where}: {what} {number} has no '{missing[0]}'.")
        found[number] = entry
    return found


def _image_path(path: Path, name: str, number: Any, where: str) -> Path:
    for folder in (path.parent, path.parent / "images", path.parent / path.stem):
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{where}: image {number}: there is no file {path.parent / name}.")


def _side(entry: Mapping[str, Any], name: str, number: Any, where: str) -> int:
    value = entry[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{where}: image {number}: {name} must be a whole number from 1 on, got {value!r}.")
    return value


def _box(value: Any, size: tuple[int, int], where: str) -> tuple[list[float] | None, bool]:
    """A box within the image, None where nothing is left of it; and whether it had to be cut."""
    numbers = isinstance(value, list) and len(value) == 4 and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)
    if not numbers or not np.isfinite(value).all():
        raise InputError(f"{where}: bbox must be [left, top, width, height], got {value!r}.")
    if value[2] < 0 or value[3] < 0:
        raise InputError(f"{where}: bbox has a negative width or height: {value!r}.")
    left, top = max(float(value[0]), 0.0), max(float(value[1]), 0.0)
    right, bottom = min(float(value[0] + value[2]), size[0]), min(float(value[1] + value[3]), size[1])
    if right <= left or bottom <= top:
        return None, False
    box = [left, top, right - left, bottom - top]
    return box, not np.allclose(box, value, atol=1e-3)


def _objects(found: list[tuple[int, list[float], float, bool]]) -> Objects:
    classes, boxes, areas, crowd = zip(*found, strict=True) if found else ((), (), (), ())
    return Objects(
        np.array(classes, np.int32), np.array(boxes, np.float32).reshape(-1, 4), np.array(areas, np.float32), np.array(crowd, bool)
    )
