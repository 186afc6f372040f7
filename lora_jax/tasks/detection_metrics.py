"""Average precision of detections, as COCO's own evaluation (pycocotools) counts it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .evaluators import Evaluator, register

# Positions of pycocotools' `stats`.
_STATS = {"map": 0, "map50": 1, "map75": 2}

for _name in _STATS:
    register(Evaluator(_name, True, percent=True))


def detections(logits: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a detector says of an image: every query's best class but "no object", its probability, and its box.

    Args:
        logits: (queries, classes + 1) float, "no object" last.
        boxes: (queries, 4) float, centre x, centre y, width, height in [0, 1].

    Returns:
        (queries,) float64 scores, (queries,) int classes, (queries, 4) float64 boxes as left, top, width, height in [0, 1].
    """
    logits, boxes = logits.astype(np.float64), boxes.astype(np.float64)
    probability = np.exp(logits - logits.max(-1, keepdims=True))
    probability = (probability / probability.sum(-1, keepdims=True))[:, :-1]
    corner = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]], axis=-1)
    return probability.max(-1), probability.argmax(-1), corner


def coco_scores(
    images: Sequence[tuple[int, int]], objects: Sequence[Mapping[str, np.ndarray]], answers: Sequence[tuple[np.ndarray, ...]], classes: int
) -> dict[str, float]:
    """mAP over IoU 0.5 to 0.95, and AP at 0.5 and at 0.75: at most 100 detections an image, all areas.

    Args:
        images: of each the (width, height) in pixels.
        objects: of each `classes` (n,) int, `boxes` (n, 4) left, top, width, height in pixels, `crowd` (n,) bool, `areas` (n,).
        answers: of each what `detections` gave.
        classes: how many there are.

    Returns:
        `map`, `map50`, `map75`, in [0, 1]; NaN where no image has an object.

    Raises:
        InputError: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise InputError("detection is scored by pycocotools, which is not installed: pip install 'lora-jax[vision]'.") from None
    right: dict[str, Any] = {
        "info": {},
        "images": [{"id": i, "width": width, "height": height} for i, (width, height) in enumerate(images)],
        "categories": [{"id": c, "name": str(c)} for c in range(classes)],
        "annotations": [],
    }
    given = []
    for i, (size, found, (scores, kinds, boxes)) in enumerate(zip(images, objects, answers, strict=True)):
        for kind, box, crowd, area in zip(found["classes"], found["boxes"], found["crowd"], found["areas"], strict=True):
            entry = {"id": len(right["annotations"]) + 1, "image_id": i, "category_id": int(kind), "bbox": [float(x) for x in box]}
            right["annotations"].append(entry | {"area": float(area), "iscrowd": int(crowd)})
        scale = np.array([*size, *size], np.float64)
        for score, kind, box in zip(scores, kinds, boxes * scale, strict=True):
            given.append({"image_id": i, "category_id": int(kind), "bbox": [float(x) for x in box], "score": float(score)})
    if not right["annotations"] or not given:
        return dict.fromkeys(_STATS, float("nan"))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress and a table
        truth: Any = COCO()
        truth.dataset = right
        truth.createIndex()
        scored = COCOeval(truth, truth.loadRes(given), "bbox")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    # -1 stands for "no such object".
    return {name: float(scored.stats[place]) if scored.stats[place] >= 0 else float("nan") for name, place in _STATS.items()}
