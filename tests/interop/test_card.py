"""What a model card shows of values that people and files gave."""

from __future__ import annotations

import json

from flax import nnx

from lora_jax import inject, save_peft
from lora_jax.interop.card import model_card, public_name
from lora_jax.packing.pack import Member
from lora_jax.sweeps.restore import Restored
from lora_jax.tracking import MemberResult, member_folder
from lora_jax.weights.provenance import Origin
from tests import tiny

HOSTILE = "<script>alert(1)</script> `x` | y\n# [z](javascript:1)"


def test_a_card_holds_no_markup_from_values(tmp_path):
    settings = {"task.template": HOSTILE, "model.source": "/home/ann/models/mine"}
    name = f"template={HOSTILE},source=/home/ann/models/mine"
    config = tiny.config(model__source="/home/ann/models/mine", adapter__targets=["<b>", "a|b"])
    folder = tmp_path / member_folder(name)
    folder.mkdir()
    MemberResult(name, settings, 1, "finished", {"loss": 1.0}).write(folder)
    (tmp_path / "environment.json").write_text("{}")
    model = inject(tiny.encoder(1), tiny.adapter(targets=["q_proj"]), rngs=nnx.Rngs(0))
    restored = Restored(model, (HOSTILE, "b"), tmp_path / "final", tmp_path, Member(name, settings, config))
    card = model_card(restored, library="peft", relation="adapter", summary="For `{base}`.", usage=["x"])
    assert "<script>" not in card and "<b>" not in card and "](javascript" not in card
    assert "/home/ann" not in card and "For `mine`." in card
    assert [line for line in card.splitlines() if line.startswith("#")][1:] == ["## Use", "## Training", "## Metrics", "## Versions"]
    assert '| targets | <code>&#91;"&#60;b&#62;", "a&#124;b"&#93;</code> |' in card


def test_sources_as_others_may_read_them():
    assert public_name("models/mine") == "models/mine" and public_name("~/mine") == public_name("../mine") == "mine"


def test_an_adapter_names_its_base_without_folders_of_this_machine(tmp_path):
    for source, name, revision in (
        ("/home/ann/models/mine", "mine", None),
        ("models/mine", "models/mine", None),
        ("hf://org/base@abc", "org/base", "abc"),
        ("package://a_b/model", "package://a_b/model", None),
    ):
        base = tiny.encoder(1)
        base.origin = nnx.static(Origin.of(source, {"model_type": "bert"}, ""))
        folder = tmp_path / name.replace("/", "_")
        save_peft(inject(base, tiny.adapter(targets=["q_proj"]), rngs=nnx.Rngs(0)), folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == (name, revision)
