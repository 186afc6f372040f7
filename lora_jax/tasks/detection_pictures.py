"""Detections drawn on images beside what is right: a few images in rows, as a PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np

from ..data.images import StoredImage

# How many images are drawn, how many stand in a row, and the pixels of a tile's side.
IMAGES, COLUMNS, SIDE = 6, 3, 400
RIGHT, SAID = (0, 92, 230), (235, 88, 0)  # blue and orange: told apart by nearly everyone, and on most images
_GAP, _LINE, _TEXT = 8, 18, 12

Drawn = tuple[str, tuple[float, float, float, float]]  # a label, and left, top, width, height in pixels of the image


def detections_png(
    images: Sequence[StoredImage], right: Sequence[Sequence[Drawn]], said: Sequence[Sequence[Drawn]], *, least: float
) -> bytes:
    """Images with their objects' boxes, labels below them, and with the boxes of detections, labels above them.

    Args:
        images: as they are stored.
        right: of each image the objects in it.
        said: of each image what was detected.
        least: the score of detections that are shown, for the legend.
    """
    from PIL import Image, ImageDraw, ImageFont

    font: Any = ImageFont.load_default(_TEXT)
    tiles = [_tile(image, wanted, given, font) for image, wanted, given in zip(images, right, said, strict=True)]
    columns = min(COLUMNS, len(tiles))
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) + _LINE + _GAP for row in rows]
    whole = Image.new("RGB", (columns * (SIDE + _GAP) + _GAP, sum(heights) + _LINE + 2 * _GAP), "white")
    draw, left, top = ImageDraw.Draw(whole), _GAP, _GAP
    for text, color in (("annotated", RIGHT), (f"detected, with a score of {least:g} or more", SAID)):
        draw.rectangle((left, top + 2, left + _TEXT, top + 2 + _TEXT), outline=color, width=3)
        draw.text((left + _TEXT + 6, top), text, "black", font)
        left += _TEXT + 6 + round(draw.textlength(text, font)) + 3 * _GAP
    top += _LINE + _GAP
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        for column, tile in enumerate(row):
            i, left = number * columns + column, _GAP + column * (SIDE + _GAP)
            counts = f"{len(right[i])} annotated, {len(said[i])} detected"
            name = _short(images[i].name.replace("\\", "/").rsplit("/", 1)[-1], SIDE - draw.textlength(f"  {counts}", font), draw, font)
            draw.text((left, top), f"{name}  {counts}", "black", font)
            whole.paste(tile, (left, top + _LINE))
        top += height
    buffer = BytesIO()
    whole.save(buffer, format="png")
    return buffer.getvalue()


def _tile(image: StoredImage, right: Sequence[Drawn], said: Sequence[Drawn], font: Any) -> Any:
    """An image whose longer side has `SIDE` pixels, with its boxes."""
    from PIL import Image, ImageDraw

    plain = image.decode(3)
    scale = SIDE / max(plain.size)
    width, height = (max(1, round(side * scale)) for side in plain.size)
    tile = Image.new("RGB", (SIDE, height), "white")
    tile.paste(plain.resize((width, height)), (0, 0))
    draw = ImageDraw.Draw(tile)
    every = [(*one, RIGHT, False) for one in right] + [(*one, SAID, True) for one in said]
    for _, box, color, _ in every:
        draw.rectangle(_corners(box, scale, (width, height)), outline=color, width=2)
    for label, box, color, above in every:  # over all boxes, so that none runs through a label
        left, top, _, bottom = _corners(box, scale, (width, height))
        wide, tall = draw.textlength(label, font) + 4, _TEXT + 3
        at = min(max(left, 0), SIDE - wide), min(max(top - tall if above else bottom, 0), height - tall)
        draw.rectangle((*at, at[0] + wide, at[1] + tall), fill=color)
        draw.text((at[0] + 2, at[1] + 1), label, "white", font)
    return tile


def _corners(box: Sequence[float], scale: float, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom in a tile, within the image."""
    found = np.array([box[0], box[1], box[0] + box[2], box[1] + box[3]], float) * scale
    left, top, right, bottom = np.clip(found, 0, [size[0] - 1, size[1] - 1] * 2).tolist()
    return min(left, right), min(top, bottom), max(left, right), max(top, bottom)


def _short(name: str, room: float, draw: Any, font: Any) -> str:
    """The end of a name, as far as there is room for it."""
    while draw.textlength(name, font) > room and len(name) > 4:
        name = "\u2026" + name[max(2, math.ceil(len(name) / 12)) :]
    return name
