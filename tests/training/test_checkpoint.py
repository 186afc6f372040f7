"""Checkpoints: what is read back, what is kept, what a damaged or half-written one does."""

from __future__ import annotations

import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lora_jax.errors import InputError
from lora_jax.training.checkpoint import PackCheckpoints
from lora_jax.training.step import MemberState
from tests import tiny


def state(value=1.0):
    arrays = {"b": jnp.full((2, 3), value), "a": jnp.arange(8.0).reshape(2, 4) * value}
    return MemberState(arrays, ({"mu": jax.tree.map(jnp.sin, arrays)}, jnp.array([3, 3], jnp.int32)), jnp.array([True, False]))


@pytest.fixture
def open_pack(tmp_path):
    opened, told = [], []

    def make(members=("a", "b"), base="base", keep=2, **options):
        opened.append(PackCheckpoints(tmp_path / "pack", members, base, keep=keep, warn=told.append, **options))
        return opened[-1]

    make.told, make.folder = told, tmp_path / "pack"
    yield make
    for one in opened:
        one.close()


def test_what_is_saved_comes_back_bit_for_bit(open_pack):
    pack = open_pack()
    assert pack.restore(state()) is None
    pack.save(1, state(1.0), {"n": 1, "scores": [float("-inf"), 0.1]})
    pack.save_best(2, state(5.0).trainable)
    pack.save(2, state(2.0), {"n": 2})
    pack.close()
    saved = open_pack().restore(state(0.0))
    assert saved.step == 2 and saved.loop == {"n": 2}
    assert tiny.arrays_equal(saved.state, state(2.0)) and tiny.arrays_equal(saved.best, state(5.0).trainable)
    assert not open_pack.told


def test_the_newest_are_kept_and_the_best_that_they_need(open_pack):
    pack = open_pack(keep=2)
    for step in range(1, 7):
        if step in (2, 5):
            pack.save_best(step, state(step).trainable)
        pack.save(step, state(step), {})
    pack.wait()
    assert sorted(p.name for p in open_pack.folder.iterdir()) == ["5", "6", "best-5"]


def test_saving_returns_before_it_is_written_and_the_state_may_be_donated(open_pack, monkeypatch):
    pack = open_pack()
    gate = threading.Event()
    write = pack._write
    monkeypatch.setattr(pack, "_write", lambda *a: (gate.wait(20), write(*a)))
    mine = state(4.0)
    pack.save(1, mine, {})
    jax.jit(lambda s: jax.tree.map(lambda a: a * 0, s), donate_argnums=0)(mine)
    assert pack.steps == []
    gate.set()
    pack.wait()
    assert tiny.arrays_equal(pack.restore(state()).state, state(4.0))


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def cut(folder):
    file = largest(folder / "arrays")
    file.write_bytes(file.read_bytes()[:-7])


def flip(folder):
    file = largest(folder / "arrays" / "ocdbt.process_0")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def lose(folder):
    largest(folder / "arrays" / "ocdbt.process_0").unlink()


def garble(folder):
    (folder / "checkpoint.json").write_text("{")


def forge(folder):
    """Whole by its digests, but not what Orbax can read."""
    facts = json.loads((folder / "checkpoint.json").read_text())
    facts["files"] = {}
    (folder / "checkpoint.json").write_text(json.dumps(facts))
    (folder / "arrays" / "manifest.ocdbt").write_bytes(b"")
    (folder / "arrays" / "_METADATA").write_text("{}")


@pytest.mark.parametrize("damage", [cut, flip, lose, garble, forge])
def test_a_damaged_newest_checkpoint_is_passed_over(open_pack, damage):
    pack = open_pack()
    for step in (1, 2):
        pack.save(step, state(step), {})
    pack.close()
    damage(open_pack.folder / "2")
    saved = open_pack().restore(state())
    assert saved.step == 1 and tiny.arrays_equal(saved.state, state(1))
    (told,) = open_pack.told
    assert "2: " in told and "passed over" in told and "\n" not in told


def test_damaged_best_arrays_count_as_a_damaged_checkpoint(open_pack):
    pack = open_pack()
    pack.save(1, state(1), {})
    pack.save_best(2, state(2).trainable)
    pack.save(2, state(2), {})
    pack.close()
    cut(open_pack.folder / "best-2")
    assert open_pack().restore(state()).step == 1
    cut(open_pack.folder / "1")
    assert open_pack().restore(state()) is None
    assert len(open_pack.told) == 3


def test_what_was_half_written_is_swept_away(open_pack):
    pack = open_pack()
    pack.save(1, state(), {})
    pack.close()
    half = open_pack.folder / ".2.part" / "arrays"
    half.mkdir(parents=True)
    (half / "x").write_text("")
    again = open_pack()
    assert again.steps == [1] and not half.parent.exists()


@pytest.mark.parametrize(("changes", "word"), [({"base": "another"}, "weights"), ({"members": ("a", "c")}, "members")])
def test_checkpoints_of_something_else_are_refused(open_pack, changes, word):
    pack = open_pack()
    pack.save(1, state(), {})
    pack.close()
    with pytest.raises(InputError, match=word):
        open_pack(**changes).restore(state())


def test_a_failure_to_write_is_a_warning_and_leaves_the_last(open_pack, monkeypatch):
    pack = open_pack()
    pack.save(1, state(1), {})
    pack.wait()

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointer, "save", full)
        pack.save(2, state(2), {})
        pack.wait()
    assert "no space left" in open_pack.told[0] and "step 1" in open_pack.told[0]
    assert [p.name for p in open_pack.folder.iterdir()] == ["1"]
    pack.save(3, state(3), {})
    pack.wait()
    assert pack.restore(state()).step == 3 and len(open_pack.told) == 1


def test_a_checkpoint_is_little_more_than_its_arrays(open_pack):
    rng = np.random.default_rng(0)
    arrays = {f"layers.attn.{n}.lora_{f}": jnp.asarray(rng.standard_normal((1, 30, 576, 8), np.float32)) for n in "qkvo" for f in "ab"}
    full = MemberState(arrays, (jax.tree.map(jnp.cos, arrays), jax.tree.map(jnp.sin, arrays)), jnp.array([True]))
    pack = open_pack()
    pack.save(1, full, {})
    pack.wait()
    size = sum(p.stat().st_size for p in (open_pack.folder / "1").rglob("*") if p.is_file())
    assert size < 1.1 * sum(a.nbytes for a in jax.tree.leaves(full)) + 100_000


def test_another_order_of_the_data_is_refused(open_pack):
    pack = open_pack()
    pack.save(1, state(), {})
    pack.close()
    facts = open_pack.folder / "1" / "checkpoint.json"
    written = json.loads(facts.read_text())
    for order in ({"data_order": written["data_order"] - 1}, {}):  # an older version, and one that did not say
        facts.write_text(json.dumps({k: v for k, v in written.items() if k != "data_order"} | order))
        with pytest.raises(InputError, match="another order"):
            open_pack().restore(state())


def test_a_checkpoint_of_another_order_of_the_examples_is_refused(open_pack):
    pack = open_pack()
    pack.save(1, state(), {})
    pack.close()
    with pytest.raises(InputError, match="another order"):
        open_pack(order=3).restore(state())
