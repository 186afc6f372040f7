"""Evaluating saved adapters again."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp

from ..config.errors import InputError, hint
from ..tracking import Progress
from ..training.adapter_files import load_adapter
from ..training.loop import evaluate_pack
from ..training.pack import Pack
from ..training.setup import Preparer
from .restore import adapter_folder_of, named_member, run_members

SPLITS = ("eval", "train")


def evaluate_run(run: Path, *, member: str | None, split: str, progress: Progress) -> dict[str, dict[str, float]]:
    """Metrics of a run's saved adapters, the best of each member where that was kept.

    Args:
        run: a run directory.
        member: one member's name; all by default.
        split: `eval` (held-out rows) or `train`.
        progress: the console.

    Returns:
        member name -> metric -> value.

    Raises:
        InputError: not a run directory, no such member or split, no saved adapter, or one that is damaged.
    """
    if split not in SPLITS:
        raise InputError(f"--split: '{split}'. {hint(split, SPLITS)}")
    members = run_members(run)
    chosen = members if member is None else [named_member(members, member, "--member")]
    results: dict[str, dict[str, float]] = {}
    prepare = Preparer()
    with progress.track(len(chosen), "evaluating") as track:
        for number, one in enumerate(chosen, 1):
            folder = adapter_folder_of(run, one)
            setup = prepare(one.config)
            pack = Pack.build(setup.model, [one.config], setup.steps, setup.mesh)
            arrays = load_adapter(folder, pack.member_arrays(setup.model, 0, pack.state.trainable))
            examples = setup.data.held_out if split == "eval" else setup.data.train
            metrics = evaluate_pack(pack, setup, {n: jnp.asarray(a)[None] for n, a in arrays.items()}, examples)
            results[one.name] = {name: float(values[0]) for name, values in metrics.items()}
            track.update(number)
    return results
