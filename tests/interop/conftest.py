"""What the comparisons with PyTorch share: exact float32 products, tiny random models, and real sentences to compare on."""

from __future__ import annotations

import bz2
import csv
import io
from collections.abc import Iterator

import jax
import pytest

from lora_jax.config.locations import resolve
from tests.interop.zoo import Zoo


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Accelerators round the inputs of float32 products by default; a comparison to 1e-4 wants them whole."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="session")
def reviews(reviews_source: str) -> list[tuple[str, int]]:
    """(sentence, class) of every labelled film review in the file's order; fresh is 0, rotten 1."""
    path = resolve(reviews_source, key="task.source")
    with bz2.open(path) as file:
        rows = list(csv.DictReader(io.TextIOWrapper(file, encoding="utf-8")))
    classes = {"fresh": 0, "rotten": 1}
    return [(row["text"], classes[row["category"]]) for row in rows if row["category"] in classes]


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """The tiny Hugging Face models of `tests/interop/zoo.py`."""
    return Zoo(tmp_path_factory.mktemp("zoo"))
