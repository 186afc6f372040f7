"""Reading named tensors: formats, laziness, and what is said of broken files."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax.errors import InputError, InputWarning
from lora_jax.weights.checkpoint import all_finite, slice_bounds
from lora_jax.weights.load import open_checkpoint
from lora_jax.weights.safetensors import DTYPES, SafetensorsCheckpoint, Tensor, read_digests, write_checkpoint, write_safetensors

CONFIG = {"model_type": "llama", "hidden_size": 8}
DAMAGED = r"model.safetensors: not a safetensors file, or damaged"


def tensors() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "model.embed_tokens.weight": draw.normal(size=(16, 8)).astype(np.float32),
        "model.layers.0.mlp.up_proj.weight": draw.normal(size=(12, 8)).astype(np.float16),
        "model.norm.weight": draw.normal(size=8).astype(np.float32),
        "ids": np.arange(6, dtype=np.int64).reshape(1, 2, 3),
        "scalar": np.array(3.5, np.float64),
    }


def write_raw(path, entries: dict[str, tuple[str, np.ndarray]], **changes) -> None:
    """A safetensors file by hand, for what the package cannot write; `changes` spoil the last entry."""
    header, blobs, at = {}, [], 0
    for name, (kind, value) in entries.items():
        blob = value.tobytes()
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    header[name].update(changes)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    weights = list(tensors().items())
    parts = {"model-1-of-2.safetensors": dict(weights[:2]), "model-2-of-2.safetensors": dict(weights[2:])}
    for name, part in parts.items():
        save_file(part, tmp_path / name)
    index = {"metadata": {}, "weight_map": {k: name for name, part in parts.items() for k in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


@pytest.mark.parametrize("where", ["folder", "file", "sharded"])
def test_reads_every_tensor(where, request):
    path = request.getfixturevalue("sharded" if where == "sharded" else "folder")
    checkpoint = open_checkpoint(str(path / "model.safetensors" if where == "file" else path))
    assert checkpoint.config == CONFIG
    assert sorted(checkpoint.names()) == sorted(tensors())
    for name, expected in tensors().items():
        got = checkpoint.read(name)
        assert got.dtype == expected.dtype == checkpoint.dtype(name) and got.shape == expected.shape == checkpoint.shape(name)
        np.testing.assert_array_equal(got, expected)


def test_slices_equal_the_whole(folder):
    checkpoint = open_checkpoint(folder)
    for index in [(), (slice(3, 7),), (slice(None), slice(2, 5)), (slice(4, 4),), (slice(-2, None), slice(0, 100))]:
        expected = tensors()["model.embed_tokens.weight"][index]
        np.testing.assert_array_equal(checkpoint.read_slice("model.embed_tokens.weight", index), expected)
    np.testing.assert_array_equal(checkpoint.read_slice("ids", (slice(0, 1), slice(1, 2))), tensors()["ids"][:, 1:2])
    with pytest.raises(ValueError, match=r"step 1"):
        checkpoint.read_slice("ids", (slice(None, None, 2),))
    with pytest.raises(ValueError, match=r"2 slices for a tensor of 1"):
        slice_bounds((4,), [slice(None)] * 2)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("BF16", ml_dtypes.bfloat16), ("F8_E4M3", ml_dtypes.float8_e4m3fn), ("F8_E5M2", ml_dtypes.float8_e5m2)]
)
def test_reads_dtypes_numpy_lacks(tmp_path, kind, dtype):
    values = np.linspace(-2, 2, 12).reshape(3, 4).astype(dtype)
    (tmp_path / "config.json").write_text("{}")
    write_raw(tmp_path / "model.safetensors", {"w": (kind, values)})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtype("w") == dtype
    np.testing.assert_array_equal(checkpoint.read("w").astype(np.float32), values.astype(np.float32))
    np.testing.assert_array_equal(checkpoint.read_slice("w", (slice(1, 2),)).astype(np.float32), values[1:2].astype(np.float32))


def test_what_is_read_is_free_memory(folder):
    """A read keeps nothing of the file alive: it may be written to, and the file may go."""
    checkpoint = open_checkpoint(folder)
    whole, part = checkpoint.read("model.norm.weight"), checkpoint.read_slice("model.norm.weight", (slice(0, 4),))
    (folder / "model.safetensors").write_bytes(b"")
    whole[:], part[:] = 0, 0
    with pytest.raises(InputError, match=r"model.safetensors: 'model.norm.weight' cannot be read"):
        checkpoint.read("model.norm.weight")


@pytest.mark.parametrize("kind", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("number", ["nan", "-nan", "inf", "-inf"])
def test_numbers_that_are_not_finite_are_said_where_they_are_read(tmp_path, kind, number):
    dtype = DTYPES[kind]
    values = np.linspace(-3, 3, 24).reshape(4, 6).astype(dtype)
    values[0, 0], values[0, 1] = ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min  # the largest that are finite
    values[0, 2] = -0.0
    bad = values.copy()
    bad[2, 1] = np.array(np.nan if kind == "F8_E4M3" else float(number.strip("-")), dtype)  # E4M3 has no infinity
    bits = bad.view(f"u{dtype.itemsize}")
    bits[2, 1] |= number.startswith("-") << (8 * dtype.itemsize - 1)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_raw(tmp_path / "model.safetensors", {"good": (kind, values), "bad": (kind, bad), "empty": (kind, values[:0])})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of float8 without scales
        checkpoint = open_checkpoint(str(tmp_path))
    np.testing.assert_array_equal(checkpoint.read("good").view(bits.dtype), values.view(bits.dtype))
    assert checkpoint.read("empty").shape == (0, 6)
    np.testing.assert_array_equal(checkpoint.read_slice("bad", [slice(0, 2)]), values[:2])
    for read in (lambda: checkpoint.read("bad"), lambda: checkpoint.read_slice("bad", [slice(2, 3), slice(0, 6)])):
        with pytest.raises(InputError, match=r"model\.safetensors: 'bad' holds numbers that are not finite: 1 of (24|6) are NaN"):
            read()


def test_whole_numbers_are_not_taken_for_floats():
    assert all_finite(np.array([-1, 2**31 - 1, -(2**31)], np.int32)) and all_finite(np.array([True, False]))
    assert all_finite(np.array([255], np.uint8).view(ml_dtypes.float8_e8m0fnu)[:0]) and all_finite(np.float32(1))


def test_unknown_tensor_names_the_nearest(folder):
    checkpoint = open_checkpoint(folder)
    assert "model.norm.weight" in checkpoint and "model.norm" not in checkpoint
    for ask in (checkpoint.shape, checkpoint.dtype, checkpoint.read, lambda n: checkpoint.read_slice(n, ())):
        with pytest.raises(InputError, match=r"no tensor 'model.norms.weight'.*Did you mean.*'model.norm.weight'"):
            ask("model.norms.weight")


def spoil(path, find: str, change) -> None:
    data = json.loads(path.read_text())
    change(data[find] if find else data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("escape", ["../secret.safetensors", "/etc/passwd", "a/../../x.safetensors", "..\\x", "C:x", "", 3])
def test_index_may_not_leave_its_folder(sharded, escape):
    save_file(tensors(), sharded.parent / "secret.safetensors")
    spoil(sharded / "model.safetensors.index.json", "weight_map", lambda m: m.update(ids=escape))
    with pytest.raises(InputError, match=r"index.json: 'ids' is said to lie in .* not a file inside"):
        open_checkpoint(sharded)


def test_index_with_a_missing_shard_or_tensor(sharded):
    index = sharded / "model.safetensors.index.json"
    spoil(index, "weight_map", lambda m: m.update(extra="model-1-of-2.safetensors"))
    with pytest.raises(InputError, match=r"'extra' is said to lie in 'model-1-of-2.safetensors', which does not hold it"):
        open_checkpoint(sharded)
    (sharded / "model-2-of-2.safetensors").unlink()
    spoil(index, "weight_map", lambda m: m.pop("extra"))
    with pytest.raises(InputError, match=r"index.json: the shard 'model-2-of-2.safetensors' is missing"):
        open_checkpoint(sharded)
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {}}'):
        index.write_text(text)
        with pytest.raises(InputError, match=r"no 'weight_map'"):
            open_checkpoint(sharded)


def test_tensors_that_an_index_does_not_name_are_said(sharded):
    spoil(sharded / "model.safetensors.index.json", "weight_map", lambda m: m.pop("ids"))
    with pytest.warns(InputWarning, match=r"hold 1 tensors that it does not name, and that are not read: ids\."):
        assert "ids" not in open_checkpoint(sharded).names()


def test_every_truncation_is_found(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in [*range(0, 40, 3), len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=DAMAGED):
            open_checkpoint(folder)
    path.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match=DAMAGED):
        open_checkpoint(folder)


@pytest.mark.parametrize("length", [2**63, 2**40, 10**9])
def test_absurd_header_length_is_not_read(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(InputError, match=DAMAGED):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [4, 4]},
        {"shape": [-3, -4]},
        {"shape": [3.0, 4]},
        {"shape": None},
        {"shape": [2**40, 2**40]},
        {"data_offsets": [0, 2**60]},
        {"data_offsets": [-8, 40]},
        {"data_offsets": [8, 56]},
        {"data_offsets": [0]},
        {"dtype": "F5"},
        {"dtype": ["F32"]},
    ],
)
def test_entries_that_contradict_the_file(tmp_path, changes):
    (tmp_path / "config.json").write_text("{}")
    write_raw(tmp_path / "model.safetensors", {"w": ("F32", np.ones((3, 4), np.float32))}, **changes)
    with pytest.raises(InputError, match=DAMAGED):
        open_checkpoint(tmp_path)


def test_dtypes_that_have_no_place_here(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write_raw(tmp_path / "model.safetensors", {"w": ("C64", np.ones((3, 4), np.complex64))})
    with pytest.raises(InputError, match=r"model.safetensors: 'w' has dtype C64"):
        open_checkpoint(tmp_path)


def test_tensors_that_share_bytes_or_a_name(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    path, one = tmp_path / "model.safetensors", '{"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}'
    for text in (f'{{"a": {one}, "b": {one}}}', f'{{"a": {one}, "a": {one}}}'):
        path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(48))
        with pytest.raises(InputError, match=DAMAGED):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("header", [b"[]", b"nonsense", b"\xff\xfe", b"[" * 100_000])
def test_headers_that_are_no_objects(tmp_path, header):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match=DAMAGED):
        open_checkpoint(tmp_path)


def test_what_is_written_reads_back(tmp_path):
    """Every dtype, in files below a size; readable by whoever may read the folder's other files."""
    values = {name: np.arange(12).reshape(3, 4).astype(dtype) for name, dtype in DTYPES.items()} | {"scalar": np.array(3.5, np.float32)}
    made = {name: Tensor(v.shape, v.dtype, lambda v=v: v) for name, v in values.items()} | {
        "rounded": Tensor((3, 4), np.dtype(np.float32), lambda: np.full((3, 4), 1 / 3, np.float32)).cast(DTYPES["BF16"])
    }
    (tmp_path / "config.json").write_text("{}")
    files = write_checkpoint(tmp_path, made, largest=200)
    assert len(files) > 2 and all((tmp_path / f).stat().st_mode == (tmp_path / "config.json").stat().st_mode for f in files)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names() == list(made)
    for name, value in values.items():
        got = checkpoint.read(name)
        assert got.dtype == value.dtype and got.tobytes() == value.tobytes(), name
    assert checkpoint.read("rounded").tobytes() == np.full((3, 4), 1 / 3, DTYPES["BF16"]).tobytes()
    with pytest.raises(ValueError, match="announced as float32"):
        write_safetensors(tmp_path / "x.safetensors", {"w": Tensor((2,), np.dtype(np.float32), lambda: np.zeros(2))})


