"""`lora-jax doctor CONFIG` tells where parameters will lie and what they take, and loads nothing."""

from __future__ import annotations

import pytest

from lora_jax.models import load as loading
from tests.tiny_hub import call


@pytest.fixture(autouse=True)
def unloaded(monkeypatch):
    monkeypatch.setattr(loading.BaseFiles, "load", lambda *_: pytest.fail("weights were loaded"))


@pytest.mark.slow
def test_a_table_of_parameters_and_memory(hub, tmp_path):
    told = call("doctor", hub.write(tmp_path), "mesh.fsdp=2", "mesh.tensor=2", "sweep={grid: {adapter.rank: [2, 3]}}")
    assert "parameters on fsdp 2 x tensor 2, 2 members" in told.out
    line = next(line for line in told.out.splitlines() if line.startswith("base.layers.attn.q_proj.kernel"))
    assert line.split() == ["base.layers.attn.q_proj.kernel", "3", "x", "32", "x", "32", "float32", "-", "fsdp", "tensor", "3.07", "KB"]
    line = next(line for line in told.out.splitlines() if line.startswith("base.layers.attn.q_proj.lora_a"))
    assert line.split()[1:] == ["(trained)", "3", "x", "32", "x", "3", "float32", "-", "fsdp", "-", "1.15", "KB"]
    assert "memory per device, 2 members" in told.out and "total" in told.out and "needs" not in told.out
    assert "training.pack: auto" in told.out  # the mode is not chosen yet, so the memory is an upper bound
    chosen = call("doctor", hub.write(tmp_path), "training.pack=scan", "sweep={grid: {adapter.rank: [2, 3]}}")
    assert "memory per device, 2 members" in chosen.out and "training.pack: auto" not in chosen.out


@pytest.mark.slow
def test_a_mesh_larger_than_this_machine(hub, tmp_path):
    told = call("doctor", hub.write(tmp_path), "mesh.data=32")
    assert "The mesh needs 32 devices" in told.out


def test_bad_input_is_told(hub, tmp_path):
    told = call("doctor", hub.write(tmp_path), "adapter.targets=[q_porj]")
    assert told.code == 2 and "q_porj" in told.err
    told = call("doctor", hub.write(tmp_path), "mesh.sweep=-1", "mesh.data=7")
    assert told.code == 2 and "7 does not divide" in told.err
