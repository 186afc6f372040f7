"""Labels: which parameters train, and in which optimizer group. One ordered `regex -> label` table says it of every parameter."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import nearest
from ..models.layers import HEAD_MODULES

FROZEN = "frozen"
# Running statistics, which a member keeps as its own: the forward pass updates them, no gradient does.
STATISTIC = "statistic"
# The labels of a base's parameters and of low-rank factors; the optimizer always has a transform for each.
TRAINABLE = ("adapter_a", "adapter_b", "head", "saved", "norm", "bias", "full")

Table = tuple[tuple[str, str], ...]

# A task's head trains whatever the method.
HEAD: Table = ((rf"(.*\.)?({'|'.join(HEAD_MODULES)})\..*", "head"),)


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


def base_labels(sites: Sequence[str], bias: str, modules_to_save: Sequence[str]) -> Table:
    """The base's parameters under a method that adapts sites: the head, the modules to save, the biases; the rest is frozen.

    Args:
        sites: names of the adapted sites.
        bias: as `adapter.bias`.
        modules_to_save: by our own names.
    """
    saved = tuple((rf"(.*\.)?{re.escape(name)}\..*", "saved") for name in modules_to_save)
    biases: Table = ()
    if bias == "all":
        biases = ((r"(.*\.)?bias", "bias"),)
    elif bias == "lora_only":
        biases = tuple((rf"{re.escape(site)}\.bias", "bias") for site in sites)
    return (*HEAD, *saved, *biases, (r".*", FROZEN))
