"""The command line as a user meets it: exit codes, messages without tracebacks, complete help, a quick start."""

import importlib.metadata
import os
import subprocess
import sys
import types

import pytest

from lora_jax.cli import main as cli
from lora_jax.errors import InputError, RunError


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


@pytest.fixture
def command(monkeypatch):
    """Puts a stand-in behind a command, and gives what it was called with."""

    def put(name, result=None):
        calls = []

        def stand_in(*args, **kwargs):
            calls.append((args, kwargs))
            if isinstance(result, BaseException):
                raise result

        module = types.ModuleType(f"lora_jax.cli.{name}")
        setattr(module, f"{name}_command", stand_in)
        monkeypatch.setitem(sys.modules, f"lora_jax.cli.{name}", module)
        return calls

    return put


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (InputError("a.yaml, line 3: adapter.rank: must be above 0"), 2, "error: a.yaml, line 3: adapter.rank: must be above 0\n"),
        (InputError("two\n  lines"), 2, "error: two\n  lines\n"),
        (RunError("the disk is full"), 1, "error: the disk is full\n"),
        (KeyError("surprise"), 1, "error: KeyError: 'surprise'\nThis was not foreseen. LORA_JAX_TRACEBACK=1 shows"),
    ],
)
def test_failures_are_told_without_a_traceback(call, command, error, code, told):
    command("train", error)
    got, out, err = call("train", "a.yaml")
    assert got == code
    assert err.startswith(told)
    assert "Traceback" not in err and out == ""


def test_an_interrupt_exits_130(call, command):
    command("train", KeyboardInterrupt())
    assert call("train", "a.yaml")[0] == 130


def test_the_traceback_can_be_asked_for(command, monkeypatch):
    command("train", InputError("x"))
    monkeypatch.setenv("LORA_JAX_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["lora-jax", "train", "a.yaml"])
    with pytest.raises(InputError):
        cli.main()


SWEPT = {"solo": False, "fresh": False, "many": False, "part": None, "plan": False, "retry": []}


@pytest.mark.parametrize(
    ("arguments", "args", "kwargs"),
    [
        (["train", "a.yaml"], ("a.yaml", []), {"fresh": False}),
        (["train", "a.yaml", "adapter.rank=4", "name=b", "--fresh"], ("a.yaml", ["adapter.rank=4", "name=b"]), {"fresh": True}),
        (["sweep", "a.yaml", "--solo", "x=[1, 2]"], ("a.yaml", ["x=[1, 2]"]), SWEPT | {"solo": True}),
        (["sweep", "a.yaml", "--yes", "--part", "1/2"], ("a.yaml", []), SWEPT | {"many": True, "part": "1/2"}),
        (["sweep", "a.yaml", "--plan"], ("a.yaml", []), SWEPT | {"plan": True}),
        (["train", "a.yaml", "--extend-steps", "9"], ("a.yaml", ["training.extend_steps=9"]), {"fresh": False}),
        (["compare", "runs/a", "runs/b"], (["runs/a", "runs/b"], "None", []), {}),
        (["compare", "runs/a", "--metric", "loss", "--reference", "a=1"], (["runs/a"], "loss", ["a=1"]), {}),
        (["evaluate", "runs/a"], ("runs/a",), {"member": None, "split": "eval"}),
        (["evaluate", "runs/a", "--member", "r4", "--split", "train"], ("runs/a",), {"member": "r4", "split": "train"}),
        (["export", "runs/a"], ("runs/a",), {"form": None, "out": None, "member": None, "dtype": None, "max_shard_size": None}),
        (
            ["export", "runs/a", "--format", "peft", "--member", "r4", "--max-shard-size", "1MB"],
            ("runs/a",),
            {"form": "peft", "out": None, "member": "r4", "dtype": None, "max_shard_size": "1MB"},
        ),
    ],
)
def test_what_each_command_is_called_with(call, command, arguments, args, kwargs):
    calls = command(arguments[0])
    assert call(*arguments)[0] == 0
    (got_args, got_kwargs) = calls[0]
    got_kwargs.pop("joining", None)
    plain = tuple([str(v) for v in a] if isinstance(a, list) else str(a) for a in got_args)
    assert (plain, got_kwargs) == (args, kwargs)


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
    for name in ("train", "sweep", "launch", "compare", "evaluate", "export", "doctor", "schema"):
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


def test_help_and_schema_do_not_import_jax():
    code = (
        "import sys\n"
        "sys.argv = ['lora-jax', sys.argv[1]]\n"
        "from lora_jax.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'jax', 'flax', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for argument in ("--help", "schema"):
        done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, env=dict(os.environ))
        assert done.returncode == 0, done.stderr
