"""Pruning: the smallest scores of each linear layer's weight become 0, and stay so while adapters are trained beside them.

The score of a weight is its size, or by Wanda (Sun et al., arXiv:2306.11695, eq. 1) its size times the norm of the input it is
multiplied by, over calibration rows: S_ij = |W_ij| * ||X_j||_2. Sizes are compared within a layer's whole matrix; Wanda's scores within
each output, as its paper has it. The pattern `n:m` takes the m - n smallest scores of every m neighbouring inputs of an output.

All statistics are those of the base before anything is pruned, in one pass. (Wanda's own code prunes layer after layer, and each sees
inputs that come through pruned ones.)
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from ...config.doors import TRANSFORMS
from ...config.schema import TransformConfig
from ...errors import InputError
from .base import BaseTransform, TransformContext
from .calibration import CalibrationConfig
from .weights import LinearLayer, linear_layers, set_like

KEY = "model.transforms: prune"


class PruneConfig(TransformConfig):
    kind: Literal["prune"] = Field(description="Sets the weights of linear layers with the smallest scores to 0.")
    method: Literal["magnitude", "wanda"] = Field(
        default="magnitude", description="The score: |W|, compared in each matrix; or |W| times the norm of the input, in each output."
    )
    sparsity: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.5, description="The share of each layer's weights that becomes 0.")
    pattern: Literal["unstructured", "2:4", "4:8"] = Field(
        default="unstructured", description="n:m keeps n of every m neighbouring inputs of an output; its sparsity is 0.5."
    )
    calibration: CalibrationConfig | None = Field(default=None, description="Rows whose inputs the method wanda measures.")
    skip: list[str] = Field(
        default_factory=list, description="Linear layers to leave as they are: whole names or their ends. Embeddings and heads always are."
    )

    @property
    def group(self) -> int | None:
        """m of the pattern `n:m`."""
        return None if self.pattern == "unstructured" else int(self.pattern.partition(":")[2])

    @model_validator(mode="after")
    def _fits(self) -> PruneConfig:
        if self.method == "wanda" and self.calibration is None:
            raise ValueError("method 'wanda' needs 'calibration: {source: ...}', rows of text whose inputs it measures")
        if self.method == "magnitude" and self.calibration is not None:
            raise ValueError("'calibration' has no use with method 'magnitude', which reads no data")
        if self.pattern != "unstructured" and self.sparsity != 0.5:
            raise ValueError(f"pattern '{self.pattern}' has a sparsity of 0.5, got {self.sparsity:g}")
        return self


class Prune(BaseTransform):
    """Zeros in place of the smallest scores."""

    section = PruneConfig

    def shapes(self, model: Any, section: PruneConfig) -> Any:
        _layers(model, section)
        return model

    def apply(self, model: Any, section: PruneConfig, context: TransformContext) -> Any:
        layers, group = _layers(model, section), section.group
        seen = {}
        if section.calibration is not None:
            seen = context.calibrated(model, section.calibration, [layer.name for layer in layers], "squares")
        zeros = total = 0
        for layer in layers:
            pruned = np.empty(layer.module.kernel.shape, layer.module.kernel.dtype)
            for at, matrix in layer.matrices():
                norms = None
                if section.calibration is not None:
                    squares = seen[layer.name, at[0] if at else 0].squares
                    assert squares is not None
                    norms = np.sqrt(squares)
                pruned[at] = np.where(mask_of(matrix, norms, section.sparsity, group), matrix, 0)
            set_like(layer.module.kernel, pruned)
            zeros, total = zeros + int((pruned == 0).sum()), total + pruned.size
        how = f"{section.method}, {section.pattern}"
        context.notes.append(
            f"pruned: {zeros:,} of {total:,} weights in {len(layers)} kinds of linear layers are 0 ({zeros / total:.1%}; {how}). Zeros are "
            "stored and multiplied as other weights are: the base is no smaller or faster for it."
        )
        return model


def _layers(model: Any, section: PruneConfig) -> list[LinearLayer]:
    """What is pruned; `InputError` where that cannot be done."""
    layers, group = linear_layers(model, section.skip, KEY), section.group
    for layer in layers:
        if group is not None and layer.shape[0] % group:
            raise InputError(f"{KEY}.pattern: {layer.name} has {layer.shape[0]} inputs, which {group} does not divide; skip it.")
        if layer.of_experts and section.calibration is not None:
            raise InputError(f"{KEY}.method: wanda has no statistics of single experts ({layer.name}): skip them, or take magnitude.")
    return layers


def mask_of(weight: np.ndarray, norms: np.ndarray | None, sparsity: float, group: int | None) -> np.ndarray:
    """Which weights are kept, (inputs, outputs) bool. Of equal scores those of the first inputs go.

    Args:
        weight: (inputs, outputs).
        norms: (inputs,) float64, of Wanda; None: the score is the weight's size, and compared within the matrix.
        sparsity: the share that goes, rounded down to whole weights, as Wanda's code does.
        group: of so many neighbouring inputs half go; None: where the scores are smallest.
    """
    scores = scores_of(weight, norms)
    inputs, outputs = weight.shape
    keep = np.ones((outputs, inputs), bool)
    if group is not None:
        parts = scores.T.reshape(outputs, -1, group)
        smallest = np.argsort(parts, axis=-1, kind="stable")[..., : group // 2]
        grouped = keep.reshape(parts.shape)
        np.put_along_axis(grouped, smallest, False, axis=-1)
        return grouped.reshape(outputs, inputs).T
    rows = scores.T if norms is not None else scores.T.reshape(1, -1)
    smallest = np.argsort(rows, axis=-1, kind="stable")[:, : int(rows.shape[1] * sparsity)]
    flat = keep.reshape(rows.shape)
    np.put_along_axis(flat, smallest, False, axis=-1)
    return flat.reshape(outputs, inputs).T


def scores_of(weight: np.ndarray, norms: np.ndarray | None) -> np.ndarray:
    """(inputs, outputs) float64: |W_ij|, times the norm of input i."""
    size = np.abs(weight.astype(np.float64))
    return size if norms is None else size * norms[:, None]


TRANSFORMS.register("prune", Prune())