def test_digests_are_kept_beside_tensors_and_found_wrong(tmp_path):
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    made = {n: Tensor((3,), np.dtype(np.float32), lambda n=n: np.arange(3, dtype=np.float32) + len(n)) for n in ("w", "bias")}
    write_safetensors(path, made, digests={"rank": "abc"})
    assert read_digests(path, SafetensorsCheckpoint(path, None)) == {"rank": "abc"}
    write_safetensors(other, made)
    assert read_digests(other, SafetensorsCheckpoint(other, None)) == {}
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a.safetensors: damaged \(its tensors are not those that were written\)"):
        read_digests(path, SafetensorsCheckpoint(path, None))


def test_missing_and_broken_config(folder):
    (folder / "config.json").write_text("[1]")
    with pytest.raises(InputError, match=r"config.json: .*a JSON object, not list"):
        open_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json: cannot be read as JSON"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json: no such file"):
        open_checkpoint(folder / "model.safetensors")


def test_folders_without_usable_weights(tmp_path):
    with pytest.raises(InputError, match=r"base\.source: .* holds no model.safetensors"):
        open_checkpoint(tmp_path, key="base.source")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds an adapter, not a base model"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(InputError, match=r"pytorch_model.bin: pickle files are never loaded.*convert it to safetensors"):
            open_checkpoint(path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"several weight files and no index; name one: a.gguf, b.gguf"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"notes.txt is neither a .safetensors nor a .gguf file"):
        open_checkpoint(tmp_path / "notes.txt")


def test_needs_no_pytorch(folder):
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from lora_jax.weights.load import open_checkpoint\n"
        f"c = open_checkpoint({str(folder)!r}); [c.read(n) for n in c.names()]\n"
        "assert 'gguf' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
