"""Compiler options: what this XLA knows of them, and that a pack's programs are compiled with them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from lora_jax.packing.pack import Pack
from lora_jax.parallel import program as compiling
from lora_jax.parallel.program import Program
from lora_jax.training.setup import set_up


@pytest.fixture
def asked_anew():
    compiling._known.cache_clear()
    yield
    compiling._known.cache_clear()


def test_programs_leave_nothing_to_ynnpack():
    x = jnp.ones((256, 256))

    def products(x):
        return jnp.tanh(x @ x) @ x

    program = Program(products, "test", options=compiling.compiler_options())
    program(x)
    assert "__ynn_fusion" in jax.jit(products).lower(x).compile().as_text()  # else the option has lost its point
    assert "__ynn_fusion" not in program.compiled_text()


def test_an_option_that_xla_has_dropped_is_left_out(asked_anew, monkeypatch):
    monkeypatch.setattr(compiling, "_CPU", {"xla_cpu_option_of_old": "1"})
    assert compiling.compiler_options() == {}
    assert Program(lambda x: x + 1, "test", options={})(jnp.float32(1)) == 2


def test_packs_are_compiled_so(hub, tmp_path):
    config = hub.config(tmp_path)
    setup = set_up(config)
    pack = Pack.build(setup.model, [config], setup.steps, setup.mesh)
    assert pack.programs.train._options == pack.programs.evaluate._options == compiling.compiler_options() != {}


def test_other_devices_are_told_nothing(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiling.compiler_options() == {}
