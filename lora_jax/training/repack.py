"""Members half-way, moved from the packs they trained in to another: the winners of a rung go on together, without the rest.

A member's arrays are cut out of the padded shapes of its old pack and put into those of the new one; padding is zero in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from ..config.errors import RunError
from ..parallel.mesh import to_host
from .checkpoints import Saved
from .pack import Pack, Window

Source = tuple[Pack, int, Saved]


def repack(model: nnx.Module, sources: Sequence[Source], target: Pack) -> Saved:
    """What a checkpoint of `target` would say, had its members trained in it from the start.

    Args:
        model: the base that all packs stand on.
        sources: for each member of `target` the pack it was in, its place there, and that pack's checkpoint; all of one step.
        target: the new pack, freshly built.

    Raises:
        RunError: the checkpoints are of different steps.
    """
    steps = {saved.step for _, _, saved in sources}
    if len(steps) != 1:
        raise RunError(f"members of steps {', '.join(map(str, sorted(steps)))} cannot go on in one pack")
    windows = [(pack.windows(model, index), target.windows(model, k)) for k, (pack, index, _) in enumerate(sources)]
    state = _moved(target.state, [saved.state for _, _, saved in sources], [i for _, i, _ in sources], windows)
    best = None
    if all(saved.best is not None for _, _, saved in sources):
        best = _moved(target.state.trainable, [saved.best for _, _, saved in sources], [i for _, i, _ in sources], windows)
    return Saved(steps.pop(), state, best, _loop([(index, saved.loop) for _, index, saved in sources]))


def _moved(like: Any, trees: Sequence[Any], places: Sequence[int], windows: Sequence[tuple[dict[str, Window], dict[str, Window]]]) -> Any:
    """A tree as `like`, (members, ...), each member's part taken from its place in its own tree."""
    olds = [{jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)} for tree in trees]

    def leaf(path: Any, fresh: jax.Array) -> jax.Array:
        last = path[-1]
        name = last.key if isinstance(last, jax.tree_util.DictKey) else ""
        rows = np.array(to_host(fresh))  # a site that a member lacks is as it was built: zero
        for row, (old, place, (before, after)) in enumerate(zip(olds, places, windows, strict=True)):
            found = old.get(jax.tree_util.keystr(path))
            if name not in after:
                if found is not None:
                    rows[row] = to_host(found[place])
            elif after[name] is not None:
                assert found is not None and before[name] is not None
                rows[row] = 0
                rows[row][after[name]] = to_host(found[place])[before[name]]
        return jax.device_put(rows, fresh.sharding)

    return jax.tree_util.tree_map_with_path(leaf, like)


def _loop(members: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """The loop's own numbers of members from several packs."""

    def pick(*path: str) -> list[Any]:
        found = []
        for index, loop in members:
            value: Any = loop
            for part in path:
                value = value[part]
            found.append(value[index])
        return found

    first = members[0][1]
    rows = range(len(first["window"]))
    window = [{name: [loop["window"][row][name][i] for i, loop in members] for name in first["window"][row]} for row in rows]
    return {
        "best": {
            "score": pick("best", "score"),
            "step": pick("best", "step"),
            "metrics": {name: pick("best", "metrics", name) for name in first["best"]["metrics"]},
        },
        "window": window,
        "final": {name: pick("final", name) for name in first["final"]},
        "tokens": first["tokens"],
        "seconds": max(loop["seconds"] for _, loop in members),
    }
