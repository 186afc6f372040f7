"""Exports as programs: StableHLO for JAX alone, ONNX for onnxruntime; equal logits at several batches and lengths, and what they take."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

import lora_jax
from lora_jax.interop.onnx import NEEDS, OnnxExporter, write_onnx
from lora_jax.interop.program import Program, program_of
from lora_jax.interop.stablehlo import MANIFEST, write_program
from lora_jax.models.add_head import add_head
from lora_jax.models.encoder import Encoder
from lora_jax.sweeps.restore import restore_member, run_members
from tests import tiny
from tests.tiny_hub import call

pytestmark = [pytest.mark.usefixtures("compile_cache"), pytest.mark.filterwarnings("ignore:jax.core.DropVar")]
SHAPES = [(1, 7), (3, 16), (2, 33)]


def rows(program: Program, batch: int, length: int, vocab: int = 30) -> list[np.ndarray]:
    """Arrays for a program's inputs: rows padded on the right, of two types of tokens."""
    rng = np.random.default_rng(batch)
    arrays = {"input_ids": rng.integers(0, vocab, (batch, length)), "attention_mask": np.ones((batch, length))}
    arrays["attention_mask"][0, length // 2 :] = 0
    arrays["token_type_ids"] = np.cumsum(np.arange(length) == length // 3)[None] * np.ones((batch, 1))
    return [arrays[one.name].astype(np.int32) for one in program.inputs]


def outputs(model: Any, arrays: list[np.ndarray]) -> np.ndarray:
    """What the model itself computes."""
    tokens, mask, *types = arrays
    method = "hidden" if isinstance(model, Encoder) else "__call__"
    more: dict[str, Any] = {"token_types": types[0]} if types else {}
    return tiny.outputs(model, tokens, mask, method=method, **more)


LOAD = """
import json, sys
import jax, numpy as np
sys.path.insert(0, {scripts!r})
import run_jax
inputs, run = run_jax.load({manifest!r})
given = np.load({arrays!r})
outputs = {{key: np.asarray(run({{name: given[f"{{key}}.{{name}}"] for name, _, _ in inputs}})) for key in {keys!r}}}
assert not any(name.partition(".")[0] in ("lora_jax", "flax", "safetensors", "transformers") for name in sys.modules)
np.savez({out!r}, **outputs)
"""


def check_in_jax_alone(program: Program, expected: Any, folder: Path) -> None:
    """Writes a program, and runs it in a process that imports JAX and NumPy alone."""
    folder.mkdir()
    write_program(program, folder)
    given = {f"{b}x{l}": rows(program, b, l) for b, l in SHAPES}
    flat: dict[str, Any] = {f"{key}.{one.name}": a for key, arrays in given.items() for one, a in zip(program.inputs, arrays, strict=True)}
    np.savez(folder / "given.npz", **flat)
    paths = {"manifest": folder / MANIFEST, "arrays": folder / "given.npz", "out": folder / "out.npz"}
    scripts = Path(lora_jax.__file__).parent / "interop" / "runtimes"
    code = LOAD.format(scripts=str(scripts), keys=list(given), **{name: str(path) for name, path in paths.items()})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ, JAX_PLATFORMS="cpu"))
    assert done.returncode == 0, done.stderr
    with np.load(folder / "out.npz") as found:
        for key, arrays in given.items():
            np.testing.assert_allclose(found[key], expected(arrays), atol=1e-5, rtol=1e-5, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classification", "encoder", "decoder"])
def test_stablehlo_in_a_process_with_jax_alone(hub, kind, tmp_path):
    base: Any = lora_jax.load_model(str(hub.llama if kind == "decoder" else hub.bert))
    head = kind == "classification"
    model = tiny.trained(add_head(base, kind, 3, rngs=nnx.Rngs(0)) if head else base, targets="all-linear")
    check_in_jax_alone(program_of(model), lambda arrays: outputs(model, arrays), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["version"] == 1 and manifest["platforms"] == ["cpu", "cuda", "rocm", "tpu"]
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if kind != "decoder" else [])
    assert [one["name"] for one in manifest["inputs"]] == names and manifest["inputs"][0]["dims"] == ["batch", "length"]


def check_in_onnxruntime(program: Program, expected: Any, path: Path, vocab: int = 30) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    write_onnx(program, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [(one.name, one.shape, one.type) for one in session.get_inputs()] == [
        (one.name, ["batch", "length"], "tensor(int64)") for one in program.inputs
    ]
    for batch, length in SHAPES:
        arrays = rows(program, batch, length, vocab)
        feed = {one.name: array.astype(np.int64) for one, array in zip(program.inputs, arrays, strict=True)}
        (got,) = session.run([program.output.name], feed)
        np.testing.assert_allclose(got, expected(arrays), atol=1e-4, err_msg=f"{batch} x {length}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classification", "decoder"])
def test_onnx_in_onnxruntime(hub, kind, tmp_path):
    pytest.importorskip("jax2onnx")
    base: Any = lora_jax.load_model(str(hub.llama if kind == "decoder" else hub.bert))
    model = tiny.trained(base if kind == "decoder" else add_head(base, kind, 3, rngs=nnx.Rngs(0)), targets="all-linear")
    check_in_onnxruntime(program_of(model, unrolled=True), lambda arrays: outputs(model, arrays), tmp_path / "m.onnx")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["classification", "question_answering", "token_classification"])
