"""The loss of a detector: its queries are matched to the objects of an image, then each pair's class and box are compared.

DETR (Carion et al., arXiv:2005.12872), eq. 1 and 2: the assignment of least total cost is found without a gradient; a query that is matched
is to predict its object's class and box, every other one the class "no object", which weighs less. Boxes are (centre x, centre y, width,
height), each as a part of the image's size, in [0, 1].
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class MatchWeights:
    """What the parts of the matching cost and of the loss weigh; the defaults are DETR's.

    Attributes:
        class_cost, box_cost, giou_cost: of the cost that the matching minimises: -probability, L1 distance, -GIoU.
        box, giou: of the loss beside the cross-entropy, whose weight is 1.
        no_object: of the cross-entropy at a query that is matched to nothing.
    """

    class_cost: float = 1.0
    box_cost: float = 5.0
    giou_cost: float = 2.0
    box: float = 5.0
    giou: float = 2.0
    no_object: float = 0.1


def corners(boxes: jax.Array) -> jax.Array:
    """(..., 4) boxes as (left, top, right, bottom).

    >>> corners(jnp.array([0.5, 0.5, 0.5, 1.0])).tolist()
    [0.25, 0.0, 0.75, 1.0]
    """
    centre, size = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([centre - size / 2, centre + size / 2], axis=-1)


def generalized_iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """GIoU of boxes: intersection over union, less the part of the smallest box around both that neither covers.

    Rezatofighi et al., arXiv:1902.09630, algorithm 1.

    Args:
        a, b: (..., 4) float32 corners whose leading dimensions broadcast.

    Returns:
        (...) float32 in (-1, 1]; 0 between two boxes without an area, where the fraction is not defined.
    """
    area = lambda box: jnp.prod(jnp.maximum(box[..., 2:] - box[..., :2], 0), axis=-1)
    inside = jnp.concatenate([jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])], axis=-1)
    around = jnp.concatenate([jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])], axis=-1)
    intersection, hull = area(inside), area(around)
    union = area(a) + area(b) - intersection
    safe = lambda x: jnp.where(x > 0, x, 1.0)
    return jnp.where(union > 0, intersection / safe(union), 0.0) - jnp.where(hull > 0, (hull - union) / safe(hull), 0.0)


def matching_cost(logits: jax.Array, boxes: jax.Array, classes: jax.Array, wanted: jax.Array, weights: MatchWeights) -> jax.Array:
    """What it costs to match each query with each object of one image (arXiv:2005.12872, section 3.1).

    Args:
        logits: (queries, classes + 1) float32, "no object" last.
        boxes: (queries, 4) float32.
        classes: (objects,) int32.
        wanted: (objects, 4) float32.

    Returns:
        (queries, objects) float32.
    """
    probability = jax.nn.softmax(logits, axis=-1)[:, classes]
    distance = jnp.abs(boxes[:, None] - wanted[None]).sum(-1)
    overlap = generalized_iou(corners(boxes)[:, None], corners(wanted)[None])
    return weights.box_cost * distance - weights.class_cost * probability - weights.giou_cost * overlap


def match(cost: jax.Array, real: jax.Array) -> jax.Array:
    """The query that each object is matched with: the assignment of least total cost.

    Args:
        cost: (queries, objects) float32, at least as many queries as objects. What is not finite counts as the largest number, so that a
            member that has diverged still gets some assignment.
        real: (objects,) bool, False at padding: it takes queries that are left, and changes no other pair.

    Returns:
        (objects,) int32, the objects' queries, all different.
    """
    # Far above any cost, and small enough that sums of it in float32 keep the others' order.
    worst = 1e6
    cost = jnp.where(jnp.isfinite(cost), jnp.clip(cost, -worst, worst), worst)
    cost = jnp.where(real[None], cost, 0.0)
    queries, objects = optax.assignment.hungarian_algorithm(cost)
    return jnp.zeros(cost.shape[1], jnp.int32).at[objects].set(queries.astype(jnp.int32))


def set_loss(
    logits: jax.Array, boxes: jax.Array, classes: jax.Array, wanted: jax.Array, real: jax.Array, images: jax.Array, weights: MatchWeights
) -> dict[str, jax.Array]:
    """The loss of a batch of images (arXiv:2005.12872, eq. 2), as DETR's authors and transformers normalise it.

    Args:
        logits: (images, queries, classes + 1) float32, "no object" last.
        boxes: (images, queries, 4) float32.
        classes: (images, objects) int32; any at padding.
        wanted: (images, objects, 4) float32; any at padding.
        real: (images, objects) bool, False at padding.
        images: (images,) float32, 0 for an image that only fills the batch.

    Returns:
        float32 scalars: `class`, the mean cross-entropy over queries, weighed by 1 or `no_object`; `box` and `giou`, the L1 distance and
        1 - GIoU of matched pairs, divided by the number of objects (1 where there is none); `right`, the part of objects whose query gives
        their class; `loss`, the weighted sum of the first three.
    """
    real = real & (images > 0)[:, None]
    logits, boxes = logits.astype(jnp.float32), boxes.astype(jnp.float32)
    # An object at padding has no class and no size of its own: its cost is 0 whatever it is.
    cost = jax.vmap(matching_cost, in_axes=(0, 0, 0, 0, None))(logits, boxes, classes, wanted, weights)
    matched = jax.lax.stop_gradient(jax.vmap(match)(jax.lax.stop_gradient(cost), real))

    nothing = logits.shape[-1] - 1
    place = lambda ids, values, to: ids.at[to].set(values, mode="drop")
    # Padding writes beyond the last query, which is dropped.
    to = jnp.where(real, matched, logits.shape[1])
    target = jax.vmap(place)(jnp.full(logits.shape[:2], nothing, jnp.int32), classes.astype(jnp.int32), to)
    weight = jnp.where(target == nothing, weights.no_object, 1.0) * images[:, None]
    entropy = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]

    count = jnp.maximum(real.sum(), 1).astype(jnp.float32)
    pair = jnp.take_along_axis(boxes, matched[..., None], axis=1)
    distance = jnp.abs(pair - wanted).sum(-1)
    overlap = generalized_iou(corners(pair), corners(wanted))
    given = jnp.take_along_axis(logits, matched[..., None], axis=1)
    parts = {
        "class": (weight * entropy).sum() / jnp.maximum(weight.sum(), 1e-9),
        "box": jnp.where(real, distance, 0.0).sum() / count,
        "giou": jnp.where(real, 1 - overlap, 0.0).sum() / count,
        "right": (real & (given[..., :-1].argmax(-1) == classes)).sum() / count,
    }
    return parts | {"loss": parts["class"] + weights.box * parts["box"] + weights.giou * parts["giou"]}
