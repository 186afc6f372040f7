"""Low-rank compression: each linear layer's weight becomes the product of two factors with fewer numbers.

A weight W of (inputs, outputs) becomes D U, of the largest rank k with (inputs + outputs) k <= share * inputs * outputs. `svd` leaves the
least of W behind, in its own norm. `activation` leaves the least of X W behind, X being the inputs of calibration rows: with
X^T X = L L^T (Cholesky) and the truncated decomposition L^T W ~ P S Q^T it takes D = L^-T P S^1/2 and U = S^1/2 Q^T, for
||X (W - D U)||_F = ||L^T W - P S Q^T||_F (truncation-aware whitening, SVD-LLM, Wang et al., arXiv:2403.07378, section 3.1). So that L
exists where rows are too few, 1e-6 times its mean is added to the diagonal of X^T X.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field, model_validator

from ...config.doors import TRANSFORMS
from ...config.schema import TransformConfig
from ...errors import InputError
from ...parallel.mesh import parameter_sharding, place
from ..layers import AXES, Array
from ..stored import StoredLinear, put
from .base import BaseTransform, TransformContext
from .calibration import CalibrationConfig
from .weights import LinearLayer, linear_layers

KEY = "model.transforms: low_rank"
DAMPING = 1e-6


class LowRankConfig(TransformConfig):
    kind: Literal["low_rank"] = Field(description="Replaces the weight of each linear layer by two factors.")
    share: Annotated[float, Field(gt=0, le=1)] = Field(description="The largest share of each layer's numbers that its factors have.")
    method: Literal["svd", "activation"] = Field(
        default="svd", description="What is kept: most of the weight, or most of what the layer gives for the calibration rows."
    )
    calibration: CalibrationConfig | None = Field(default=None, description="Rows whose inputs the method activation sees.")
    skip: list[str] = Field(
        default_factory=list, description="Linear layers to leave as they are: whole names or their ends. Embeddings and heads always are."
    )

    @model_validator(mode="after")
    def _fits(self) -> LowRankConfig:
        if self.method == "activation" and self.calibration is None:
            raise ValueError("method 'activation' needs 'calibration: {source: ...}', rows of text whose inputs it sees")
        if self.method == "svd" and self.calibration is not None:
            raise ValueError("'calibration' has no use with method 'svd', which reads no data")
        return self


class LowRankLinear(StoredLinear):
    """A linear layer of two factors: y = (x D) U + b.

    Args:
        down: (..., inputs, rank).
        up: (..., rank, outputs).
        bias: (..., outputs), or None.
        dtype: of the matmuls.
        axes: logical ones of the weight; None where they have no names.
    """

    def __init__(self, down: Any, up: Any, bias: nnx.Param | None, dtype: Any, axes: tuple[str | None, ...] | None):
        self.down, self.up, self.bias, self.dtype = nnx.Param(down), nnx.Param(up), bias, dtype
        if axes is not None:
            self.down.set_metadata(AXES, (*axes[:-1], None))
            self.up.set_metadata(AXES, (*axes[:-2], None, axes[-1]))

    def __call__(self, x: Array) -> Array:
        """(..., inputs) -> (..., outputs)."""
        y = jnp.matmul(jnp.matmul(x.astype(self.dtype), self.down[...]), self.up[...])
        return y if self.bias is None else y + self.bias[...]

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """(..., inputs, outputs)."""
        return (*self.down.shape[:-1], self.up.shape[-1])

    @property
    def kernel_axes(self) -> tuple[str | None, ...] | None:
        """The weight's logical axes."""
        down, up = (factor.get_metadata().get(AXES) for factor in (self.down, self.up))
        return None if down is None or up is None else (*down[:-1], up[-1])

    def dense_kernel(self, layer: int | None = None) -> Array:
        """D U, in full precision."""
        down, up = (factor[...] if layer is None else factor[layer] for factor in (self.down, self.up))
        return jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)


