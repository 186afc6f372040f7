"""The matching and the losses of detectors beside transformers' (DETR's criterion)."""

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jax
import jax.numpy as jnp
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss, generalized_box_iou

from lora_jax.tasks.set_matching import MatchWeights, corners, generalized_iou, match, matching_cost, set_loss

pytestmark = pytest.mark.interop


def drawn(rng, images=3, queries=12, classes=4, most=7) -> Any:
    logits = rng.normal(size=(images, queries, classes + 1)).astype(np.float32) * 2
    boxes = rng.uniform(0.05, 0.95, (images, queries, 4)).astype(np.float32)
    counts = rng.integers(0, most + 1, images)
    counts[0] = most
    labels = [rng.integers(0, classes, n) for n in counts]
    wanted = [rng.uniform(0.05, 0.95, (n, 4)).astype(np.float32) for n in counts]
    return logits, boxes, labels, wanted


def padded(labels, wanted, most=9) -> Any:
    classes = np.full((len(labels), most), -1, np.int32)
    boxes = np.full((len(labels), most, 4), np.nan, np.float32)
    boxes[:] = 0.0
    real = np.zeros((len(labels), most), bool)
    for i, (kinds, found) in enumerate(zip(labels, wanted)):
        classes[i, : len(kinds)], boxes[i, : len(kinds)], real[i, : len(kinds)] = kinds, found, True
    return classes, boxes, real


def reference(logits, boxes, labels, wanted):
    matcher = HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
    criterion = ImageLoss(matcher=matcher, num_classes=logits.shape[-1] - 1, eos_coef=0.1, losses=["labels", "boxes"])
    outputs = {"logits": torch.tensor(logits, requires_grad=True), "pred_boxes": torch.tensor(boxes, requires_grad=True)}
    targets = [{"class_labels": torch.tensor(k, dtype=torch.int64), "boxes": torch.tensor(b)} for k, b in zip(labels, wanted)]
    parts = criterion(outputs, targets)
    total = parts["loss_ce"] + 5 * parts["loss_bbox"] + 2 * parts["loss_giou"]
    total.backward()
    grads = [np.zeros(x.shape, np.float32) if x.grad is None else x.grad.numpy() for x in outputs.values()]
    return {name: float(v.detach()) for name, v in parts.items()}, float(total.detach()), grads, matcher(outputs, targets)


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_matching_losses_and_gradients_are_those_of_transformers(seed):
    rng = np.random.default_rng(seed)
    logits, boxes, labels, wanted = drawn(rng)
    if seed == 5:
        labels, wanted = [k[:0] for k in labels], [b[:0] for b in wanted]
    classes, targets, real = padded(labels, wanted)
    theirs, total, grads, pairs = reference(logits, boxes, labels, wanted)
    weights = MatchWeights()

    ours = jax.jit(set_loss, static_argnums=6)(logits, boxes, classes, targets, real, np.ones(len(logits), np.float32), weights)
    for mine, name in (("class", "loss_ce"), ("box", "loss_bbox"), ("giou", "loss_giou")):
        np.testing.assert_allclose(float(ours[mine]), theirs[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(float(ours["loss"]), total, rtol=1e-5)

    for i, (queries, objects) in enumerate(pairs):
        found = match(matching_cost(logits[i], boxes[i], classes[i], targets[i], weights), real[i])
        assert {int(o): int(q) for q, o in zip(queries, objects)} == {o: int(found[o]) for o in range(len(labels[i]))}

    loss = lambda logits, boxes: set_loss(logits, boxes, classes, targets, real, jnp.ones(len(logits)), weights)["loss"]
    for mine, theirs in zip(jax.grad(loss, argnums=(0, 1))(logits, boxes), grads):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_giou_is_that_of_transformers():
    rng = np.random.default_rng(0)
    a, b = (corners(jnp.asarray(rng.uniform(0.05, 0.95, (20, 4)), jnp.float32)) for _ in range(2))
    theirs = generalized_box_iou(torch.tensor(np.array(a)), torch.tensor(np.array(b)))
    np.testing.assert_allclose(generalized_iou(a[:, None], b[None]), theirs, rtol=1e-5, atol=1e-6)


def test_an_image_that_fills_the_batch_changes_nothing():
    rng = np.random.default_rng(1)
    logits, boxes, labels, wanted = drawn(rng)
    classes, targets, real = padded(labels, wanted)
    alone = set_loss(logits[:2], boxes[:2], classes[:2], targets[:2], real[:2], jnp.ones(2), MatchWeights())
    filled = set_loss(logits, boxes, classes, targets, real, jnp.array([1.0, 1.0, 0.0]), MatchWeights())
    for name in alone:
        np.testing.assert_allclose(filled[name], alone[name], rtol=1e-6)
