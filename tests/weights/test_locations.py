"""Where a source points: paths, files of installed packages, hub repositories."""

from __future__ import annotations

import huggingface_hub
import pytest

from lora_jax.errors import InputError
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
