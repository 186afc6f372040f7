"""`lora-jax generate`: a bare model, a PEFT adapter, a run's member, a config, a conversation; and what is refused."""

from __future__ import annotations

import io
import json
from unittest import mock

import pytest
from flax import nnx

import lora_jax
from lora_jax.errors import InputWarning
from lora_jax.sweeps.restore import restore_member, run_members
from tests import tiny
from tests.tiny_hub import call

pytestmark = pytest.mark.usefixtures("compile_cache")
PROMPT = "What is the red blue"


@pytest.fixture(autouse=True)
def quickly():
    """Nearly all of the time here is compiling."""
    with tiny.quick_compile():
        yield


@pytest.fixture(scope="module")
def model(hub):
    return lora_jax.load_model(str(hub.llama))


@pytest.fixture(scope="module")
def tokenizer(hub):
    return lora_jax.load_tokenizer(str(hub.llama))


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory, compile_cache):
    """The run directory of a small sweep, and its config."""
    folder = tmp_path_factory.mktemp("generated")
    changes = {"sweep": {"grid": {"adapter.rank": [2, 4]}}, "optimizer.learning_rate": 0.3}
    path = hub.write(folder, changes, causal=True)
    result = call("sweep", path)
    assert result.code == 0, result.err
    return folder / "runs" / "tiny", path


def text(model, tokenizer, prompts, **options):
    return [o.text for o in lora_jax.generate(model, prompts, tokenizer, **{"max_new_tokens": 8} | options)]


def test_a_bare_model_streams_what_generate_returns(hub, model, tokenizer):
    result = call("generate", hub.llama, "--prompt", PROMPT, "--max-new-tokens", 8)
    assert (result.code, result.out) == (0, text(model, tokenizer, [PROMPT])[0] + "\n")
    assert len(result.out.split()) >= 3
    drawn = call(
        "generate", hub.llama, "-p", PROMPT, "--max-new-tokens", 8, "--temperature", 1.5, "--top-k", 9, "--top-p", 0.9, "--seed", 4
    )
    options = {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "seed": 4}
    assert drawn.out == text(model, tokenizer, [PROMPT], **options)[0] + "\n" != result.out


def test_a_file_of_prompts_is_one_batch(hub, model, tokenizer, tmp_path):
    prompts = [PROMPT, "red", "the blue is red"]
    (tmp_path / "prompts.txt").write_text("\n".join([prompts[0], "", *prompts[1:]]) + "\n")
    result = call("generate", hub.llama, "--file", tmp_path / "prompts.txt", "--max-new-tokens", 8)
    answers = text(model, tokenizer, prompts)
    assert result.out == "".join(f"[{i}] {p}\n{a}\n\n" for i, (p, a) in enumerate(zip(prompts, answers, strict=True)))


@pytest.mark.slow
def test_with_a_peft_adapter(hub, model, tokenizer, tmp_path):
    adapted = tiny.trained(model, 3, targets=["q_proj", "down_proj"])
    lora_jax.save_peft(adapted, tmp_path / "adapter")
    result = call("generate", hub.llama, "--adapter", tmp_path / "adapter", "--prompt", PROMPT, "--max-new-tokens", 8)
    assert result.out == text(adapted, tokenizer, [PROMPT])[0] + "\n" != text(model, tokenizer, [PROMPT])[0] + "\n"


@pytest.mark.slow
def test_what_a_run_trained(run, model, tokenizer):
    path, config = run
    for member in run_members(path):
        expected = text(restore_member(path, member).model, tokenizer, [PROMPT])[0] + "\n"
        result = call("generate", path, "--member", member.name, "--prompt", PROMPT, "--max-new-tokens", 8)
        assert (result.out, result.err) == (expected, f"member {member.name}\n")
    best = call("generate", config, "--prompt", PROMPT, "--max-new-tokens", 8)
    assert best.code == 0 and "best of 2 by" in best.err
    assert best.out != text(model, tokenizer, [PROMPT])[0] + "\n"


def test_a_config_that_was_not_trained_yet_is_its_base(hub, model, tokenizer, tmp_path):
    result = call("generate", hub.write(tmp_path, causal=True), "--prompt", PROMPT, "--max-new-tokens", 8)
    assert result.out == text(model, tokenizer, [PROMPT])[0] + "\n" and "not trained yet" in result.err


