"""An exporter of a package that is not ours: it is registered, listed, used by the command, and refused what it cannot write."""

from __future__ import annotations

import importlib
import json
import sys

import numpy as np
import pytest

from lora_jax import InputError
from lora_jax.adapters.partition import partition
from lora_jax.config.doors import EXPORTERS
from lora_jax.interop.export import ExportOptions, export_run
from lora_jax.sweeps.restore import restore_member, run_members
from tests.tiny_hub import call

pytestmark = pytest.mark.usefixtures("compile_cache")

PLUGIN = '''
"""An adapter as one NumPy archive, and a JSON file beside it."""

import json

import numpy as np

from lora_jax import register_exporter
from lora_jax.adapters.partition import partition
from lora_jax.interop.export import Exporter


class NpzExporter(Exporter):
    summary = "The adapter as a NumPy archive."
    options = {"dtype": ("float32", "float16")}

    def can(self, restored):
        return "its rank is above 2." if restored.member.config.adapter.rank > 2 else None

    def write(self, restored, folder, options):
        arrays = partition(restored.model).trainable
        np.savez(folder / "adapter.npz", **{name: np.asarray(a, options.dtype or "float32") for name, a in arrays.items()})
        settings = {"rank": restored.member.config.adapter.rank, "classes": restored.classes}
        (folder / "adapter.json").write_text(json.dumps(settings))


class FullDisk(Exporter):
    def write(self, restored, folder, options):
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")


register_exporter("npz", NpzExporter())
register_exporter("full-disk", FullDisk())
'''


@pytest.fixture(autouse=True, scope="module")
def plugin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "npz_exporter.py").write_text(PLUGIN)
    sys.path.insert(0, str(folder))
    importlib.import_module("npz_exporter")
    yield
    sys.path.remove(str(folder))
    for name in ("npz", "full-disk"):
        EXPORTERS.all().pop(name)


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory, compile_cache):
    """A run of two members, of ranks 2 and 4."""
    folder = tmp_path_factory.mktemp("exported")
    changes = {"sweep": {"grid": {"adapter.rank": [2, 4]}}, "training.steps": 2, "training.eval_every": 2}
    result = call("sweep", hub.write(folder, changes))
    assert result.code == 0, result.err
    return folder / "runs" / "tiny"


def test_it_has_few_lines():
    assert len(PLUGIN.strip().splitlines()) < 60


@pytest.mark.slow
def test_it_writes_a_member(run, tmp_path):
    for options, dtype in (((), np.float32), (("--dtype", "float16"), np.float16)):
        out = tmp_path / np.dtype(dtype).name
        result = call("export", run / "rank=2", "--format", "npz", "--out", out, *options)
        assert result.code == 0, result.err
        assert {p.name for p in out.iterdir()} == {"adapter.npz", "adapter.json"}
        trained = partition(restore_member(run, run_members(run)[0]).model).trainable
        with np.load(out / "adapter.npz") as arrays:
            assert arrays.keys() == trained.keys()
            for name, array in arrays.items():
                np.testing.assert_array_equal(array, np.asarray(trained[name]).astype(dtype))
        assert json.loads((out / "adapter.json").read_text()) == {"rank": 2, "classes": ["neg", "pos"]}


def test_the_help_lists_it():
    text = call("export", "--help").out
    assert "NumPy archive" in text and "float16" in text and "full-disk" in text


def test_a_member_that_it_cannot_write(run, tmp_path):
    result = call("export", run / "rank=4", "--format", "npz", "--out", tmp_path / "out")
    assert result.code == 2 and "--format npz" in result.err and "'rank=4'" in result.err and "its rank is above 2." in result.err
    assert "hf" in result.err and "peft" in result.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("options, key", [({"max_shard_size": 10}, "--max-shard-size"), ({"dtype": "bfloat16"}, "--dtype")])
def test_an_option_that_it_does_not_have(run, tmp_path, options, key):
    with pytest.raises(InputError, match=key):
        export_run(run, form="npz", out=tmp_path / "out", options=ExportOptions(**options))
    assert not list(tmp_path.iterdir())


def test_an_unknown_name(run):
    with pytest.raises(InputError, match=r"--format.*npz"):
        export_run(run, form="npy")


def test_an_error_leaves_nothing(run, tmp_path):
    result = call("export", run / "rank=2", "--format", "full-disk", "--out", tmp_path / "out")
    assert result.code == 1 and "out: cannot be written" in result.err and not list(tmp_path.iterdir())


def test_another_name_cannot_be_taken():
    with pytest.raises(ValueError, match="peft"):
        EXPORTERS.register("peft", EXPORTERS.get("npz", "name"))


@pytest.mark.slow
def test_full_fine_tuning_is_no_peft_adapter(hub, tmp_path):
    path = hub.write(tmp_path, {"adapter": {"method": "full"}, "training.steps": 1, "training.eval_every": 1})
    assert call("train", path).code == 0
    result = call("export", tmp_path / "runs" / "tiny", "--format", "peft", "--out", tmp_path / "out")
    assert result.code == 2 and "--format peft" in result.err and "'full'" in result.err and "hf" in result.err
    assert not (tmp_path / "out").exists()
