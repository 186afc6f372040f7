"""The base transform door: a transform from another package in a YAML sweep, and what is said of lists that will not do."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pydantic import Field

from lora_jax.config.doors import TRANSFORMS
from lora_jax.config.load import dump_config, load_config
from lora_jax.config.schema import TransformConfig
from lora_jax.errors import InputError
from lora_jax.models.load import load_model
from lora_jax.models.transforms.base import BaseTransform, TransformContext, register_transform
from lora_jax.sweeps.restore import named_member, restore_member, run_members
from lora_jax.weights.provenance import fingerprint
from tests.tiny_hub import call


class RoundSection(TransformConfig):
    kind: Literal["test-round"] = Field(description="Rounds the weights of linear layers to a grid.")
    step: float = Field(gt=0, description="Distance of the grid's points.")


class Round(BaseTransform):
    section = RoundSection

    def apply(self, model: Any, section: RoundSection, context: TransformContext) -> Any:
        for path, variable in nnx.iter_graph(model):
            if isinstance(variable, nnx.Param) and path[-1] == "kernel":
                variable.set_value(jnp.round(variable[...] / section.step) * section.step)
        return model


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    if "test-round" not in TRANSFORMS:
        register_transform("test-round", Round())
    yield


def rounded(step: float) -> list[dict[str, Any]]:
    return [{"kind": "test-round", "step": step}]


@pytest.mark.slow
def test_it_is_applied_after_the_load_and_is_part_of_the_fingerprint(hub):
    plain = load_model(str(hub.bert))
    section = RoundSection(kind="test-round", step=0.25)
    changed = load_model(str(hub.bert), transforms=[section])
    kernel = np.asarray(changed.layers.segments[0].block.mlp.up_proj.kernel[...])
    assert np.array_equal(kernel, np.round(kernel * 4) / 4) and len(np.unique(kernel)) > 4
    assert fingerprint(changed) != fingerprint(plain)
    assert fingerprint(load_model(str(hub.bert), transforms=[section])) == fingerprint(changed)


@pytest.mark.slow
def test_a_sweep_trains_over_bases_of_two_grids(hub, tmp_path):
    grid = {"model.transforms": [[], rounded(0.5)], "adapter.rank": [1, 2]}
    path = hub.write(tmp_path, {"sweep": {"grid": grid}})
    assert load_config(path).sweep is not None
    called = call("sweep", path)
    assert called.code == 0, called.err
    run = tmp_path / "runs" / "tiny"
    losses = {row["name"]: row["final_loss"] for row in csv.DictReader((run / "results.csv").open())}
    assert len(set(losses.values())) == 4
    # Evaluated again, and restored, over the transformed base.
    again = call("evaluate", run)
    assert again.code == 0, again.err
    for member in run_members(run):
        kernel = np.asarray(_kernel(restore_member(run, named_member([member], member.name, "x")).model))
        on_grid = np.array_equal(kernel, np.round(kernel * 2) / 2)
        assert on_grid == bool(member.config.model.transforms)


def _kernel(model: nnx.Module) -> Any:
    found = [v for p, v in nnx.iter_graph(model) if isinstance(v, nnx.Param) and "up_proj" in p and p[-1] == "kernel"]
    return found[0][...]


def test_the_config_is_written_and_read_back(hub, tmp_path):
    config = hub.config(tmp_path, {"model.transforms": rounded(0.5)})
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert config.model.transforms[0].kind == "test-round"
    override = load_config(tmp_path / "again.yaml", ["model.transforms=[]"])
    assert override.model.transforms == []


@pytest.mark.parametrize(
    ("listed", "parts"),
    [
        ([{"kind": "test-rnd"}], ("model.transforms.0", "'test-rnd'", "Did you mean 'test-round'")),
        ([{"step": 1.0}], ("model.transforms.0", "must be a section")),
        ([{"kind": "test-round"}], ("model.transforms.0: test-round: step", "required")),
        ([{"kind": "test-round", "step": 0.0}], ("model.transforms.0: test-round: step", "got 0.0")),
        ([{"kind": "test-round", "step": 1.0, "stp": 1}], ("model.transforms.0", "'stp'", "Did you mean 'step'")),
        (rounded(0.5) * 2, ("model.transforms", "'test-round' twice")),
        (["test-round"], ("model.transforms.0", "must be a section")),
        ("test-round", ("model.transforms", "must be a list")),
    ],
)
def test_what_a_list_may_not_hold(hub, tmp_path, listed, parts):
    path = hub.write(tmp_path, {"model.transforms": listed})
    with pytest.raises(InputError) as error:
        load_config(path)
    assert str(error.value).startswith(str(path)) and all(part in str(error.value) for part in parts), str(error.value)
