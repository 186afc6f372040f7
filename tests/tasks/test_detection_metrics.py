"""Average precision: pycocotools' own, on cases whose precision can be counted by hand."""

import numpy as np
import pytest

pytest.importorskip("pycocotools")

from lora_jax.tasks.detection_metrics import coco_scores, detections

SIZE = (100, 50)


def objects(classes, boxes):
    boxes = np.array(boxes, float).reshape(-1, 4)
    return {"classes": np.array(classes), "boxes": boxes, "crowd": np.zeros(len(classes), bool), "areas": boxes[:, 2] * boxes[:, 3]}


def answer(scores, classes, boxes):
    return np.array(scores), np.array(classes), np.array(boxes, float).reshape(-1, 4) / np.array([*SIZE, *SIZE])


def test_all_right_and_all_wrong():
    wanted = [objects([0, 1], [[10, 10, 20, 20], [50, 5, 30, 30]])]
    right = [answer([0.9, 0.8], [0, 1], [[10, 10, 20, 20], [50, 5, 30, 30]])]
    assert coco_scores([SIZE], wanted, right, 2) == pytest.approx({"map": 1.0, "map50": 1.0, "map75": 1.0})
    swapped = [answer([0.9, 0.8], [1, 0], [[10, 10, 20, 20], [50, 5, 30, 30]])]
    assert coco_scores([SIZE], wanted, swapped, 2) == pytest.approx({"map": 0.0, "map50": 0.0, "map75": 0.0})


def test_a_box_that_overlaps_by_six_tenths_counts_at_a_half():
    # 20 x 20 against 20 x 12 inside it: IoU 0.6, right at 0.5, 0.55 and 0.6 of the ten thresholds.
    wanted, given = [objects([0], [[10, 10, 20, 20]])], [answer([0.9], [0], [[10, 10, 20, 12]])]
    assert coco_scores([SIZE], wanted, given, 1) == pytest.approx({"map": 0.3, "map50": 1.0, "map75": 0.0})


def test_a_wrong_detection_before_a_right_one_halves_the_precision():
    wanted = [objects([0], [[10, 10, 20, 20]])]
    given = [answer([0.9, 0.5], [0, 0], [[60, 10, 20, 20], [10, 10, 20, 20]])]
    assert coco_scores([SIZE], wanted, given, 1)["map50"] == pytest.approx(0.5)


def test_no_object_anywhere_is_no_number():
    assert np.isnan(coco_scores([SIZE], [objects([], [])], [answer([0.9], [0], [[0, 0, 5, 5]])], 1)["map"])


def test_scores_are_of_the_classes_without_no_object():
    logits = np.log(np.array([[0.1, 0.3, 0.6], [0.7, 0.1, 0.2]]))
    scores, classes, boxes = detections(logits, np.array([[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]))
    np.testing.assert_allclose(scores, [0.3, 0.7])
    np.testing.assert_array_equal(classes, [1, 0])
    np.testing.assert_allclose(boxes, [[0.4, 0.3, 0.2, 0.4], [0, 0, 0.5, 1.0]])
