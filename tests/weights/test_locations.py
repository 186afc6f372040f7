"""Where a source points: paths, files of installed packages, hub repositories."""

from __future__ import annotations

import time

import huggingface_hub
import pytest

from lora_jax.data.sources import load_rows
from lora_jax.errors import InputError, InputWarning
from lora_jax.weights import load as locations
from lora_jax.weights.load import resolve


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What the hub was asked for; `org/gone` is not there."""
    calls = []

    def download(repo, **options):
        calls.append((repo, options["revision"], options["allow_patterns"]))
        if repo == "org/gone":
            raise OSError("no such repository")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    locations._snapshot.cache_clear()
    yield calls
    locations._snapshot.cache_clear()


def test_a_hub_repository_is_resolved_once(asked, tmp_path):
    for _ in range(2):
        assert resolve("hf://org/name@v1", key="model.source", hub_patterns=["*.json"]) == tmp_path
    assert asked == [("org/name", "v1", ["*.json"])]
    resolve("hf://org/name", key="model.source")
    assert asked[1:] == [("org/name", None, None)]


def test_what_the_hub_does_not_have_is_asked_for_again(asked):
    for _ in range(2):
        with pytest.raises(InputError, match=r"task\.source: cannot fetch 'hf://org/gone' \(no such repository\)"):
            resolve("hf://org/gone", key="task.source", hub_kind="dataset")
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("hf://nothing", "is not hf://org/name"),
        ("s3://bucket/x", "unknown scheme"),
        ("package://no_such_package_here/x", "no installed package 'no_such_package_here'"),
        ("package://json/../os.py", "leaves the package 'json'"),
        ("package://json/decodr.py", "nearby: decoder.py"),
    ],
)
def test_sources_that_point_nowhere(source, said):
    with pytest.raises(InputError) as error:
        resolve(source, key="model.source")
    assert str(error.value).startswith("model.source: ") and said in str(error.value)


def test_paths(tmp_path):
    (tmp_path / "model.yaml").write_text("")
    assert resolve(str(tmp_path / "model.yaml"), key="x") == tmp_path / "model.yaml"
    assert resolve("package://json/decoder.py", key="x").name == "decoder.py"
    with pytest.raises(InputError, match=r"nearby: model\.yaml"):
        resolve(str(tmp_path / "model.yml"), key="x")
    with pytest.raises(InputError, match="nor the folder"):
        resolve(str(tmp_path / "none" / "model.yml"), key="x")


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Online as far as the clients know, and nothing answers; an empty cache."""
    import datasets

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def info(*_, **__):
        raise ConnectionError("Name or service not known\nand much more")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", info)
    locations._snapshot.cache_clear()
    yield
    locations._snapshot.cache_clear()


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_hub_that_does_not_answer_is_not_waited_for(no_network, kind):
    before = time.perf_counter()
    with pytest.raises(InputError) as error:
        if kind == "model":
            resolve("hf://org/name", key="model.source")
        else:
            load_rows("hf://org/name", key="task.source", columns=["text"])
    assert "cannot fetch 'hf://org/name' (the hub does not answer: Name or service not known; and" in str(error.value)
    assert "\n" not in str(error.value) and time.perf_counter() - before < 15
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_copy_in_the_cache_is_read_with_a_word(no_network, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.warns(InputWarning, match=r"does not answer \(Name or service not known\): what is in its cache of 'org/name' is read"):
        assert resolve("hf://org/name", key="model.source") == tmp_path


def test_offline_is_said_in_one_line():
    with pytest.raises(InputError, match=r"cannot fetch 'hf://org/no-such' \(HF_HUB_OFFLINE is set, and its files are not in the cache\)"):
        resolve("hf://org/no-such", key="model.source")


def test_a_hub_id_without_its_scheme_is_hinted(tmp_path):
    with pytest.raises(InputError, match=r"no file or folder 'org/name' .* Write hf://org/name\."):
        resolve("org/name", key="model.source")
    with pytest.raises(InputError) as error:
        resolve("data/reviews.csv", key="task.source")
    assert "hf://" not in str(error.value)
