"""The command line as a user meets it: exit codes, messages without tracebacks, complete help, a quick start."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_jax.cli import main as cli
from lora_jax.config.load import load_config
from lora_jax.config.schema import Config
from lora_jax.errors import InputError, RunError, Stopped, warn
from lora_jax.interop.export import ExportOptions
from lora_jax.parallel.processes import Joining
from lora_jax.tracking import MemberResult


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command line in this process; gives (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lora-jax", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return run


def failing(error):
    def stand_in(*args, **kwargs):
        raise error

    return stand_in


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (InputError("a.yaml, line 3: adapter.rank: must be above 0"), 2, "error: a.yaml, line 3: adapter.rank: must be above 0\n"),
        (InputError("two\n  lines"), 2, "error: two\n  lines\n"),
        (RunError("the disk is full"), 1, "error: the disk is full\n"),
        (KeyError("surprise"), 1, "error: KeyError: 'surprise'\nThis error is unexpected. Set LORA_JAX_TRACEBACK=1"),
    ],
)
def test_failures_are_told_without_a_traceback(call, monkeypatch, error, code, told):
    monkeypatch.setattr("lora_jax.config.load.load_config", failing(error))
    got, out, err = call("train", "a.yaml")
    assert got == code
    assert err.startswith(told)
    assert "Traceback" not in err and out == ""


def test_an_interrupt_exits_130(call, monkeypatch):
    monkeypatch.setattr("lora_jax.config.load.load_config", failing(KeyboardInterrupt()))
    assert call("train", "a.yaml")[0] == 130


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stopped_run_says_where_it_stopped(call, monkeypatch, number, code):
    stopped = Stopped(7)
    stopped.signal = number
    monkeypatch.setattr("lora_jax.config.load.load_config", failing(stopped))
    got, out, err = call("train", "a.yaml")
    assert got == code and out == "" and err.startswith("stopped after step 7") and len(err.splitlines()) == 1


def test_the_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setattr("lora_jax.config.load.load_config", failing(InputError("x")))
    monkeypatch.setenv("LORA_JAX_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["lora-jax", "train", "a.yaml"])
    with pytest.raises(InputError):
        cli.main()


CONFIG = """
name: a
model: {source: base}
task: {kind: classification, source: reviews.csv, text: text, label: label}
training: {steps: 10}
"""
TRAINED = {"solo": True, "fresh": False}
SWEPT = {"solo": False, "fresh": False, "many": False, "part": None, "retry": []}
PLANNED = {"solo": False, "fresh": False, "many": False, "part": None}
EXPORTED = {"form": None, "out": None, "member": None, "options": ExportOptions()}
OVER_RANKS = "sweep={grid: {adapter.rank: [2, 4]}}"


@pytest.mark.parametrize(
    ("arguments", "function", "args", "kwargs"),
    [
        (["train"], "cli.sweep.run_and_report", [{}], TRAINED),
        (
            ["train", "adapter.rank=4", "name=b", "--fresh"],
            "cli.sweep.run_and_report",
            [{"adapter.rank": 4, "name": "b"}],
            TRAINED | {"fresh": True},
        ),
        (["train", "--extend-steps", "9"], "cli.sweep.run_and_report", [{"training.extend_steps": 9}], TRAINED),
        (["sweep", OVER_RANKS, "--solo", "adapter.alpha=2"], "cli.sweep.run_and_report", [{"adapter.alpha": 2}], SWEPT | {"solo": True}),
        (["sweep", OVER_RANKS, "--yes", "--part", "1/2"], "cli.sweep.run_and_report", [{}], SWEPT | {"many": True, "part": "1/2"}),
        (["sweep", OVER_RANKS, "--retry", "a", "--retry", "b*"], "cli.sweep.run_and_report", [{}], SWEPT | {"retry": ["a", "b*"]}),
        (["sweep", OVER_RANKS, "--plan"], "cli.plan.plan_command", [{}], PLANNED),
        (["compare", "runs/a", "runs/b"], "analysis.compare_runs", [["runs/a", "runs/b"], None, {}], {}),
        (
            ["compare", "runs/a", "--metric", "loss", "--reference", "adapter.rank=1"],
            "analysis.compare_runs",
            [["runs/a"], "loss", {"adapter.rank": 1}],
            {},
        ),
        (["evaluate", "runs/a"], "sweeps.restore.evaluate_run", ["runs/a"], {"member": None, "split": "eval", "base": False}),
        (
            ["evaluate", "runs/a", "--member", "r4", "--split", "train"],
            "sweeps.restore.evaluate_run",
            ["runs/a"],
            {"member": "r4", "split": "train", "base": False},
        ),
        (["export", "runs/a"], "interop.export.export_run", ["runs/a"], EXPORTED),
        (
            ["export", "runs/a", "--format", "peft", "--member", "r4", "--max-shard-size", "1MB"],
            "interop.export.export_run",
            ["runs/a"],
            EXPORTED | {"form": "peft", "member": "r4", "options": ExportOptions(max_shard_size=10**6)},
        ),
    ],
)
def test_what_each_command_calls(call, monkeypatch, tmp_path, arguments, function, args, kwargs):
    calls = []

    class Done(Exception):
        pass

    def stand_in(*args, **kwargs):
        calls.append((args, kwargs))
        raise Done

    monkeypatch.setattr(f"lora_jax.{function}", stand_in)
    (tmp_path / "a.yaml").write_text(CONFIG)
    config = [str(tmp_path / "a.yaml")] if arguments[0] in ("train", "sweep") else []
    code, _, err = call(arguments[0], *config, *arguments[1:])
    assert code == 1 and err.startswith("error: Done"), err
    ((got_args, got_kwargs),) = calls
    joining = got_kwargs.pop("joining", None)
    got_kwargs.pop("progress", None)
    assert joining is None or joining == Joining(None, None, None, 300.0)
    assert got_kwargs == kwargs
    got_config = got_args[0] if isinstance(got_args[0], Config) else None
    if got_config is not None:
        changed = [f"{key}={json.dumps(value)}" for key, value in args[0].items()]
        changed += [OVER_RANKS] if arguments[0] == "sweep" else []
        assert got_config == load_config(tmp_path / "a.yaml", changed)
    else:
        plain = [[str(v) for v in a] if isinstance(a, list) else str(a) if isinstance(a, Path) else a for a in got_args]
        assert plain == args


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train"], "Missing argument 'CONFIG'"),
        (["train", "a.yaml", "--fres"], "No such option: --fres"),
        (["compare"], "Missing argument 'RUN'"),
        (["evaluate", "runs/a", "--member"], "requires an argument"),
    ],
)
def test_wrong_usage_exits_2(call, arguments, told):
    code, _, err = call(*arguments)
    assert code == 2
    assert told in err and "Traceback" not in err


def test_help_is_complete(call):
    code, out, _ = call("--help")
    assert code == 0
    for name in ("train", "sweep", "launch", "compare", "evaluate", "generate", "export", "doctor", "schema"):
        assert f"\n  {name} " in out
        code, text, _ = call(name, "--help")
        assert code == 0
        options = [line for line in text.splitlines() if line.startswith("  -") or (line.startswith("  ") and " <" in line)]
        assert options, text
        # Every argument and option has an explanation, on its line or the next.
        assert all(len(line.split("  ", 2)[-1].strip()) > 0 for line in options)
        assert len(text.split("Options:")[0].strip().splitlines()) >= 3
    assert "..." not in out.split("Commands:")[1], "a command's first line is too long for the list"
    assert "'adapter.targets=[query," in call("train", "--help")[1]


def test_version(call, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"lora-jax": "9.8.7"}[name])
    assert call("--version")[:2] == (0, "lora-jax 9.8.7\n")


@pytest.mark.parametrize("arguments", [["--help"], ["sweep", "--help"], ["--version"]])
def test_help_does_not_import_jax(arguments):
    code = (
        "import sys\n"
        "sys.argv = ['lora-jax', *sys.argv[1:]]\n"
        "from lora_jax.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'jax', 'flax', 'numpy', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr


def test_what_is_left_out_is_said_in_one_line_and_once(call, monkeypatch):
    def command():
        for _ in range(2):
            warn("model.source: x: a tensor that the model does not use: [a].")
        sys.exit(0)

    monkeypatch.setattr(cli, "app", command)
    for _ in range(2):  # in each command anew
        code, out, err = call()
        assert (code, out, err) == (0, "", "warning: model.source: x: a tensor that the model does not use: [a].\n")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (OSError(36, "File name too long", "x" * 5000), 2, f"error: {'x' * 197}...: File name too long.\n"),
        (PermissionError(13, "Permission denied", "/a"), 1, "error: /a: Permission denied.\n"),
        (OSError(28, "No space left on device", b"/a"), 1, "error: /a: No space left on device.\n"),
    ],
)
def test_what_a_file_system_refuses_is_foreseen(call, monkeypatch, error, code, told):
    monkeypatch.setattr("lora_jax.config.load.load_config", failing(error))
    assert call("train", "a.yaml") == (code, "", told)


def test_odd_command_lines(call, tmp_path):
    (tmp_path / "a.yaml").write_text(CONFIG)
    run = tmp_path / "run"
    MemberResult("m", {"adapter.rank": 2}, 1, "finished", {"accuracy": 0.5}).write(run / "m")
    (run / "config.yaml").write_text(CONFIG)
    config, long = str(tmp_path / "a.yaml"), "x" * 5000
    for arguments, told in (
        (["train", long], "File name too long"),
        (["evaluate", long], "File name too long"),
        (["compare", long], "File name too long"),
        (["train", config, "task.source=\udcff"], "is not text (UTF-8)"),
        (["compare", str(run), "--reference", "training.seed=1"], "seeds are paired"),
        (["compare", str(run), "--reference", "adapter.rank=.nan"], "no member has rank=nan"),
        (["launch", config, "--processes", "1000000000"], "at most 1,024"),
        (["sweep", config, OVER_RANKS, "--part", "1/99999999999999999999"], "--part: at most 100,000 parts"),
        (["doctor", config, "mesh.data=1000000000"], "mesh: needs 1,000,000,000 devices"),
    ):
        code, _, err = call(*arguments)
        assert code == 2 and told in err and "unexpected" not in err, (arguments[:2], err)
