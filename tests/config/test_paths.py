"""Paths in a config: relative to its folder, absolute once they are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_jax.config.load import dump_config, load_config
from lora_jax.errors import InputError
from lora_jax.sweeps.space import members_of
from lora_jax.tracking.rundir import differences
from lora_jax.weights.load import resolve

CONFIG = """
name: a
model: {source: model}
task: {kind: classification, source: data/a.csv, eval_source: hf://org/name, text: t, label: l}
training: {steps: 1}
"""


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for folder in ("configs/model", "configs/data", "here/model"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("configs/data/a.csv", "configs/data/b.csv", "here/only.csv"):
        (tmp_path / file).write_text("t,l\nx,y\n")
    (tmp_path / "configs" / "a.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_the_configs_folder_comes_first_and_then_the_working_directory(folders):
    config = load_config("../configs/a.yaml")
    assert (config.model.source, config.task.source) == (str(folders / "configs/model"), str(folders / "configs/data/a.csv"))
    assert config.task.eval_source == "hf://org/name"
    (folders / "configs" / "a.yaml").write_text(CONFIG.replace("data/a.csv", "only.csv"))
    config = load_config("../configs/a.yaml", ["model.source=model"])  # typed here, so meant from here
    assert (config.model.source, config.task.source) == (str(folders / "here/model"), str(folders / "here/only.csv"))


def test_a_run_reads_the_same_files_from_anywhere(folders, monkeypatch):
    config = load_config("../configs/a.yaml")
    (folders / "run").mkdir()
    (folders / "run" / "config.yaml").write_text(dump_config(config))
    monkeypatch.chdir("/")
    assert load_config(folders / "run" / "config.yaml") == config


def test_swept_paths_are_absolute_and_names_hold_their_last_word(folders):
    (folders / "configs" / "a.yaml").write_text(CONFIG + "sweep: {grid: {task.source: [data/a.csv, data/b.csv]}}\n")
    members = members_of(load_config("../configs/a.yaml"))
    assert [m.name for m in members] == ["source=a.csv", "source=b.csv"]
    assert [m.config.task.source for m in members] == [str(folders / "configs/data" / f"{n}.csv") for n in "ab"]


def test_what_is_not_found_says_where_it_was_looked_for(folders):
    (folders / "configs" / "a.yaml").write_text(CONFIG.replace("data/a.csv", "none.csv"))
    source = load_config("../configs/a.yaml").task.source
    with pytest.raises(InputError, match="task.source: no file or folder 'none.csv'") as caught:
        resolve(source, key="task.source")
    assert f"looked for {folders / 'configs/none.csv'} and {folders / 'here/none.csv'}" in str(caught.value)
    with pytest.raises(InputError, match="no file or folder '~nobody-here/x'"):
        resolve("~nobody-here/x", key="model.source")


def test_a_run_that_kept_relative_paths_is_still_the_same(folders):
    assert differences({"model": {"source": "model"}}, {"model": {"source": str(Path("model").absolute())}}) == {}
    assert differences({"model": {"source": "model"}}, {"model": {"source": "/model"}}) != {}
