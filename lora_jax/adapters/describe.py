"""What is trainable: sites, shapes, counts, and their share of all parameters."""

from __future__ import annotations

import dataclasses
import math

from flax import nnx
from rich.table import Table

from ..config.schema import AdapterConfig
from .factors import factors_of, is_factor
from .layout import resolve
from .partition import partition
from .sites import find_sites


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


def rank_for(model: nnx.Module, config: AdapterConfig, parameters: int) -> int:
    """The rank at which a config's factors have as nearly as possible this many parameters, for comparisons at equal size.

    A rank-1 update of a matrix (in, out) has in + out of them, so attention and MLP of one size have different ranks. Ranks that a
    `rank_pattern` fixes are left out of account.

    Args:
        model: a base, or one with a task's head, without adapters.
        config: targets and layers; its rank is not looked at.
        parameters: wanted in all factors together.

    Raises:
        InputError: a target or layer matches nothing.
    """
    spec = resolve(model, config.model_copy(update={"rank": 1, "rank_pattern": {}}))
    sizes = {site.name: site.inputs + site.outputs for site in find_sites(model)}
    each = sum(int(member.ranks.sum()) * sizes[name] for name, member in spec.sites.items())
    return max(1, round(parameters / each))
