"""The dotted keys come from the schema, and a wrong one is answered with the right one."""

import pytest

from lora_jax.config import schema
from lora_jax.config import schema as sweep_schema
from lora_jax.config.doors import METHODS, OPTIMIZERS, TASKS, OneOf
from lora_jax.config.messages import config_schema, leaf_schema, near_keys, section_keys, split_key, valid_keys, why_not_swept
from lora_jax.errors import InputError
from lora_jax.tasks.teachers import DistillConfig


def test_keys_are_the_schemas_fields():
    sections = {
        "model": schema.ModelConfig,
        "task": list(OneOf(TASKS, "kind").sections().values()),
        "task.distill": DistillConfig,
        "adapter": list(OneOf(METHODS, "method").sections().values()),
        "optimizer": list(OneOf(OPTIMIZERS, "kind").sections().values()),
        "training": schema.TrainingConfig,
        "mesh": schema.MeshConfig,
        "tracking": schema.TrackingConfig,
        "sweep": schema.SweepConfig,
        "sweep.random": sweep_schema.RandomConfig,
        "sweep.halving": sweep_schema.HalvingConfig,
    }
    assert section_keys() == list(sections)
    kinds = {name: section if isinstance(section, list) else [section] for name, section in sections.items()}
    fields = {f"{name}.{field}" for name, found in kinds.items() for section in found for field in section.model_fields}
    assert sorted(valid_keys()) == sorted(["name", *(f for f in fields if f not in sections)])


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("adapter.rnk", "adapter.rank"),
        ("rank", "adapter.rank"),
        ("adaptor.rank", "adapter.rank"),
        ("optimizer.rank", "adapter.rank"),
        ("adapter.learning_rate", "optimizer.learning_rate"),
        ("lr", "optimizer.learning_rate"),
        ("r", "adapter.rank"),
        ("adapter.lora_alpha", "adapter.alpha"),
        ("adapter.target_modules", "adapter.targets"),
        ("optimiser", "optimizer"),
        ("modle", "model"),
        ("training.batchsize", "training.batch_size"),
        ("batchsize", "training.batch_size"),
        ("sweep.gird", "sweep.grid"),
        ("RANK", "adapter.rank"),
    ],
)
def test_the_nearest_key_comes_first(wrong, right):
    assert near_keys(wrong)[0] == right


def test_a_name_found_in_two_sections_offers_both():
    assert set(near_keys("source")) == {"model.source", "task.source"}
    assert near_keys("task.sourc") == ["task.source"]


def test_every_name_of_other_libraries_leads_to_a_real_key():
    from lora_jax.config.renamed import ELSEWHERE_CALLED

    assert set(ELSEWHERE_CALLED.values()) <= set(valid_keys())


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("name", ("name",)),
        ("adapter.rank", ("adapter", "rank")),
        ("adapter.rank_pattern.layers.0.q_proj", ("adapter", "rank_pattern", "layers.0.q_proj")),
        ("sweep.grid.adapter.rank", ("sweep", "grid", "adapter.rank")),
        ("task.drop.kind", ("task", "drop", "kind")),
    ],
)
def test_split_key(key, path):
    assert split_key(key) == path


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("adapter.rnk", "no config key 'adapter.rnk'. Did you mean 'adapter.rank'?"),
        ("adapter", "'adapter' is a section; name a key in it, such as 'adapter.method'."),
        ("adapter.rank.x", "no config key 'adapter.rank.x': 'adapter.rank' holds a value, not further keys."),
        ("adapter.rank_pattern.", "no config key 'adapter.rank_pattern.'."),
        ("mesh.zzzzz", "no config key 'mesh.zzzzz'. Valid keys here: data, fsdp, tensor, sweep."),
        ("", "no config key ''."),
        ("adapter..rank", "no config key 'adapter..rank'. Did you mean 'adapter.rank'?"),
    ],
)
def test_split_key_refuses(key, message):
    with pytest.raises(InputError) as caught:
        split_key(key)
    assert str(caught.value).startswith(message)


def test_what_can_be_swept():
    refused = {key.split(".")[0] for key in valid_keys() if why_not_swept(key)}
    assert refused == {"name", "tracking", "mesh", "sweep"}
    assert "adapter, model, optimizer, task, training" in (why_not_swept("mesh.data") or "")


def test_every_key_is_described():
    assert [key for key in valid_keys() if not (leaf_schema(key) or {}).get("description")] == []


def test_the_schema_handed_out_is_the_readers_own():
    handed_out = config_schema()
    assert handed_out["$schema"].endswith("2020-12/schema")
    handed_out["properties"].clear()
    assert config_schema()["properties"]
