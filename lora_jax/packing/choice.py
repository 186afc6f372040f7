"""`training.pack: auto`: the fastest mode of running a pack on the device at hand, found by running a few steps in each.

A mode is chosen once, kept in the run's state, and taken from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import OutOfMemory, is_out_of_memory
from ..parallel.processes import is_writer, process_count
from ..tracking import RunDirectory
from ..training.setup import Setup, setup_key
from ..training.trunk import Trunk
from .execution import SCAN, VMAP, PackMode, configured_mode, why_scanned
from .pack import Pack, static_key

# Runs of fewer steps are over before a measurement has paid for itself: it takes about ten steps, and compiles two more programs.
WORTH_MEASURING = 200
_TIMED_STEPS = 2
# Numbers in one member's hidden states from which it keeps a CPU busy by itself: members side by side only fill the caches then
# (8 members of the quickstart, 344,000 numbers each, on 2 cores: 2.9 s a step scanned, 3.7 s side by side; the tests' models: 10,000).
_BUSY_CPU = 100_000
# Another way must be faster than side by side by more than this fraction: a choice should not depend on what else the machine does.
_MARGIN = 0.1


@dataclasses.dataclass(frozen=True)
class Choice:
    """The chosen mode, and why.

    Attributes:
        mode: how the pack will run.
        why: in words.
        seconds: name of each mode that was measured -> seconds a step; empty where nothing was.
        device: it was measured on.
    """

    mode: PackMode
    why: str
    seconds: dict[str, float]
    device: str

    def dump(self) -> dict[str, Any]:
        """As JSON values."""
        return {"mode": self.mode.name, "width": self.mode.width, "why": self.why, "seconds_per_step": self.seconds, "device": self.device}

    @classmethod
    def load(cls, facts: dict[str, Any]) -> Choice:
        """What `dump` gave."""
        return cls(PackMode(facts["width"]), facts["why"], facts["seconds_per_step"], facts["device"])


def choose(pack: Pack, setup: Setup, trunk: Trunk | None) -> Choice:
    """Chooses a mode for a pack that is about to train, and leaves it with that mode's programs, compiled if they were measured.

    Each mode takes a few steps from copies of the pack's state on the first batch, as it will be in training; the state itself is
    left alone. Modes that do not fit into memory are passed over. What the other modes compile is no part of the pack's own count.

    Args:
        pack: at whatever state.
        setup: its data.
        trunk: what its members have in common.
    """
    device = jax.devices()[0].device_kind
    candidates = _candidates(pack, setup)
    if len(candidates) == 1:
        return Choice(VMAP, "there is one member per device", {}, device)
    if setup.steps < WORTH_MEASURING or process_count() > 1:
        short = f"a run of {setup.steps} steps is too short to measure the modes"
        why = "several processes train together" if process_count() > 1 else short
        if _keeps_cpu_busy(setup):
            return Choice(SCAN, f"{why}, and a single member keeps the CPU busy", {}, device)
        return Choice(_first_that_fits(pack, setup, trunk, candidates), why, {}, device)
    batch = first_batch(pack, setup, trunk)
    seconds: dict[PackMode, float] = {}
    programs = {}
    passed_over: list[str] = []
    for mode in candidates:
        pack.use_mode(mode)
        try:
            seconds[mode] = _measure(pack, batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            passed_over.append(mode.name)
            continue
        programs[mode] = pack.programs
    if not seconds:
        return Choice(SCAN, "no other mode fits into memory", {}, device)  # nor does this, and training will say so
    best = min(seconds, key=lambda mode: seconds[mode])
    if VMAP in seconds and seconds[best] > (1 - _MARGIN) * seconds[VMAP]:
        best = VMAP
    pack.programs = programs[best]
    why = f"measured; too large for memory: {', '.join(passed_over)}" if passed_over else "measured"
    return Choice(best, why, {mode.name: round(s, 6) for mode, s in seconds.items()}, device)


def first_batch(pack: Pack, setup: Setup, trunk: Trunk | None) -> dict[str, jax.Array]:
    """The first training batch as the pack's step takes it."""
    return setup.step_inputs(0, setup.plan.batch(0), trunk)


