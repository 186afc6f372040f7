"""What is trainable: sites, shapes, counts, and their fraction of all parameters; and what each method would train.

python -m lora_jax.adapters.describe README.md    writes the table of methods anew
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax import nnx
from rich.table import Table

from ..config.doors import METHODS
from ..config.schema import AdapterConfig
from ..errors import InputError
from .inject import site_modules
from .labels import STATISTIC
from .layout import resolve
from .methods.base import Method
from .partition import partition
from .sites import Site, find_sites


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
        if name not in part.parameters and label != STATISTIC:
            array = part.trainable[name]
            rows.append(TrainableRow(name, label, None, tuple(array.shape), array.size))
    frozen = sum(a.size for a in part.frozen.values()) + sum(part.trainable[n].size for n, of in part.labels.items() if of == STATISTIC)
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
                method.check_start(member.config, site, rank)
        except InputError as error:
            refused = error
            continue
        off = abs(sum(count * method.count(site, rank) for site, count in layers.items()) - parameters)
        if best is None or off < best[0]:
            best = (off, rank)
    if best is None:
        raise refused
    return best[1]


# What the numbers of `method_table` are of.
_WIDTH, _RANK = 768, 8
_MARKS = ("<!-- methods: made by `make methods` -->", "<!-- end of methods -->")


def method_table() -> str:
    """A Markdown table of the library's own methods, as the registry has them, each with the defaults of its section.

    Its columns: what it is; the numbers it trains at a linear site of `in` inputs and `out` outputs at rank r, as a formula where it is a
    polynomial of these, and at 768 x 768 and rank 8; the FLOPs it adds there, of the site's own; how it packs; and PEFT's name of it.
    """
    own = {name: method for name, method in METHODS.all().items() if type(method).__module__.startswith("lora_jax.")}
    lines = ["| method | what | trained numbers a site | at 768 x 768, r = 8 | added FLOPs | packs | in PEFT |"]
    lines.append("| --- | --- | --- | ---: | ---: | --- | --- |")
    for name, method in sorted(own.items()):
        about = (sys.modules[type(method).__module__].__doc__ or "").partition("\n")[0]
        what, paper = re.sub(r"\s*\(.*|:.*|,.*", "", about).rstrip("."), re.search(r"arXiv:([0-9.]+[0-9])", about)
        what = f"[{what}](https://arxiv.org/abs/{paper[1]})" if paper else what
        site, words = _site(_WIDTH, _WIDTH), ["–", "–", "–"]
        if site.kind in method.kinds:
            cost = 100 * method.cost(site, _RANK) / (2 * _WIDTH * _WIDTH)
            words = [_formula(method), f"{method.count(site, _RANK):,}", f"{cost:.1f} %" if cost < 10 else f"{cost:.0f} %"]
        peft = "–" if method.peft is None else " ".join([method.peft.peft_type, *(f"`{flag}`" for flag in method.peft.flags)])
        lines.append(f"| `{name}` | {what} | {words[0] or 'other'} | {words[1]} | {words[2]} | {method.packs} | {peft} |")
    return "\n".join(lines)


def update_methods(path: Path) -> bool:
    """Puts `method_table` between the two marks of a Markdown file; returns whether that changed the file.

    Raises:
        InputError: the file lacks the marks.
    """
    text = path.read_text(encoding="utf-8")
    if any(text.count(mark) != 1 for mark in _MARKS):
        raise InputError(f"{path}: does not have the lines {_MARKS[0]} and {_MARKS[1]} once each.")
    before, rest = text.split(_MARKS[0])
    new = f"{before}{_MARKS[0]}\n{method_table()}\n{_MARKS[1]}{rest.split(_MARKS[1])[1]}"
    if new != text:
        path.write_text(new, encoding="utf-8")
    return new != text


def _site(inputs: int, outputs: int) -> Site:
    """A linear site by itself."""
    return Site(("site",), "linear", "site", (("site",),), None, "kernel", None, inputs, outputs, None, biased=True)


def _formula(method: Method) -> str:
    """The trained numbers of a linear site as a polynomial of its inputs, outputs and rank; "" where they are none."""
    terms: dict[str, Callable[[float, float, float], float]] = {
        "in out": lambda n, m, r: n * m,
        "in out / r": lambda n, m, r: n * m / r,
        "r in": lambda n, m, r: r * n,
        "r out": lambda n, m, r: r * m,
        "in": lambda n, m, r: n,
        "out": lambda n, m, r: m,
        "r²": lambda n, m, r: r * r,
        "r": lambda n, m, r: r,
        "": lambda n, m, r: 1,
    }
    points = [(n, m, r) for n in (768, 1536, 3072) for m in (768, 1536, 3072) for r in (4, 8, 16, 32)]
    values = np.array([[term(*point) for term in terms.values()] for point in points])
    counts = np.array([method.count(_site(n, m), r) for n, m, r in points])
    scale = np.abs(values).max(axis=0)
    factors = np.linalg.lstsq(values / scale, counts, rcond=None)[0] / scale
    halves = np.round(2 * factors) / 2
    if not np.array_equal(values @ halves, counts):
        return ""
    whole = 1 if np.array_equal(halves, np.round(halves)) else 2
    found = {name: round(whole * factor) for name, factor in zip(terms, halves.tolist(), strict=True) if factor}
    if found.get("r in") and found["r in"] == found.get("r out"):
        found = {"r (in + out)": found.pop("r in"), **{name: factor for name, factor in found.items() if name != "r out"}}
    words = [f"{'-' if f < 0 else '+'} {abs(f) if abs(f) > 1 or not name else ''} {name}" for name, f in found.items()]
    text = re.sub(" +", " ", " ".join(words)).strip().removeprefix("+ ")
    return text if whole == 1 else f"({text}) / {whole}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}: {'updated' if update_methods(Path(name)) else 'as it should be'}")