class LowRank(BaseTransform):
    """Two factors in place of each weight."""

    section = LowRankConfig

    def shapes(self, model: Any, section: LowRankConfig) -> Any:
        for layer in _layers(model, section):
            linear, (inputs, outputs) = layer.module, layer.shape
            lead, rank = linear.kernel.shape[:-2], rank_of(inputs, outputs, section.share)
            down, up = (jax.ShapeDtypeStruct((*lead, *own), linear.kernel.dtype) for own in ((inputs, rank), (rank, outputs)))
            put(model, layer.path, LowRankLinear(down, up, linear.bias, linear.dtype, linear.kernel.get_metadata().get(AXES)))
        return model

    def apply(self, model: Any, section: LowRankConfig, context: TransformContext) -> Any:
        layers = _layers(model, section)
        seen = {}
        if section.calibration is not None:
            seen = context.calibrated(model, section.calibration, [layer.name for layer in layers], "moment")
        before = after = 0
        lost: list[float] = []
        for layer in layers:
            linear, (inputs, outputs) = layer.module, layer.shape
            lead, rank = linear.kernel.shape[:-2], rank_of(inputs, outputs, section.share)
            down, up = np.empty((*lead, inputs, rank), linear.kernel.dtype), np.empty((*lead, rank, outputs), linear.kernel.dtype)
            for at, matrix in layer.matrices():
                moment = None if section.calibration is None else seen[layer.name, at[0] if at else 0].moment
                down[at], up[at], left = factors_of(matrix, rank, moment)
                lost.append(left)
            axes = linear.kernel.get_metadata().get(AXES)
            parts = down, up
            if context.mesh is not None and axes is not None:
                named = (*axes[:-1], None), (*axes[:-2], None, axes[-1])
                parts = (place(a, parameter_sharding(context.mesh, a.shape, n)) for a, n in zip((down, up), named, strict=True))
            factors = [jnp.asarray(part) for part in parts]
            before, after = before + linear.kernel.size, after + down.size + up.size
            put(model, layer.path, LowRankLinear(factors[0], factors[1], linear.bias, linear.dtype, axes))
        whole = sum(v.size for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Param))
        measure = "what they give for the calibration rows" if seen else "their weights"
        context.notes.append(
            f"low rank ({section.method}): {before:,} numbers of {len(layers)} kinds of linear layers became {after:,} "
            f"({after / before:.1%}), the base's {whole + before - after:,} became {whole:,}. The layers' FLOPs a token fall from "
            f"{2 * before:,} to {2 * after:,}. {np.mean(lost):.1%} of {measure} is lost (Frobenius norm, mean over {len(lost)} matrices)."
        )
        return model


def _layers(model: Any, section: LowRankConfig) -> list[LinearLayer]:
    """What is factored; `InputError` where that cannot be done."""
    layers = linear_layers(model, section.skip, KEY)
    for layer in layers:
        if layer.of_experts:
            raise InputError(f"{KEY}.skip: {layer.name} has a weight for each expert, which is not factored: skip it.")
        if rank_of(*layer.shape, section.share) < 1:
            inputs, outputs = layer.shape
            least = (inputs + outputs) / (inputs * outputs)
            raise InputError(f"{KEY}.share: {section.share:g} leaves {layer.name} no rank; at least {least:.3g}, or skip it.")
    return layers


def rank_of(inputs: int, outputs: int, share: float) -> int:
    """The largest k with (inputs + outputs) k <= share * inputs * outputs.

    >>> rank_of(576, 1536, 0.6), rank_of(4, 4, 0.4)
    (251, 0)
    """
    return int(share * inputs * outputs / (inputs + outputs) + 1e-9)


def factors_of(weight: np.ndarray, rank: int, moment: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, float]:
    """D (inputs, rank) and U (rank, outputs), float64, and the share of the norm that is lost: of W, or with moments of X W.

    Args:
        weight: (inputs, outputs).
        rank: at most the smaller of them.
        moment: X^T X, (inputs, inputs) float64; None: the weight alone counts.
    """
    white = whitening(moment) if moment is not None else None
    seen = weight.astype(np.float64) if white is None else white.T @ weight.astype(np.float64)
    p, s, q = np.linalg.svd(seen, full_matrices=False)
    root = np.sqrt(s[:rank])
    down, up = p[:, :rank] * root, root[:, None] * q[:rank]
    if white is not None:
        down = np.linalg.solve(white.T, down)
    total = float(np.sum(s**2))
    return down, up, float(np.sqrt(np.sum(s[rank:] ** 2) / total)) if total else 0.0


def whitening(moment: np.ndarray) -> np.ndarray:
    """L with L L^T = X^T X + 1e-6 mean(diag) I, (inputs, inputs) float64, lower triangular.

    The moments were summed in float32. Where a few inputs are so large, or rows so few, that this makes small eigenvalues negative, those
    below float32's rounding of the largest one count as that.

    Raises:
        InputError: the moments are no numbers, or all are 0.
    """
    symmetric = (moment + moment.T) / 2
    mean = float(np.mean(np.diag(symmetric)))
    if not np.isfinite(symmetric).all() or mean <= 0:
        raise InputError(
            f"{KEY}.calibration: a layer's inputs on these rows are all 0 or no numbers, so that nothing can be chosen by them."
        )
    try:
        return np.linalg.cholesky(symmetric + DAMPING * mean * np.eye(len(symmetric)))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(symmetric)
        lowest = max(DAMPING * mean, float(np.finfo(np.float32).eps * values[-1]))
        return np.linalg.cholesky((vectors * np.maximum(values, lowest)) @ vectors.T)


TRANSFORMS.register("low_rank", LowRank())