def test_real_minilm_in_onnxruntime_and_jax_alone(minilm_source, kind, tmp_path):
    pytest.importorskip("jax2onnx")
    model = tiny.trained(add_head(lora_jax.load_model(minilm_source), kind, 2, rngs=nnx.Rngs(0)), targets="attention")
    check_in_jax_alone(program_of(model), lambda arrays: outputs(model, arrays), tmp_path / "hlo")
    check_in_onnxruntime(program_of(model, unrolled=True), lambda arrays: outputs(model, arrays), tmp_path / "m.onnx", 30000)


@pytest.mark.long
@pytest.mark.parametrize(("name", "targets"), [("dinov2_small", "all-linear"), ("efficientnet_lite0", "convolutions")])
def test_real_models_of_images(name, targets, tmp_path):
    """At three batch sizes; images have the size that the checkpoint says."""
    source = Path(__file__).parents[2].parent / "shared" / "models" / name
    if not (source / "config.json").is_file():
        pytest.skip("needs ../shared/models")
    onnxruntime = pytest.importorskip("onnxruntime")
    base: Any = lora_jax.load_model(str(source))
    model = tiny.trained(add_head(base, "image_classification", 5, rngs=nnx.Rngs(0)), targets=targets)
    program = program_of(model, unrolled=True)
    write_onnx(program, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (tmp_path / "hlo").mkdir()
    write_program(program_of(model), tmp_path / "hlo")
    inputs, run = runtime(tmp_path / "hlo" / MANIFEST)
    size: Any = program.inputs[0].dims[1:]
    for batch in (1, 2, 3):
        pixels = np.random.default_rng(batch).standard_normal((batch, *size)).astype(np.float32)
        expected = tiny.outputs(model, pixels)
        np.testing.assert_allclose(session.run(["logits"], {"pixels": pixels})[0], expected, atol=1e-4)
        np.testing.assert_allclose(run({inputs[0][0]: pixels}), expected, atol=1e-4)


def runtime(manifest: Path) -> Any:
    """What `run_jax.py` loads, in this process."""
    return runpy.run_path(str(Path(lora_jax.__file__).parent / "interop" / "runtimes" / "run_jax.py"))["load"](str(manifest))


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory, compile_cache) -> Path:
    folder = tmp_path_factory.mktemp("run")
    result = call("train", hub.write(folder, {"training.steps": 3, "training.eval_every": 3, "optimizer.learning_rate": 0.1}))
    assert result.code == 0, result.err
    return folder / "runs" / "tiny"


@pytest.mark.slow
def test_a_run_in_every_form_and_what_each_takes(run, tmp_path):
    pytest.importorskip("jax2onnx")
    model = restore_member(run, run_members(run)[0]).model
    for form in ("hf", "stablehlo", "onnx"):
        result = call("export", run, "--format", form, "--out", tmp_path / form)
        assert result.code == 0, result.err
        assert (tmp_path / form / "tokenizer.json").is_file()
    # The lines of the card.
    card = (tmp_path / "stablehlo" / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[0].replace("PATH", str(tmp_path / "stablehlo"))
    arrays = rows(program_of(model), 2, 9)
    given = f"input_ids, attention_mask, token_type_ids = np.array({[a.tolist() for a in arrays]}, np.int32)\n"
    code = code.replace("raw = ", given + "raw = ") + "print(json.dumps(np.asarray(logits).tolist()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ, JAX_PLATFORMS="cpu"))
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), outputs(model, arrays), atol=1e-5)
    figures = tmp_path / "bench.json"
    folders = [tmp_path / form for form in ("hf", "stablehlo", "onnx")]
    result = call("bench", *folders, "--batch", 2, "--length", 12, "--repeats", 3, "--output", figures)
    assert result.code == 0, result.err
    found = json.loads(figures.read_text())
    assert [one["form"] for one in found] == ["hf", "stablehlo", "onnx"] and "onnxruntime" in result.out and "2 x 12 tokens" in result.out
    for one in found:
        weights = sum(v.size * 4 for v in tiny.base_arrays(model).values())
        assert 0.8 * weights < one["size_bytes"] < 4 * weights + 300_000
        assert 0 < one["fastest_s"] <= one["median_s"] <= one["slowest_s"] and one["load_s"] > 0 and one["peak_bytes"] > 20e6
    assert found[2]["peak_bytes"] < found[0]["peak_bytes"]  # neither JAX nor this library is imported there


def test_what_is_no_export(hub, tmp_path):
    result = call("bench", tmp_path / "nothing")
    assert result.code == 2 and "no such file or folder" in result.err
    (tmp_path / "adapter.gguf").write_bytes(b"GGUF")
    result = call("bench", tmp_path)
    assert result.code == 2 and "An adapter alone runs only on its base" in result.err and "model.onnx (onnx)" in result.err
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    result = call("bench", tmp_path / "model.onnx", "--repeats", 1)
    assert result.code == 1 and "onnxruntime failed" in result.err


def test_models_that_are_no_programs(hub, monkeypatch):
    with pytest.raises(lora_jax.InputError, match="a Linear is no model of texts"):
        program_of(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = OnnxExporter().can(None)  # pyright: ignore[reportArgumentType]
    assert reason is not None and NEEDS[0] in reason and "pip install 'lora-jax[onnx]'" in reason
