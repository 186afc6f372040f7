"""How a run's packs are run is measured once, told, kept in the run directory, and taken from there."""

from __future__ import annotations

import json
import signal

import pytest

from experiments.fuzz import bits_of_run, differing
from lora_jax.errors import Stopped
from lora_jax.packing import choice as pack_choice
from lora_jax.packing import choice as pack_modes
from lora_jax.packing.execution import SCAN
from lora_jax.parallel.processes import StopSignals
from lora_jax.sweeps.run import run_sweep
from lora_jax.tracking import Progress
from tests import tiny

pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compile():
        yield


@pytest.mark.long
def test_a_resumed_run_takes_the_recorded_choice(hub, tmp_path, monkeypatch, capsys):
    changes = {"sweep": {"grid": {"training.seed": [0, 1, 2, 3]}, "max_pack": 2}, "tracking.tensorboard": False}
    monkeypatch.setattr(pack_choice, "WORTH_MEASURING", 1)
    monkeypatch.setattr(pack_choice, "_measure", lambda pack, batch: 0.1 if pack.programs.mode == SCAN else 0.3)
    asked = StopSignals.asked

    def stop(self, done):
        self.received = signal.SIGTERM
        return done == 3

    monkeypatch.setattr(StopSignals, "asked", stop)
    config = hub.config(tmp_path, changes)
    with pytest.raises(Stopped):
        run_sweep(config, progress=Progress())
    assert "pack 1/2: runs as scan; measured on cpu: vmap 0.3 s, scan 0.1 s a step" in " ".join(capsys.readouterr().err.split())
    (recorded,) = json.loads((tmp_path / "runs/tiny/state.json").read_text())["execution"].values()
    assert recorded["mode"] == "scan" and recorded["width"] == 1 and recorded["seconds_per_step"] == {"vmap": 0.3, "scan": 0.1}
    monkeypatch.setattr(StopSignals, "asked", asked)

    def never(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(pack_modes, "choose", never)
    resumed = run_sweep(config, progress=Progress())
    assert "runs as scan; as measured before" in " ".join(capsys.readouterr().err.split())
    # The bits are those of the chosen mode, here told.
    told = run_sweep(hub.config(tmp_path, changes | {"training.pack": "scan"}, name="told"))
    assert not differing(bits_of_run(resumed.path), bits_of_run(told.path))
    assert {r.status for r in resumed.results} == {"finished"} and len(resumed.results) == 4
