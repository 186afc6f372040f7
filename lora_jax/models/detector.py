"""Detectors: heads that make a class, of which the last is "no object", and a box of each vector that looks for an object.

Those are the decoder's outputs of DETR (arXiv:2005.12872), or the outputs of tokens that a vision transformer is given beside the patches,
as in YOLOS (arXiv:2106.00666). Any vision transformer of ours can be given such tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from .heads import Classifier
from .layers import AXES, Array, HeadShape, linear
from .vision import VisionBase
from .vision_transformer import VisionTransformer


class Predictor(nnx.Module):
    """Linear layers with ReLU between them, float32: DETR's heads (arXiv:2005.12872, appendix A.4).

    Args:
        width: of what it is given, and of the layers between.
        outputs: how many numbers it gives.
        depth: how many layers.
    """

    def __init__(self, width: int, outputs: int, depth: int, *, rngs: nnx.Rngs):
        for n in range(depth):
            last = n == depth - 1
            made = linear(
                width, outputs if last else width, ("embed", "classes" if last else "embed_out"), bias=True, dtype=jnp.float32, rngs=rngs
            )
            setattr(self, f"layers_{n}", made)
        self.depth = depth

    def __call__(self, x: Array) -> Array:
        """(..., width) -> (..., outputs) float32."""
        x = x.astype(jnp.float32)
        for n in range(self.depth):
            x = getattr(self, f"layers_{n}")(x)
            x = jax.nn.relu(x) if n < self.depth - 1 else x
        return x

    @property
    def outputs(self) -> int:
        """How many numbers it gives."""
        return getattr(self, f"layers_{self.depth - 1}").kernel.shape[-1]


class DetectionTokens(nnx.Module):
    """(queries, width) float32 vectors that stand behind an image's patches, positions included; ~ N(0, 0.02) when new."""

    def __init__(self, queries: int, width: int, *, rngs: nnx.Rngs):
        self.table = nnx.Param(0.02 * jax.random.normal(rngs.params(), (queries, width), jnp.float32))
        self.table.set_metadata(AXES, (None, "embed"))


class Detector(Classifier):
    """A base over images with the heads of a detector; they are float32 whatever the base is.

    Called as `model(pixels)`, pixels (batch, height, width, channels) float32, normalised, it gives class logits (batch, queries,
    classes + 1), "no object" last, and boxes (batch, queries, 4): centre x, centre y, width and height in [0, 1].

    Args:
        base: one that looks for objects by itself, or a vision transformer: new detection tokens then belong to the heads, and train with
            them.
        classes: how many, "no object" aside.
        queries: how many detection tokens are made.
    """

    kind = "object_detection"

    def __init__(self, base: VisionBase, classes: int, *, queries: int = 100, rngs: nnx.Rngs):
        nnx.Module.__init__(self)
        self.base = base
        shape = dict(base.head_shapes).get("object_detection") or HeadShape("each", activation="relu")
        self.queries = base.queries or queries
        if not base.queries:
            assert isinstance(base, VisionTransformer)
            self.detection_tokens = DetectionTokens(queries, base.config.block.width, rngs=rngs)
            # What the layers compute of the patches depends on tokens that train: no layer's output is common to all members.
            self.trunk_depth = 0
        width = base.pooled_width("mean")
        self.class_predictor = Predictor(width, classes + 1, 1 if shape.activation is None else 3, rngs=rngs)
        self.box_predictor = Predictor(width, 4, 3, rngs=rngs)
        self.shape = nnx.static(shape)
        made = ("detection_tokens", "class_predictor", "box_predictor")
        self.new: tuple[str, ...] = nnx.static(tuple(name for name in made if hasattr(self, name)))
        self.class_names: tuple[str, ...] = nnx.static(())

    @property
    def classes(self) -> int:
        """How many there are, "no object" aside."""
        return self.class_predictor.outputs - 1

    def __call__(self, pixels: Array) -> tuple[Array, Array]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Class logits (batch, queries, classes + 1) and boxes (batch, queries, 4), float32."""
        found = self.readout()(self._found(pixels))
        return found[..., :-4], found[..., -4:]

    def features(self, batch: Mapping[str, Array], dropout_rng: Array | None = None) -> Array:
        """(targets, queries, width) float32: the last hidden states of each target's image."""
        found = self._found(self.base.normalised(batch["pixels"]), dropout_rng=dropout_rng, trunk=batch.get("trunk"))
        return found[batch["target_index"] // batch["segment_ids"].shape[-1]]

    def readout(self) -> Callable[[Array], Array]:
        """(..., width) -> (..., classes + 5): the class logits, then the box."""
        return lambda x: jnp.concatenate([self.class_predictor(x), jax.nn.sigmoid(self.box_predictor(x))], axis=-1)

    def answers(self, features: Array) -> Array:
        """(images, queries, classes + 5) float32: logits and boxes."""
        return self.readout()(features)

    def trunk(self, batch: Mapping[str, Array], dropout_rng: Array | None = None) -> Array:
        """(rows, tokens, width): what enters the base's layers above its lowest cut; of a base with detection tokens of its own."""
        return self.base.trunk(self.base.normalised(batch["pixels"]), dropout_rng=dropout_rng)

    def _found(self, pixels: Array, **options: Array | None) -> Array:
        own = {} if self.base.queries else {"behind": self.detection_tokens.table[...]}
        return self.base.hidden(pixels, **own, **options)[:, -self.queries :].astype(jnp.float32)
