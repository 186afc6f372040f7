"""Packs of one form are run by one pair of programs: the first of them compiles it."""

from __future__ import annotations

from .pack import Form, Pack
from .step import PackPrograms


class ProgramStore:
    """Compiled programs of a set-up's packs, by the packs' form.

    Those used last are kept; no more, since a program takes memory and a long sweep may have many.

    Args:
        room: forms.
    """

    def __init__(self, room: int = 4):
        self._room = room
        self._by_form: dict[Form, PackPrograms] = {}

    def find(self, pack: Pack) -> PackPrograms | None:
        """What an earlier pack of this form left, in whatever mode it ran."""
        return self._by_form.get(pack.form)

    def keep(self, pack: Pack) -> None:
        """Keeps the programs of a pack that was trained; what it has in memory otherwise is not held."""
        self._by_form.pop(pack.form, None)
        self._by_form[pack.form] = pack.programs
        while len(self._by_form) > self._room:
            del self._by_form[next(iter(self._by_form))]
