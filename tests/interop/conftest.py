"""What the comparisons with PyTorch share: exact float32 products, tiny random models, and real sentences to compare on."""

from __future__ import annotations

import bz2
import csv
import io
import os
import sys
from collections.abc import Iterator

import jax
import pytest

from lora_jax.weights.load import resolve
from tests.interop.zoo import Zoo


@pytest.fixture(autouse=True, scope="session")
def one_thread_a_worker() -> None:
    """PyTorch's threads wait for each other in a spin: two workers with two each on two cores would be slower than one."""
    torch = sys.modules.get("torch")  # not imported here: this folder's tests of bad files need none
    if torch is not None and "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


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
