"""The seven doors at once: a package that is not ours, found by its entry points, from a YAML sweep to an export."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

PARTS = {
    "method": "methods",
    "init": "inits",
    "optimizer": "optimizers",
    "task": "tasks",
    "family": "families",
    "transform": "transforms",
    "exporter": "exporters",
}
SOURCES = Path(__file__).parent / "outside"
# Tensors of the tiny BERT -> what the outside family calls them.
RENAMED = {
    "encoder.layer.": "blocks.",
    "attention.self.query": "attention.q",
    "attention.self.key": "attention.k",
    "attention.self.value": "attention.v",
    "attention.output.dense": "attention.o",
    "attention.output.LayerNorm": "norm_1",
    "output.LayerNorm": "norm_2",
    "intermediate.dense": "wide",
    "output.dense": "narrow",
    "embeddings.LayerNorm": "norm",
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "places",
    "embeddings.token_type_embeddings": "types",
}


def run(package: Path, *command: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(package), str(Path(__file__).parents[1])])
    words = [sys.executable, "-m", "lora_jax.cli.main", *map(str, command)]
    return subprocess.run(words, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A folder as `pip install --target` leaves it: one package, and the entry points that its metadata names."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "outside").mkdir()
    for part in PARTS:
        shutil.copy(SOURCES / f"{part}.py", folder / "outside" / f"{part}.py")
    info = folder / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("".join(f"[lora_jax.{group}]\noutside = outside.{part}\n\n" for part, group in PARTS.items()))
    return folder


@pytest.fixture(scope="module")
def base(hub, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(hub.bert, folder)
    hf = json.loads((folder / "config.json").read_text())
    keys = {"dim": "hidden_size", "heads": "num_attention_heads", "wide": "intermediate_size", "blocks": "num_hidden_layers"}
    keys |= {"words": "vocab_size", "places": "max_position_embeddings", "types": "type_vocab_size"}
    (folder / "config.json").write_text(json.dumps({"model_type": "outside-bert"} | {ours: hf[theirs] for ours, theirs in keys.items()}))
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        if not name.startswith("pooler."):
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("part", PARTS)
def test_each_is_under_60_lines(part):
    assert len((SOURCES / f"{part}.py").read_text().splitlines()) < 60


@pytest.mark.slow
def test_all_of_them_work_in_a_yaml_sweep(hub, package, base, tmp_path):
    words = ["good", "bad", "film", "plot", "story", "people"]
    rows = [{"text": " ".join(words[(i * k) % 6] for k in range(1, 7)), "stars": i % 5} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = hub.values("outside") | {
        "model": {"source": str(base), "transforms": [{"kind": "outside-round", "step": 0.01}]},
        "task": {"kind": "outside-rating", "source": str(tmp_path / "rows.jsonl"), "text": "text", "value": "stars", "eval_size": 10},
        "adapter": {"method": "outside-gain", "targets": ["q_proj", "up_proj"]},
        "optimizer": {"kind": "outside-sign", "step": 0.5},
        "sweep": {"grid": {"adapter.targets": [["q_proj"], ["q_proj", "up_proj"]], "optimizer.learning_rate": [1e-2, 1e-3]}},
    }
    config["tracking"]["dir"] = str(tmp_path / "runs")
    (tmp_path / "outside.yaml").write_text(yaml.safe_dump(config))
    swept = run(package, "sweep", tmp_path / "outside.yaml")
    assert swept.returncode == 0, swept.stderr
    results = list(csv.DictReader((tmp_path / "runs/outside/results.csv").open()))
    assert len(results) == 4 and len({row["final_absolute_error"] for row in results}) == 4
    assert {row["status"] for row in results} == {"finished"}
    out = tmp_path / "exported"
    exported = run(package, "export", tmp_path / "runs/outside", "--format", "outside-npz", "--out", out)
    assert exported.returncode == 0, exported.stderr
    arrays = np.load(out / "adapter.npz")
    assert any(name.endswith("gain") and np.ptp(arrays[name]) > 0 for name in arrays)


def test_without_the_package_its_names_are_unknown(hub, tmp_path):
    path = hub.write(tmp_path, {"adapter.method": "outside-gain"})
    answer = run(tmp_path, "train", path)
    assert answer.returncode == 2
    assert "adapter.method" in answer.stderr and "lora" in answer.stderr
