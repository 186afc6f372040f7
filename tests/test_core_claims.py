"""What the project stands for, once each with real parts: packed equals solo, and a stopped run that resumes ends with the same bits.

Merging, PEFT, meshes and padding have real tests beside the code that they are about (docs/architecture.md lists them).
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

from lora_jax.training import loop
from tests.tiny_hub import call

pytestmark = pytest.mark.slow


def write(folder: Path, minilm: str, reviews: str, name: str, **training: object) -> Path:
    values = {
        "name": name,
        "model": {"source": minilm},
        "task": {"kind": "classification", "source": reviews, "text": "text", "label": "category", "drop": {"category": ["plot"]}},
        "adapter": {"alpha": 16},
        "optimizer": {"learning_rate": 3e-3},
        "training": {"steps": 10, "batch_size": 8, "eval_every": 5, "pack": "vmap"} | training,
        "tracking": {"dir": str(folder / "runs"), "checkpoint_every": 4, "save": "final"},
        "sweep": {"zip": {"adapter.rank": [1, 8], "adapter.targets": ["attention", "mlp"]}, "max_padding": 0.99},
    }
    values["task"] |= {"eval_size": 40, "train_size": 400, "max_length": 24, "pooling": "mean"}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def adapters(run: Path) -> dict[str, np.ndarray]:
    """Member and array -> the final numbers."""
    found = {}
    for folder in sorted(run.glob("*/final/arrays")):
        with ocp.StandardCheckpointer() as orbax:
            arrays = orbax.restore(folder.resolve())
        found |= {f"{folder.parts[-3]} {name}": np.asarray(array) for name, array in arrays.items()}
    assert len({name.split()[0] for name in found}) == 2
    return found


def losses(run: Path) -> list[float]:
    return [float(row["final_loss"]) for row in csv.DictReader((run / "results.csv").open())]


def test_a_pack_of_real_models_equals_its_solo_runs(minilm_source, reviews_source, tmp_path):
    for name, options in (("packed", ()), ("solo", ("--solo",))):
        called = call("sweep", write(tmp_path, minilm_source, reviews_source, name), *options)
        assert called.code == 0, called.err
    packed, solo = (tmp_path / "runs" / name for name in ("packed", "solo"))
    np.testing.assert_allclose(losses(packed), losses(solo), rtol=1e-5)
    assert np.ptp(losses(solo)) > 1e-3  # the members differ, so that equal losses say something
    alone = adapters(solo)
    for name, array in adapters(packed).items():
        assert np.linalg.norm(array - alone[name]) <= 1e-4 * np.linalg.norm(alone[name]), name


def test_a_real_run_that_was_stopped_ends_with_the_bits_it_would_have_had(minilm_source, reviews_source, tmp_path, monkeypatch):
    whole = write(tmp_path, minilm_source, reviews_source, "whole")
    assert call("sweep", whole).code == 0
    stopped = write(tmp_path, minilm_source, reviews_source, "stopped")
    real = loop.train_pack
    with monkeypatch.context() as patch:
        patch.setattr("lora_jax.packing.runner.train_pack", lambda *a, **k: real(*a, **k | {"stop": lambda step: step == 7}))
        assert call("sweep", stopped).code == 75
    called = call("sweep", stopped)
    assert called.code == 0 and "step 7" in called.err
    expected = adapters(tmp_path / "runs" / "whole")
    for name, array in adapters(tmp_path / "runs" / "stopped").items():
        assert array.tobytes() == expected[name].tobytes(), name
    assert losses(tmp_path / "runs" / "stopped") == losses(tmp_path / "runs" / "whole")
