"""`lora-jax schema` prints a schema that accepts what the config accepts and no more."""

import json

import pytest

from lora_jax.cli.schema import schema as schema_command
from lora_jax.errors import InputError


def test_prints_json(capsys):
    schema_command(None)
    schema = json.loads(capsys.readouterr().out)
    sections = [schema["$defs"][form["$ref"].rpartition("/")[2]] for form in schema["properties"]["adapter"]["oneOf"]]
    lora = next(s for s in sections if s["properties"]["method"]["const"] == "lora")
    assert lora["properties"]["rank"]["exclusiveMinimum"] == 0
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"name", "model", "task", "training"}


def test_writes_a_file(tmp_path, capsys):
    file = tmp_path / "schema.json"
    schema_command(file)
    assert capsys.readouterr().out == f"wrote {file}\n"
    schema_command(None)
    assert file.read_text() == capsys.readouterr().out


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match=r"^--output: cannot write '.*nowhere/s\.json' \(No such file or directory\)\.$"):
        schema_command(tmp_path / "nowhere" / "s.json")


def test_editors_see_what_the_loader_sees():
    jsonschema = pytest.importorskip("jsonschema")
    from lora_jax.config.messages import config_schema

    good = {
        "name": "a",
        "model": {"source": "m.gguf"},
        "task": {"kind": "classification", "source": "x.csv", "text": "t", "label": "l"},
        "training": {"steps": 10},
    }
    validator = jsonschema.Draft202012Validator(config_schema())
    validator.validate(good)
    for bad in ({"adapter": {"rnk": 1}}, {"adapter": {"rank": 0}}, {"adapter": {"bias": "some"}}, {"extra": 1}, {"name": "a b"}):
        assert not validator.is_valid(good | bad), bad
