"""What is trainable: sites, shapes, counts, and their share of all parameters."""

from __future__ import annotations

import dataclasses
import math

from flax import nnx
from rich.table import Table

from .factors import factors_of, is_factor
from .partition import partition


@dataclasses.dataclass(frozen=True)
class TrainableRow:
    """One line of the table: a site's factors, or another trainable parameter.

    Attributes:
        name: of the site or parameter.
        label: its optimizer group (`lora` for a site's two factors).
        layers: how many layers it is adapted in, or None where it is not stacked.
        shape: of one layer: `(in, rank, out)` of a site, with the experts in front where it has them, else the parameter's own.
        count: trained numbers.
    """

    name: str
    label: str
    layers: int | None
    shape: tuple[int, ...]
    count: int


@dataclasses.dataclass(frozen=True)
class Trainable:
    """What trains in a model, and how much that is of all its parameters."""

    rows: tuple[TrainableRow, ...]
    total: int

    @property
    def count(self) -> int:
        """Trained numbers."""
        return sum(r.count for r in self.rows)

    @property
    def share(self) -> float:
        """Trained numbers over all, the adapters' own included."""
        return self.count / self.total

    def __rich__(self) -> Table:
        table = Table(caption=f"{self.count:,} of {self.total:,} parameters train ({100 * self.share:.3f} %)")
        for heading in ("name", "label", "layers", "shape", "count"):
            table.add_column(heading, justify="left" if heading in ("name", "label") else "right")
        for r in self.rows:
            table.add_row(r.name, r.label, "" if r.layers is None else str(r.layers), " x ".join(map(str, r.shape)), f"{r.count:,}")
        return table


def describe(model: nnx.Module) -> Trainable:
    """The table of what trains in an adapted model (`inject`); print it with rich, or read its `rows`.

    Layers that a config leaves out (their scale is 0) are not counted.
    """
    part = partition(model)
    rows = []
    for name, factors in factors_of(part).items():
        ranks, inputs, outputs = factors.ranks, factors.a.shape[-2], factors.b.shape[-1]
        layers = int((ranks > 0).sum()) if part.settings[f"{name}.scale"].ndim else None
        experts = factors.a.shape[1:-2]
        count = math.prod(experts) * int(ranks.sum()) * (inputs + outputs)
        rows.append(TrainableRow(name, "lora", layers, (*experts, inputs, int(ranks.max()), outputs), count))
    for name, label in part.labels.items():
        if not is_factor(name):
            array = part.trainable[name]
            rows.append(TrainableRow(name, label, None, tuple(array.shape), array.size))
    frozen = sum(a.size for a in part.frozen.values())
    return Trainable(tuple(rows), frozen + sum(r.count for r in rows))
