"""Keys of earlier versions are read under the names they have today."""

from __future__ import annotations

import pytest

from lora_jax.config import renamed as renaming
from lora_jax.config.load import config_of, load_config, with_values
from lora_jax.config.messages import valid_keys
from lora_jax.errors import InputError


@pytest.fixture(autouse=True)
def unnoted(monkeypatch):
    monkeypatch.setattr(renaming, "_noted", set())


def test_every_new_name_is_a_key_and_no_old_one_is():
    assert set(renaming.RENAMED.values()) <= set(valid_keys()) and not set(renaming.RENAMED) & set(valid_keys())


def test_in_a_file_an_override_and_a_sweep(hub, tmp_path, capsys):
    grid = {"sweep": {"grid": {"training.cache_memory_gb": [0.0, 1.0]}}}
    path = hub.write(tmp_path, {"training.cache_prefix": "on"} | grid)
    config = load_config(path, ["training.cache_disk_gb=3"])
    assert (config.training.cache_trunk, config.training.trunk_disk_gb) == ("on", 3.0)
    assert config.sweep is not None and list(config.sweep.grid) == ["training.trunk_memory_gb"]
    assert with_values(config, {"training.cache_prefix": "off"}).training.cache_trunk == "off"
    said = capsys.readouterr().err
    assert said.count("training.cache_prefix is called training.cache_trunk now") == 1 and said.count("note:") == 3


def test_a_key_by_both_names_is_an_error(hub):
    values = hub.values()
    values["training"] |= {"cache_prefix": "on", "cache_trunk": "on"}
    with pytest.raises(InputError, match=r"training\.cache_prefix.*training\.cache_trunk"):
        config_of(values, "config.yaml")


@pytest.mark.slow
def test_a_run_of_an_earlier_version_resumes(hub, tmp_path):
    """Its config has a key by its old name, and lacks one that was added since."""
    from lora_jax.sweeps.run import run_sweep

    changes = {"training.steps": 1, "training.eval_every": 0}
    run = run_sweep(hub.config(tmp_path, changes)).path
    text = (run / "config.yaml").read_text()
    old = "".join(line.replace("cache_trunk", "cache_prefix") for line in text.splitlines(True) if "compile_cache" not in line)
    assert old.count("cache_prefix") == 1
    (run / "config.yaml").write_text(old)
    assert run_sweep(hub.config(tmp_path, changes)).compiled_programs == 0
    with pytest.raises(InputError, match=r"training\.cache_trunk"):
        run_sweep(hub.config(tmp_path, changes | {"training.cache_trunk": "on"}))
