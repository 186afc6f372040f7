"""The table of what trains."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest
from flax import nnx
from rich.console import Console

from lora_jax.adapters.describe import describe, method_table, rank_for, update_methods
from lora_jax.adapters.inject import inject
from lora_jax.config.doors import METHODS
from lora_jax.config.schema import AdapterConfig
from lora_jax.errors import InputError
from tests import tiny


def _describe(model, **values):
    return describe(inject(model, AdapterConfig(**({"rank": 4} | values)), rngs=nnx.Rngs(0)))


def _size(model):
    return sum(a.size for a in tiny.base_arrays(model).values())


@pytest.mark.parametrize(
    ("values", "layers", "count"),
    [
        ({"targets": ["q_proj"]}, 3, 3 * 4 * (32 + 32)),
        ({"targets": ["up_proj"], "layers": "last:1"}, 1, 4 * (32 + 64)),
        ({"targets": ["up_proj"], "layers": [0, 2]}, 2, 2 * 4 * (32 + 64)),
        ({"targets": ["q_proj"], "rank_pattern": {r"0\.attn\.q_proj": 1}}, 3, 9 * (32 + 32)),
        ({"targets": ["pooler"]}, None, 4 * (32 + 32)),
        ({"targets": "embedding"}, None, 4 * (64 + 32)),
    ],
)
def test_counts(values, layers, count):
    model = tiny.encoder(3)
    table = _describe(model, **values)
    (row,) = table.rows
    assert (row.label, row.layers, row.count) == ("lora", layers, count)
    assert table.count == count and table.total == _size(model) + count
    assert table.fraction == pytest.approx(count / (_size(model) + count))


def test_other_trained_parameters_have_rows_of_their_own():
    table = _describe(tiny.classifier(2), targets=["q_proj"], modules_to_save=["pooler"])
    rows = {r.name: (r.label, r.count) for r in table.rows}
    assert rows["classifier.kernel"] == ("head", 96) and rows["base.pooler.kernel"] == ("saved", 1024)
    assert rows["base.layers.attn.q_proj"] == ("lora", 2 * 4 * 64)


def test_full_training_is_all_of_it():
    model = tiny.encoder(2)
    table = _describe(model, method="full")
    assert table.count == table.total == _size(model) and table.fraction == 1


def test_counts_stay_after_training():
    adapted = inject(tiny.encoder(2), AdapterConfig(rank=4, targets=["q_proj"]), rngs=nnx.Rngs(0))
    site = adapted.layers.segments[0].block.attn.q_proj
    before = describe(adapted).count
    site.lora_b[...] = jax.random.normal(jax.random.key(0), site.lora_b.shape)
    assert describe(adapted).count == before


def test_prints():
    console = Console(width=120, record=True)
    console.print(_describe(tiny.encoder(2), targets=["q_proj"]))
    text = console.export_text()
    assert "layers.attn.q_proj" in text and "32 x 4 x 32" in text and "512 of" in text


def test_ranks_of_equal_size():
    # width 32, MLP 64: a rank costs 4 x 64 in a layer's attention, 2 x 96 in its MLP.
    model = tiny.encoder(3)
    attention, mlp = (AdapterConfig(targets=targets, layers="last:2") for targets in ("attention", "mlp"))
    budget = _describe(model, targets="mlp", rank=8, layers="last:2").count
    assert rank_for(model, attention, budget) == 6 and rank_for(model, mlp, budget) == 8
    assert _describe(model, targets="attention", rank=6, layers="last:2").count == budget
    assert rank_for(model, mlp, 1) == 1
    assert rank_for(model, AdapterConfig(targets="mlp", layers=0, rank_pattern={"up_proj": 3}), 4 * 192) == 4
    # Of a method that does not take every rank, the nearest that it takes: blocks of 4 have 6 numbers, 8 in each of two projections.
    oft = tiny.adapter(method="oft", targets=["q_proj", "v_proj"], rank=5, layers=0)
    assert rank_for(model, oft, 2 * 8 * 6) == 4 and rank_for(model, oft, 10**6) == 32


def test_the_table_of_methods_in_the_readme_is_the_registry():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"`make methods` -->\n{method_table()}\n<!-- end of methods -->" in readme, "out of date: make methods"


def test_the_table_of_methods_says_what_a_method_counts():
    rows = {
        cells[1].strip(" `"): [c.strip() for c in cells[2:-1]] for line in method_table().splitlines()[2:] if (cells := line.split("|"))
    }
    assert rows.keys() >= {"lora", "dora", "full", "head"} and rows.keys() <= METHODS.all().keys()
    assert rows["lora"] == ["[LoRA](https://arxiv.org/abs/2106.09685)", "r (in + out)", "12,288", "2.1 %", "low-rank", "LORA"]
    assert rows["dora"][1] == "r (in + out) + out" and rows["dora"][-1] == "LORA `use_dora`"
    assert rows["oft"][1] == "(r in - in) / 2" and rows["loha"][1] == "2 r (in + out)" and rows["full"][1:4] == ["–"] * 3


def test_a_file_gets_the_table_between_its_marks(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- methods: made by `make methods` -->\nold\n<!-- end of methods -->\nz\n")
    assert update_methods(page) and not update_methods(page)
    text = page.read_text()
    assert text.startswith("a\n<!--") and text.endswith("-->\nz\n") and method_table() in text and "old" not in text
    page.write_text("nothing")
    with pytest.raises(InputError, match="does not have the lines"):
        update_methods(page)
