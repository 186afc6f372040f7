"""Where parameters come from: tensors' names in a checkpoint, and how they lie there."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from ..head_shape import HeadShape


def oriented(name: str, axes: Sequence[Any]) -> tuple[Any, ...]:
    """PyTorch's axes of a weight in our order, or ours in PyTorch's: reversed, but for the first of a stack of experts."""
    kept = 1 if ".experts." in name and len(axes) == 3 else 0
    return (*axes[:kept], *axes[kept:][::-1])


@dataclasses.dataclass(frozen=True)
class Weight:
    """Where a parameter comes from.

    Attributes:
        name: a Hugging Face tensor name, `{i}` standing for the layer and `{e}` for the expert: one tensor each.
        transpose: turns PyTorch's (..., out, in) into our (..., in, out).
        joined: names of tensors of the same shape whose outputs come after those of `name`.
        called: what transformers' module calls the parameter, where its files say otherwise. A file may use this name as well; it then
            holds one tensor of what `{e}` and `joined` take apart.
        first: the first layer that has it. Ours below hold ones: a norm that is not used there (`BlockConfig.first_norm`).
    """

    name: str
    transpose: bool = False
    joined: tuple[str, ...] = ()
    called: str = ""
    first: int = 0

    @property
    def parameter(self) -> str:
        """The parameter's name in transformers' module."""
        return self.called or self.name

    def layers(self, depth: int) -> list[int | None]:
        """The layers that have it, of a model of `depth`; [None] of what is no layer's."""
        return [*range(self.first, depth)] if "{i}" in self.name else [None]

    def of_layer(self, layer: int | None) -> str:
        """The parameter's name in one of `layers`."""
        return self.parameter.replace("{i}", str(layer))

    @property
    def leading(self) -> int:
        """How many leading axes of the parameter count tensors: layers, experts."""
        return ("{i}" in self.name) + ("{e}" in self.name)

    def tensors(self, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], int, str]]:
        """The tensors of a parameter of this shape: where each lies along the leading axes, which of the joined ones it is, its name."""
        for at in itertools.product(*map(range, shape[: self.leading])):
            if at and at[0] < self.first:
                continue
            numbers = dict(zip((mark for mark in ("{i}", "{e}") if mark in self.name), at, strict=True))
            for piece, name in enumerate((self.name, *self.joined)):
                for mark, number in numbers.items():
                    name = name.replace(mark, str(number))
                yield at, piece, name

    def found(self, names: Collection[str]) -> Weight:
        """The same under the name by which a file of these tensors has it."""
        other = dataclasses.replace(self, name=self.called, joined=())
        return other if self.called and self.called.replace("{i}", "0") in names else self

    def under(self, rename: Callable[[str], str]) -> Weight:
        """The same with its names as `rename` makes them."""
        called = rename(self.called) if self.called else ""
        return dataclasses.replace(self, name=rename(self.name), joined=tuple(map(rename, self.joined)), called=called)

    def oriented(self, shape: Sequence[Any]) -> tuple[Any, ...]:
        """What is said of each axis (sizes, slices) in the file's layout in ours, or the other way round."""
        return oriented(self.parameter, shape) if self.transpose else tuple(shape)


@dataclasses.dataclass(frozen=True)
class Head:
    """A head as a family's checkpoints hold it (`BertForTokenClassification` and its like).

    Attributes:
        shape: of the head.
        modules: our module path (`classifier`, `pre_classifier`, `classifier_norm`) -> Hugging Face module path.
        renamed: what the base's tensors are called under this head: (start of the name, what stands there instead).
    """

    shape: HeadShape
    modules: dict[str, str]
    renamed: tuple[str, str] | None = None

    def weights(self) -> dict[str, Weight]:
        """Parameter path -> Weight, of the head alone."""
        linears = {ours: theirs for ours, theirs in self.modules.items() if ours != "classifier_norm"}
        table = {f"{ours}.kernel": Weight(f"{theirs}.weight", transpose=True) for ours, theirs in linears.items()}
        biased = {"classifier": self.shape.bias, "pre_classifier": self.shape.dense_bias}
        table |= {f"{ours}.bias": Weight(f"{theirs}.bias") for ours, theirs in linears.items() if biased[ours]}
        if self.shape.norm:
            name = self.modules["classifier_norm"]
            table["classifier_norm.scale"] = Weight(f"{name}.weight")
            if self.shape.norm_bias:
                table["classifier_norm.bias"] = Weight(f"{name}.bias")
        return table
