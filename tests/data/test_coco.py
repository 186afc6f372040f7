"""Annotations in COCO's form: what is read, and what is refused."""

import json

import numpy as np
import pytest

from lora_jax.data.coco import read_coco
from lora_jax.errors import InputError

GOOD = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 3, "file_name": "images/b.png", "width": 10, "height": 10},
    ],
    "categories": [{"id": 9, "name": "cat"}, {"id": 2, "name": "ant"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 9, "bbox": [1, 2, 10, 20], "area": 150.0, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [30.5, 0, 20, 5]},
        {"id": 3, "image_id": 7, "category_id": 2, "bbox": [5, 5, 0, 5]},
    ],
}


def written(folder, change=lambda found: None):
    found = json.loads(json.dumps(GOOD))
    change(found)
    (folder / "images").mkdir(exist_ok=True)
    (folder / "a.png").touch()
    (folder / "images" / "b.png").touch()
    file = folder / "train.json"
    file.write_text(json.dumps(found))
    return file


def test_boxes_classes_and_images_without_objects(tmp_path):
    found = read_coco(written(tmp_path), "task.source")
    assert found.names == ("ant", "cat")
    assert [p.name for p in found.images] == ["a.png", "b.png"] and found.sizes == [(40, 30), (10, 10)]
    first, second = found.objects
    np.testing.assert_array_equal(first.classes, [1, 0])
    np.testing.assert_allclose(first.boxes, [[1, 2, 10, 20], [30.5, 0, 9.5, 5]])
    np.testing.assert_allclose(first.areas, [150, 47.5])
    assert len(second) == 0 and second.boxes.shape == (0, 4)
    assert found.notes == ("1 boxes of train.json without an area left out", "1 boxes of train.json cut to their image")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f["annotations"][0].update(image_id=8), r"annotation 1 is of image 8.*no image has this id"),
        (lambda f: f["annotations"][0].update(category_id=1), r"annotation 1 is of category 1.*2 \(ant\), 9 \(cat\)"),
        (lambda f: f["annotations"][0].update(bbox=[1, 2, -3, 4]), "annotation 1.*negative"),
        (lambda f: f["annotations"][0].update(bbox=[1, 2, 3]), r"annotation 1.*must be \[left, top, width, height\]"),
        (lambda f: f["annotations"][0].update(bbox=[1, 2, float("nan"), 4]), r"annotation 1.*must be \[left"),
        (lambda f: f["annotations"][1].update(id=1), "two entries have the annotation id 1"),
        (lambda f: f["images"][0].update(file_name="c.png"), "image 7: there is no file .*c.png"),
        (lambda f: f["images"][0].update(width=0), "image 7: width must be a whole number"),
        (lambda f: f["images"][0].pop("height"), "image 7 has no 'height'"),
        (lambda f: f.pop("categories"), "has no list 'categories'"),
        (lambda f: f["images"].clear(), "has no images"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, said):
    with pytest.raises(InputError, match=said):
        read_coco(written(tmp_path, change), "task.source")
