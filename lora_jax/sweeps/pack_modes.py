"""How the packs of a run are run, where the config leaves that open: chosen once, kept in the run directory, and taken from there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ..config.errors import InputError
from ..parallel.processes import is_writer
from ..tracking import RunDirectory, read_json, write_json
from ..training.pack import Pack, static_key
from ..training.pack_choice import Choice, choose, told_mode
from ..training.prefix import Prefix
from ..training.setup import Setup, setup_key

_FILE = "mode.json"


class PackModes:
    """The choices of a run, one a pack, each beside the pack's checkpoints; packs that are alike in what is static share one.

    Args:
        run: the run.
    """

    def __init__(self, run: RunDirectory):
        self._run = run
        self._by_kind: dict[str, Choice] = {}
        for file in sorted((run.path / "checkpoints").glob(f"*/{_FILE}")):
            try:
                facts = read_json(file)
                self._by_kind.setdefault(facts["kind"], Choice.load(facts))
            except (InputError, KeyError, TypeError):
                continue  # damaged: chosen anew

    def settle(self, names: Sequence[str], pack: Pack, setup: Setup, prefix: Prefix | None) -> str | None:
        """Gives a pack the programs of its mode.

        Args:
            names: of its members.
            pack: about to train.
            setup: its data.
            prefix: what its members have in common.

        Returns:
            what was chosen and why, for the console; None where there was nothing to choose.
        """
        config = pack.configs[0]
        if told_mode(config) is not None or len(names) == 1:
            return None
        kind = hashlib.sha256(repr((setup_key(config), static_key(config))).encode()).hexdigest()[:12]
        file = self._run.checkpoints(names) / _FILE
        known = self._recorded(file) or self._by_kind.get(kind)
        choice = known or choose(pack, setup, prefix)
        if choice.mode != pack.programs.mode:
            pack.use_mode(choice.mode)
        self._by_kind.setdefault(kind, choice)
        if is_writer() and not file.exists():
            write_json(file, {"kind": kind, "members": len(names)} | choice.dump())
        if not choice.seconds:
            return f"runs as {choice.mode.name}: {choice.why}"
        figures = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in choice.seconds.items())
        return f"runs as {choice.mode.name}; {'measured' if known is None else 'as measured before'} on {choice.device}: {figures} a step"

    def _recorded(self, file: Path) -> Choice | None:
        try:
            return Choice.load(read_json(file))
        except (InputError, KeyError, TypeError):
            return None
