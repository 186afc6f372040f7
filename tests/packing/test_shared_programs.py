"""Packs of one program key are run by the programs that the first of them compiled, with the same bits."""

from __future__ import annotations

import pytest

from experiments.fuzz import bits_of_run, differing
from lora_jax.packing import choice as pack_modes
from lora_jax.packing.choice import Choice
from lora_jax.packing.cost import PackMemory, PackShapes
from lora_jax.packing.execution import SCAN, VMAP
from lora_jax.packing.pack import Pack
from lora_jax.sweeps.plan import estimate
from lora_jax.sweeps.run import run_sweep
from lora_jax.tracking import Progress
from lora_jax.training.setup import SingleSlotCache
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")

QUIET = {"training.steps": 4, "training.eval_every": 2, "tracking.tensorboard": False}
RATES = {"grid": {"optimizer.learning_rate": [0.01, 0.02], "training.seed": [0, 1]}, "max_pack": 2}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


@pytest.fixture
def separately(monkeypatch):
    """Every pack compiles its own."""
    return lambda: monkeypatch.setattr(SingleSlotCache, "find", lambda self, key: None)


@pytest.fixture
def uncompiled(monkeypatch):
    """Sizes of the packs that would be compiled for their memory."""
    sizes = []

    def memory(self, members):
        sizes.append(members)
        return PackMemory(1, 1, 1, 1)

    monkeypatch.setattr(PackShapes, "memory", memory)
    return sizes


@pytest.mark.parametrize("mode", ["vmap", pytest.param("scan", marks=pytest.mark.long)])
def test_four_members_in_two_packs_compile_one_pair(hub, tmp_path, separately, capsys, mode):
    changes = QUIET | {"sweep": RATES, "training.pack": mode}
    shared = run_sweep(hub.config(tmp_path, changes), progress=Progress())
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("trained parameters; compiling") == 1 and said.count("uses the compiled programs of an earlier pack") == 1
    separately()
    apart = run_sweep(hub.config(tmp_path, changes, name="apart"))
    assert (shared.compiled_programs, apart.compiled_programs) == (2, 4)
    assert not differing(bits_of_run(shared.path), bits_of_run(apart.path))
    assert len({tuple(r.final.items()) for r in shared.results}) == 4  # members are not each other's


@pytest.mark.parametrize(
    "grid",
    [
        {"adapter.rank": [2, 3]},
        pytest.param({"adapter.targets": [["q_proj"], ["v_proj"]]}, marks=pytest.mark.slow),
        {"adapter.layers": [None, "last:1"]},
        pytest.param({"adapter.dropout": [0.0, 0.5]}, marks=pytest.mark.slow),
        pytest.param({"adapter.bias": ["none", "all"]}, marks=pytest.mark.slow),
    ],
    ids=lambda grid: next(iter(grid)),
)
def test_packs_of_other_keys_compile_their_own(hub, tmp_path, uncompiled, grid):
    found = estimate(hub.config(tmp_path, QUIET | {"sweep": {"grid": grid, "max_pack": 1}}))
    assert len(found.packs) == found.programs == 2


def test_a_plan_counts_what_is_compiled_once(hub, tmp_path, uncompiled):
    found = estimate(hub.config(tmp_path, QUIET | {"sweep": RATES}))
    assert len(found.packs) == 2 and found.programs == 1
    assert uncompiled == [2]
    assert found.seconds == pytest.approx(found.packs[0].compiling + sum(p.training for p in found.packs))


@pytest.mark.slow
def test_a_pack_of_another_mode_compiles_its_own(hub, tmp_path, monkeypatch):
    """As where a resumed run finds another choice recorded for one of its packs."""
    modes = iter([VMAP, SCAN])
    monkeypatch.setattr(pack_modes.PackModes, "_recorded", lambda self, names: Choice(next(modes), "recorded", {}, "cpu"))
    outcome = run_sweep(hub.config(tmp_path, QUIET | {"sweep": RATES}))
    assert outcome.compiled_programs == 4 and {r.status for r in outcome.results} == {"finished"}


def test_packs_of_one_key_follow_one_another(hub, tmp_path, uncompiled):
    """Eleven members of at most three make packs of two and of three; each size is compiled once."""
    found = estimate(hub.config(tmp_path, QUIET | {"sweep": {"grid": {"training.seed": list(range(11))}, "max_pack": 3}}))
    sizes = [len(p.plan.members) for p in found.packs]
    assert sorted(sizes) == [2, 3, 3, 3] and found.programs == len(uncompiled) == 2
    names = [m.name for p in found.packs for m in p.plan.members]
    assert sorted(names) == sorted(f"seed={k}" for k in range(11))


def test_programs_of_another_key_are_not_held():
    """Their code takes memory that no plan counts."""
    base = tiny.classifier(2)
    one, other = (Pack.build(base, [tiny.config(adapter__rank=rank)], 4) for rank in (1, 2))
    again = Pack.build(base, [tiny.config(adapter__rank=1, optimizer__learning_rate=0.5, training__seed=9)], 4)
    newest = SingleSlotCache()
    newest.get(one.program_key, lambda: one.programs)
    assert newest.find(again.program_key) is one.programs
    assert newest.find(other.program_key) is None and newest.find(one.program_key) is None
