"""OFT, RoAd and C3A beside PEFT: their further options, and sizes that PEFT's files say in other ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from flax import nnx

from lora_jax import InputError, inject, load_model, load_peft, merge, save_peft
from lora_jax.adapters.inject import site_modules
from tests import tiny
from tests.interop.test_peft_files import assert_same_files, our_logits, their_logits
from tests.interop.zoo import Zoo

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

BASE, TARGETS = "llama-gqa-bias", ["q_proj", "v_proj", "down_proj"]
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("OFTConfig", {"oft_block_size": 0, "r": 4}),  # the number of blocks: of other sizes where there are more inputs
    ("OFTConfig", {"oft_block_size": 6}),  # divides no inputs: PEFT takes the nearest that does
    ("OFTConfig", {"oft_block_size": 8, "block_share": True}),
    ("OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False}),
    ("OFTConfig", {"oft_block_size": 8, "num_cayley_neumann_terms": 3}),
    ("OFTConfig", {"oft_block_size": 8, "coft": True, "eps": 0.5}),
    ("OFTConfig", {"oft_block_size": 8, "bias": "oft_only"}),
    ("HRAConfig", {"r": 3}),  # an odd rank does not start as the identity, but is read
    ("RoadConfig", {"group_size": 4, "variant": "road_2"}),
    ("RoadConfig", {"group_size": 16, "variant": "road_4"}),
    ("C3AConfig", {"block_size": 4, "block_size_pattern": {"v_proj": 8, r"1\.self_attn\.q_proj": 16}}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
def test_from_peft_and_back(kind: str, options: dict[str, Any], zoo: Zoo, tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = peft.get_peft_model(zoo.model(BASE), getattr(peft, kind)(target_modules=TARGETS, **options)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = their_logits(theirs)
    model = load_model(str(zoo.source(BASE)))
    ours = load_peft(model, tmp_path / "theirs")
    assert np.abs(our_logits(ours) - our_logits(model)).max() > 0.01
    assert np.abs(our_logits(ours) - expected).max() < 1e-4
    assert np.abs(our_logits(merge(ours)) - expected).max() < 1e-4
    save_peft(ours, tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")


def test_blocks_of_unequal_sizes_are_named_outright(zoo: Zoo, tmp_path: Path) -> None:
    """A key of PEFT's `block_size_pattern` cannot be a whole name."""
    model = load_model(str(zoo.source(BASE)))
    config = tiny.adapter(method="c3a", rank=8, targets="attention", rank_pattern={r"layers\.1\.attn\.v_proj": 4}, init_weights="gaussian")
    ours = inject(model, config, rngs=nnx.Rngs(0))
    save_peft(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(zoo.model(BASE), str(tmp_path / "ours")).eval()
    assert np.abs(our_logits(ours) - their_logits(theirs)).max() < 1e-4
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["block_size_pattern"] == {r"layers\.1\.self_attn\.v_proj": 4}


def test_what_a_file_cannot_say(zoo: Zoo, tmp_path: Path) -> None:
    model = load_model(str(zoo.source(BASE)))
    config = tiny.adapter(method="oft", rank=8, targets=["q_proj"], rank_pattern={r"1\.attn\.q_proj": 4})
    ours = inject(model, config, rngs=nnx.Rngs(0))
    (site,) = site_modules(ours).values()
    site.skew.set_value(jnp.ones(site.skew.shape))
    with pytest.raises(InputError, match="OFT.*rank_pattern"):
        save_peft(ours, tmp_path / "ours")
    save_peft(inject(model, tiny.adapter(method="oft", rank=8, targets=["q_proj"]), rngs=nnx.Rngs(0)), tmp_path / "good")
    file = tmp_path / "good" / "adapter_config.json"
    good = json.loads(file.read_text())
    for wrong, said in (({"r": 4}, "'r'"), ({"oft_block_size": None}, "oft_block_size"), ({"module_dropout": 0.1}, "module_dropout")):
        file.write_text(json.dumps(good | wrong))
        with pytest.raises(InputError, match=said):
            load_peft(model, tmp_path / "good")
    file.write_text(json.dumps({key: value for key, value in good.items() if key != "oft_block_size"}))
    with pytest.raises(InputError, match=r"before PEFT 0\.14"):
        load_peft(model, tmp_path / "good")
