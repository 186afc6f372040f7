"""What is trainable: sites, shapes, counts, and their fraction of all parameters."""

from __future__ import annotations

import dataclasses

from flax import nnx
from rich.table import Table

from ..config.schema import AdapterConfig
from ..errors import InputError
from .inject import site_modules
from .layout import resolve
from .partition import partition
from .sites import find_sites


@dataclasses.dataclass(frozen=True)
class TrainableRow:
    """One line of the table: a site's adapter, or another trainable parameter.

    Attributes:
        name: of the site or parameter.
        label: the method of a site's adapter, or the parameter's optimizer group.
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
    """The trainable arrays of a model, and their fraction of all parameters."""

    rows: tuple[TrainableRow, ...]
    total: int

    @property
    def count(self) -> int:
        """The number of trainable parameters."""
        return sum(r.count for r in self.rows)

    @property
    def fraction(self) -> float:
        """Trainable parameters over all parameters, adapters included."""
        return self.count / self.total

    def __rich__(self) -> Table:
        table = Table(caption=f"{self.count:,} of {self.total:,} parameters train ({100 * self.fraction:.3f} %)")
        for heading in ("name", "label", "layers", "shape", "count"):
            table.add_column(heading, justify="left" if heading in ("name", "label") else "right")
        for r in self.rows:
            table.add_row(r.name, r.label, "" if r.layers is None else str(r.layers), " x ".join(map(str, r.shape)), f"{r.count:,}")
        return table


def describe(model: nnx.Module) -> Trainable:
    """A table of the trainable arrays of an adapted model (`inject`). Print it with rich, or read its `rows`.

    Layers that the config excludes, and padding, are not counted.
    """
    part = partition(model)
    rows = []
    for name, module in site_modules(model).items():
        site, ranks = module.site, module.ranks
        layers = sum(r > 0 for r in ranks) if module.stacked else None
        count = sum(module.method.count(site, r) for r in ranks if r)
        shape = (*(() if site.experts is None else (site.experts,)), site.inputs, max(ranks), site.outputs)
        rows.append(TrainableRow(name, module.method.name, layers, shape, count))
    for name, label in part.labels.items():
        if name not in part.parameters:
            array = part.trainable[name]
            rows.append(TrainableRow(name, label, None, tuple(array.shape), array.size))
    frozen = sum(a.size for a in part.frozen.values())
    return Trainable(tuple(rows), frozen + sum(r.count for r in rows))


def rank_for(model: nnx.Module, config: AdapterConfig, parameters: int) -> int:
    """The rank at which a config's adapter has as nearly as possible this many parameters, for comparisons at equal size.

    A rank-1 update of a matrix (in, out) has in + out of them, so attention and MLP of one size have different ranks. Only ranks that
    the method takes are tried, up to the width of the widest site; ranks that a `rank_pattern` fixes are left out of account.

    Args:
        model: a base, or one with a task's head, without adapters.
        config: targets and layers; its rank is not looked at.
        parameters: wanted in the whole adapter.

    Raises:
        InputError: a target or layer matches nothing, or the method takes no one rank at all sites.
    """
    member = resolve(model, config.model_copy(update={"rank_pattern": {}}), any_rank=True)
    method, every = member.method, {site.name: site for site in find_sites(model)}
    layers = {every[name]: int((own.ranks > 0).sum()) for name, own in member.sites.items()}
    best, refused = None, InputError(f"adapter.method: '{method.name}' has no rank.")
    for rank in range(1, max((max(site.inputs, site.outputs) for site in layers), default=0) + 1):
        try:
            for site in layers:
                method.check(member.config, site, rank)
        except InputError as error:
            refused = error
            continue
        off = abs(sum(count * method.count(site, rank) for site, count in layers.items()) - parameters)
        if best is None or off < best[0]:
            best = (off, rank)
    if best is None:
        raise refused
    return best[1]
