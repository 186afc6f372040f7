"""Detectors: a vision transformer that is given one token more for each object it may find.

YOLOS (Fang et al., arXiv:2106.00666): the outputs of these tokens become a class, of which the last is "no object", and a box. Any vision
transformer of ours can be the base; a checkpoint of YOLOS itself has such tokens, and trained heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from .heads import Classifier
from .layers import AXES, Array, HeadShape, linear
from .vision_transformer import VisionTransformer


class Predictor(nnx.Module):
    """Three linear layers with ReLU between them, float32: DETR's head (arXiv:2005.12872, appendix A.4).

    Args:
        width: of what it is given, and of the layers between.
        outputs: how many numbers it gives.
        axes: logical axis of those.
    """

    def __init__(self, width: int, outputs: int, axes: str, *, rngs: nnx.Rngs):
        shared = {"bias": True, "dtype": jnp.float32, "rngs": rngs}
        self.layers_0 = linear(width, width, ("embed", "embed_out"), **shared)
        self.layers_1 = linear(width, width, ("embed", "embed_out"), **shared)
        self.layers_2 = linear(width, outputs, ("embed", axes), **shared)

    def __call__(self, x: Array) -> Array:
        """(..., width) -> (..., outputs) float32."""
        x = jax.nn.relu(self.layers_0(x.astype(jnp.float32)))
        return self.layers_2(jax.nn.relu(self.layers_1(x)))


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
        base: a vision transformer. Where it has no detection tokens of its own, new ones belong to the heads, and train with them.
        classes: how many, "no object" aside.
        queries: how many detection tokens are made.
    """

    kind = "object_detection"

    def __init__(self, base: VisionTransformer, classes: int, *, queries: int = 100, rngs: nnx.Rngs):
        nnx.Module.__init__(self)
        self.base = base
        width = base.config.block.width
        self.queries = base.config.detection_tokens or queries
        if not base.config.detection_tokens:
            self.detection_tokens = DetectionTokens(queries, width, rngs=rngs)
            # What the layers compute of the patches depends on tokens that train: no layer's output is common to all members.
            self.trunk_depth = 0
        self.class_predictor = Predictor(width, classes + 1, "classes", rngs=rngs)
        self.box_predictor = Predictor(width, 4, "classes", rngs=rngs)
        self.shape = nnx.static(HeadShape("each"))
        made = ("detection_tokens", "class_predictor", "box_predictor")
        self.new: tuple[str, ...] = nnx.static(tuple(name for name in made if hasattr(self, name)))
        self.class_names: tuple[str, ...] = nnx.static(())

    @property
    def classes(self) -> int:
        """How many there are, "no object" aside."""
        return self.class_predictor.layers_2.kernel.shape[-1] - 1

    def __call__(self, pixels: Array) -> tuple[Array, Array]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Class logits (batch, queries, classes + 1) and boxes (batch, queries, 4), float32."""
        found = self.readout()(self._found(pixels))
        return found[..., :-4], found[..., -4:]

    def features(self, batch: Mapping[str, Array], dropout_rng: Array | None = None) -> Array:
        """(images, queries, width) float32: the last hidden states of the detection tokens."""
        return self._found(self.base.normalised(batch["pixels"]), dropout_rng=dropout_rng, trunk=batch.get("trunk"))

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
        behind = None if self.base.config.detection_tokens else self.detection_tokens.table[...]
        return self.base.hidden(pixels, behind=behind, **options)[:, -self.queries :].astype(jnp.float32)
