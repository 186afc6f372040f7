"""Labels: one ordered `regex -> label` table says of every parameter whether it trains, and in which optimizer group."""

from __future__ import annotations

import re

from ..errors import nearest
from ..models.head_shape import HEAD_MODULES
from .layout import Structure

FROZEN = "frozen"
# Trainable labels; the optimizer has a transform for each.
TRAINABLE = ("adapter_a", "adapter_b", "head", "saved", "norm", "bias", "full")

Table = tuple[tuple[str, str], ...]


def label_of(name: str, table: Table) -> str:
    """The label of the first regex that matches the whole name.

    >>> label_of("layers.attn.q_proj.lora_a", ((r".*\\.lora_a", "adapter_a"), (r".*", "frozen")))
    'adapter_a'

    Raises:
        ValueError: no regex matches; the message names the nearest ones.
    """
    for pattern, label in table:
        if re.fullmatch(pattern, name):
            return label
    near = nearest(name, [p for p, _ in table]) or [p for p, _ in table]
    raise ValueError(f"parameter '{name}' matches no regex of the label table; nearest: {', '.join(near)}")


def label_table(structure: Structure) -> Table:
    """The table of a structure. A task's head always trains; then what the method, `bias` and `modules_to_save` ask for."""
    head = ((rf"(.*\.)?({'|'.join(HEAD_MODULES)})\..*", "head"),)
    if structure.method == "head":
        return (*head, (r".*", FROZEN))
    if structure.method == "full":
        return (*head, (r"(.*\.)?[a-z_]*norm\..*", "norm"), (r".*\.bias", "bias"), (r".*", "full"))
    saved = tuple((rf"(.*\.)?{re.escape(name)}\..*", "saved") for name in structure.modules_to_save)
    biases: Table = ()
    if structure.bias == "all":
        biases = ((r"(.*\.)?bias", "bias"),)
    elif structure.bias == "lora_only":
        biases = tuple((rf"{re.escape(s.site.name)}\.bias", "bias") for s in structure.sites)
    factors = ((r".*\.lora_a", "adapter_a"), (r".*\.lora_b", "adapter_b"))
    return (*factors, *head, *saved, *biases, (r".*", FROZEN))
