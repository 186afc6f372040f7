"""Where a source points: paths, files of installed packages, hub repositories."""

from __future__ import annotations

import http.server
import threading
import time

import huggingface_hub
import pytest
from huggingface_hub.errors import IncompleteSnapshotError, OfflineModeIsEnabled

from lora_jax.data.sources import load_rows
from lora_jax.errors import InputError, InputWarning
from lora_jax.weights import load as locations
from lora_jax.weights.load import resolve

REPO_INFO = huggingface_hub.HfApi.repo_info


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
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled("as its client does")
        raise ConnectionError("Name or service not known\nand much more")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", info)
    locations._snapshot.cache_clear()
    yield tmp_path
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


def cached(folder, kind="models"):
    """A repository in the hub's cache, as its client keeps it."""
    repo = folder / f"{kind}--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    return snapshot


def refused(source="hf://org/name", **options) -> str:
    with pytest.raises(InputError) as error:
        resolve(source, key="model.source", **options)
    return str(error.value)


def test_a_cache_that_cannot_be_read_is_told_from_an_empty_one(no_network, tmp_path):
    assert refused().endswith("(the hub does not answer: Name or service not known; and its files are not in the cache).")
    refs = cached(tmp_path).parents[1] / "refs" / "main"
    refs.unlink()
    refs.mkdir()
    assert "and its copy in the cache cannot be read: [Errno 21] Is a directory: " in refused()


def test_a_cache_that_is_not_whole_is_told(no_network, monkeypatch, tmp_path):
    def download(*_, **__):
        raise IncompleteSnapshotError("The snapshot is incomplete: 1 file(s) are missing (model.safetensors). Re-run.", str(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert refused().endswith("; and its copy in the cache is not whole: it lacks model.safetensors).")


def test_a_damaged_data_set_in_the_cache_is_told_from_a_missing_one(no_network, tmp_path):
    import datasets
    from datasets.arrow_writer import ArrowWriter

    folder = tmp_path / "org___name" / "default" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    rows = datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(1000)]})
    with ArrowWriter(path=str(folder / "name-train.arrow"), features=rows.features) as writer:
        writer.write_table(rows.data.table)
        count, size = writer.finalize()
    splits = datasets.splits.SplitDict(dataset_name="name")
    splits.add(datasets.SplitInfo("train", num_bytes=size, num_examples=count))
    info = datasets.DatasetInfo(features=rows.features, splits=splits, config_name="default", dataset_name="name", builder_name="parquet")
    info.write_to_directory(str(folder))
    with pytest.warns(InputWarning, match=r"what is in its cache of 'org/name' is read"):
        assert len(load_rows("hf://org/name", key="task.source", columns=["text"]).columns["text"]) == 1000
    file = folder / "name-train.arrow"
    file.write_bytes(file.read_bytes()[: size // 2])
    with pytest.raises(InputError, match="the hub does not answer: Name or service.*; and its copy in the cache cannot be read: "):
        load_rows("hf://org/name", key="task.source", columns=["text"])


@pytest.fixture
def server(no_network, monkeypatch):
    """A hub of one answer: status, and headers. Gives a function that sets it."""
    answer: dict = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            time.sleep(answer.get("wait", 0))
            self.send_response(answer["status"])
            for header in answer["headers"].items():
                self.send_header(*header)
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.daemon_threads = True
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", REPO_INFO)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    yield lambda status, wait=0, **headers: answer.update(
        status=status, wait=wait, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )
    hub.shutdown()
    hub.server_close()


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (404, {"X_Error_Code": "RepoNotFound"}, "does not give it: no such repository, or a private one; `hf auth login` gives"),
        (401, {"X_Error_Code": "GatedRepo"}, "does not give it: its owner grants access: ask for it on the repository's page"),
        (403, {"X_Error_Code": "GatedRepo"}, "does not give it: its owner grants access: ask for it on the repository's page"),
        (401, {"X_Error_Message": "Invalid credentials in Authorization header"}, "does not give it: your login is not valid: renew it"),
        (503, {}, "does not answer: "),
    ],
)
def test_what_the_hub_refuses_is_told_in_its_kind(server, no_network, status, headers, said):
    server(status, **headers)
    before = time.perf_counter()
    told = refused()
    assert f"cannot fetch 'hf://org/name' (the hub {said}" in told and told.endswith("; and its files are not in the cache).")
    assert "\n" not in told and time.perf_counter() - before < 5
    snapshot = cached(no_network)
    with pytest.warns(InputWarning, match=r"the hub does not (give it|answer): .*: what is in its cache of 'org/name' is read"):
        assert resolve("hf://org/name", key="model.source") == snapshot


def test_a_revision_that_is_not_there_is_told(server):
    server(404, X_Error_Code="RevisionNotFound")
    assert "(the repository has no such revision)" in refused("hf://org/name@v9")


def test_a_name_that_the_hub_cannot_have_is_told(server):
    server(200)
    assert "org/na--me" in refused("hf://org/na--me") and "not in the cache" not in refused("hf://org/na--me")


def test_a_hub_that_keeps_silent_is_waited_for_once(server, monkeypatch):
    monkeypatch.setattr(locations, "_ANSWER_SECONDS", 0.3)
    server(200, wait=4)
    before = time.perf_counter()
    assert "the hub does not answer: " in refused() and time.perf_counter() - before < 3


def test_a_copy_in_the_cache_is_read_with_a_word(no_network, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.warns(InputWarning, match=r"does not answer: Name or service not known: what is in its cache of 'org/name' is read"):
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