def _candidates(pack: Pack, setup: Setup) -> list[PackMode]:
    """From most memory to least."""
    own = -(-len(pack.configs) // setup.mesh.shape["sweep"])
    chunk = pack.configs[0].training.chunk
    return [VMAP] + [PackMode(width) for width in sorted({chunk, 1}, reverse=True) if width < own]


def _keeps_cpu_busy(setup: Setup) -> bool:
    if jax.default_backend() != "cpu":
        return False
    return setup.plan.batch(0)["segment_ids"][0].size * setup.layer_sizes[0] >= _BUSY_CPU


def _first_that_fits(pack: Pack, setup: Setup, trunk: Trunk | None, candidates: list[PackMode]) -> PackMode:
    if pack.programs.train.limit is None:
        return candidates[0]
    for mode in candidates:
        pack.use_mode(mode)
        try:
            check_fits(pack, setup, trunk)
        except OutOfMemory:
            continue
        return mode
    return candidates[-1]


def check_fits(pack: Pack, setup: Setup, trunk: Trunk | None) -> None:
    """Compiles a pack's programs where there is a limit of memory, before anything is trained.

    Raises:
        OutOfMemory: one of them needs more.
    """
    programs = pack.programs
    if programs.train.limit is None:
        return
    programs.train.prepare(pack.state, pack.fixed, pack.part.frozen, first_batch(pack, setup, trunk), np.int32(0))
    held_out = setup.held_out_inputs(next(iter(setup.plan.eval_batches())), trunk)
    programs.evaluate.prepare(pack.state.trainable, pack.fixed.settings, pack.part.frozen, held_out)


def _measure(pack: Pack, batch: dict[str, jax.Array]) -> float:
    """Seconds of a step, the fastest of a few; the first, which compiles, is not timed."""
    state = jax.tree.map(jnp.copy, pack.state)
    times = []
    for step in range(1 + _TIMED_STEPS):
        began = time.perf_counter()
        state, metrics = pack.programs.train(state, pack.fixed, pack.part.frozen, batch, np.int32(step))
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - began)
    return min(times[1:])


class PackModes:
    """The modes of a run's packs. A pack that has none yet takes that of another pack that is alike in what is static.

    Args:
        run: the run.
    """

    def __init__(self, run: RunDirectory):
        self._run = run
        self._by_kind: dict[str, Choice] = {}
        for facts in run.state().execution.values():
            if (choice := _loaded(facts)) is not None:
                self._by_kind.setdefault(str(facts.get("kind")), choice)

    def settle(self, names: Sequence[str], pack: Pack, setup: Setup, trunk: Trunk | None) -> str | None:
        """Gives a pack the programs of its mode.

        Args:
            names: of its members.
            pack: about to train.
            setup: its data.
            trunk: what its members have in common.

        Returns:
            how it runs and why, for the console; None where the config says so.
        """
        config = pack.configs[0]
        if configured_mode(config) is not None or len(names) == 1:
            why = why_scanned(config)
            return None if why is None or len(names) == 1 else f"runs as scan: {why}"
        kind = hashlib.sha256(repr((setup_key(config), static_key(config))).encode()).hexdigest()[:12]
        recorded = self._recorded(names)
        known = recorded or self._by_kind.get(kind)
        choice = known or choose(pack, setup, trunk)
        if choice.mode != pack.programs.mode:
            pack.use_mode(choice.mode)
        self._by_kind.setdefault(kind, choice)
        if is_writer() and recorded is None:
            facts = {"kind": kind, "members": len(names)} | choice.dump()
            self._run.update_state(lambda state: state.execution.update({self._run.pack_id(names): facts}))
        if not choice.seconds:
            return f"runs as {choice.mode.name}: {choice.why}"
        figures = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in choice.seconds.items())
        return f"runs as {choice.mode.name}; {'measured' if known is None else 'as measured before'} on {choice.device}: {figures} a step"

    def _recorded(self, names: Sequence[str]) -> Choice | None:
        facts = self._run.state().execution.get(self._run.pack_id(names))
        return None if facts is None else _loaded(facts)


def _loaded(facts: dict[str, Any]) -> Choice | None:
    """None where the facts are damaged: the pack then chooses anew."""
    try:
        return Choice.load(facts)
    except (KeyError, TypeError):
        return None
