"""What a base transform is, and how those that a config lists (`model.transforms`) are applied."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from ...config.doors import TRANSFORMS
from ...config.schema import TransformConfig
from ...errors import InputError
from ..encoder_decoder import Base
from ..heads import Classifier
from .calibration import Calibrate, CalibrationConfig, Seen


@dataclasses.dataclass(frozen=True)
class TransformContext:
    """What a transform may need beside the model and its own section.

    Attributes:
        source: of the checkpoint, as the config names it.
        mesh: the devices the weights lie on; None: the default device.
        calibrate: passes rows of text through the base, for transforms that choose by what its layers see of them.
        notes: what transforms did and what it costs, a line each, for a person to read; the base then has them as `transform_notes`.
    """

    source: str
    mesh: Mesh | None = None
    calibrate: Calibrate | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    def calibrated(self, base: Base, section: CalibrationConfig, names: Sequence[str], what: str) -> Mapping[tuple[str, int], Seen]:
        """(name, layer) -> what that linear layer sees of the section's rows.

        Args:
            base: as it is now.
            names: of its linear layers (`weights.linear_layers`).
            what: `squares` or `moment`.

        Raises:
            InputError: the rows will not do, or whoever loads the base gave no function for it.
        """
        if self.calibrate is None:
            raise InputError("model.transforms: calibration: nothing here reads rows; load the base with calibrate=lora_jax.calibrate.")
        return self.calibrate(self.source, base, section, names, what)


class BaseTransform(ABC):
    """Changes a base once, before it is fingerprinted, adapted and trained over: quantisation, pruning, low-rank compression.

    Registered under its name: `register_transform("round", Round())`.

    Attributes:
        section: its part of the config, a `TransformConfig` with `kind: Literal["round"]`.
    """

    section: type[TransformConfig]

    @abstractmethod
    def apply(self, model: Base, section: Any, context: TransformContext) -> Base:
        """The transformed base: `model`, changed in place, or another.

        Equal inputs give equal bits: a run's adapters are evaluated and exported over a base that is transformed anew. The
        numbers it stores are `nnx.Param`s, which is what the fingerprint covers; their logical axes stay in their metadata.

        Args:
            model: as loaded, or as the transform listed before left it.
            section: an instance of the class's `section`.
            context: where the model came from and lies.
        """

    def shapes(self, model: Base, section: Any) -> Base:
        """The transformed base of a model whose parameters are shapes (`jax.ShapeDtypeStruct`), changed in place or another. A transform
        that does not say it is applied to the weights before a run is planned, and again before it is trained.

        Raises:
            InputError: as `apply`, as far as shapes decide.
        """
        raise NotImplementedError


def shapes_known(sections: Sequence[TransformConfig]) -> bool:
    """Whether all of these say what shapes they give (`BaseTransform.shapes`)."""
    transforms = [TRANSFORMS.get(section.kind, "model.transforms") for section in sections]
    return all(type(transform).shapes is not BaseTransform.shapes for transform in transforms)


def apply_shapes(model: Base | Classifier, sections: Sequence[TransformConfig]) -> Base | Classifier:
    """A base, or the one that a head stands on, as all transforms leave it, where parameters are shapes; all of them say theirs."""
    base: Any = model.base if isinstance(model, Classifier) else model
    for section in sections:
        base = TRANSFORMS.get(section.kind, "model.transforms").shapes(base, section)
    if not isinstance(model, Classifier):
        return base
    model.base = base
    return model


def apply_transforms(model: Base, sections: Sequence[TransformConfig], context: TransformContext) -> Base:
    """The base after all transforms that are listed, in their order.

    Raises:
        InputError: no transform of a section's kind is registered.
    """
    for section in sections:
        model = TRANSFORMS.get(section.kind, "model.transforms").apply(model, section, context)
    if context.notes:
        model.transform_notes = nnx.static(tuple(context.notes))  # pyright: ignore[reportAttributeAccessIssue]
    return model


register_transform = TRANSFORMS.register