@pytest.mark.slow
def test_a_conversation_keeps_what_was_said(hub, model, tokenizer):
    with mock.patch("sys.stdin", io.StringIO("red is\n\nblue is\n")):
        result = call("generate", hub.llama, "--chat", "--max-new-tokens", 8)
    first = [{"role": "user", "content": "red is"}]
    said = text(model, tokenizer, [first])[0]
    second = text(model, tokenizer, [[*first, {"role": "assistant", "content": said}, {"role": "user", "content": "blue is"}]])[0]
    assert (result.code, result.out) == (0, f"{said}\n{second}\n")
    once = call("generate", hub.llama, "--chat", "--prompt", "red is", "--max-new-tokens", 8)
    assert once.out == said + "\n"


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], ["no prompt", "--prompt"]),
        (["--prompt", "a", "--file", "x"], ["--prompt and --file"]),
        (["--file", "nowhere.txt"], ["--file", "nowhere.txt"]),
        (["--system", "s", "--prompt", "a"], ["--system", "--chat"]),
        (["--prompt", "a", "--member", "m"], ["--member", "not a run"]),
        (["--prompt", "a", "--adapter", "nowhere"], ["nowhere"]),
        (["--prompt", "a", "--temperature", "-1"], ["temperature", "-1"]),
        (["--prompt", "a", "--top-p", "0"], ["top_p"]),
        (["--prompt", "a", "--top-k", "0"], ["top_k"]),
    ],
)
def test_what_is_refused(hub, arguments, told):
    result = call("generate", hub.llama, *arguments)
    assert result.code == 2 and result.out == "" and "Traceback" not in result.err
    assert all(t in result.err for t in told), result.err


@pytest.mark.slow
def test_other_sources_that_are_refused(hub, run, tmp_path):
    path, _ = run
    for arguments, told in (
        ([path, "--prompt", "a", "--member", "rank=3"], ["--member", "rank=2"]),
        ([path, "--prompt", "a", "--adapter", tmp_path], ["--adapter"]),
        ([hub.bert, "--prompt", "a"], ["generate needs a decoder; this model is an Encoder."]),
        ([tmp_path / "nothing", "--prompt", "a"], ["nothing"]),
    ):
        result = call("generate", *arguments)
        assert result.code == 2 and result.out == "" and all(t in result.err for t in told), (arguments, result)


def test_a_damaged_generation_config_is_left_out_with_a_word(hub, tokenizer, tmp_path):
    """What the checkpoint says ends a text, wherever it says it."""
    from lora_jax.generation.generate import stop_tokens

    folder = tmp_path / "llama"
    folder.mkdir()
    for file in hub.llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    model = lora_jax.load_model(str(folder))
    assert isinstance(model, nnx.Module) and stop_tokens(model, tokenizer) == [tokenizer.eos_token_id]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 3]}))
    assert stop_tokens(model) == [3, 5]
    (folder / "generation_config.json").write_text("{")
    with pytest.warns(InputWarning, match=r"the config and the tokenizer alone: .*generation_config\.json"):
        assert stop_tokens(model, tokenizer) == [tokenizer.eos_token_id]


def test_a_hub_models_generation_config_is_fetched_with_its_weights(hub, monkeypatch, tmp_path):
    """As one folder, asked for once: what ends a text is known wherever it is said."""
    import fnmatch

    import huggingface_hub

    from lora_jax.generation.generate import stop_tokens
    from lora_jax.weights import load as locations

    asked = []

    def download(repo, *, allow_patterns, **_):
        asked.append(repo)
        folder = tmp_path / str(len(asked))
        folder.mkdir()
        files = {file.name: file.read_bytes() for file in hub.llama.iterdir()} | {"generation_config.json": b'{"eos_token_id": [5, 3]}'}
        for name, content in files.items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (folder / name).write_bytes(content)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    locations._snapshot.cache_clear()
    try:
        model = lora_jax.load_model("hf://org/name")
        ends = lora_jax.load_tokenizer("hf://org/name").eos_token_id
        assert stop_tokens(model, lora_jax.load_tokenizer("hf://org/name")) == sorted({ends, 3, 5})
    finally:
        locations._snapshot.cache_clear()
    assert asked == ["org/name"]
