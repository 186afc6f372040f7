"""`lora-jax generate`: text after prompts, or a conversation, by a model or by a trained member of a run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError

# Tokens that a conversation may have before its program is compiled again.
_CHAT_LENGTH = 1024


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of the command line.

    Attributes:
        source: a run directory or a member's folder in it, a config, or a model.
        member, adapter: which member of a run; a PEFT adapter for a model.
        prompts, file: texts to go on from; a file with one a line.
        chat, system: whether prompts are messages of a user; the system message.
        options: of `generate`.
    """

    source: str
    member: str | None
    adapter: Path | None
    prompts: tuple[str, ...]
    file: Path | None
    chat: bool
    system: str | None
    options: dict[str, Any]


def generate_command(request: Request) -> None:
    """Prints what follows each prompt; a single one's as it comes."""
    prompts = _prompts(request)
    from ..generation.generate import Generator
    from ..generation.sampling import Sampling
    from ..weights.tokenizer import load_tokenizer

    Sampling(*(request.options[k] for k in ("temperature", "top_k", "top_p")))  # refused before anything is loaded
    model, source = _model(request)
    tokenizer = load_tokenizer(source)
    if request.chat and not tokenizer.chat_template:
        raise InputError(f"--chat: the tokenizer of {source} has no chat template.")
    in_conversation = request.chat and not prompts
    generator = Generator(model, tokenizer, length=_CHAT_LENGTH if in_conversation else 0)
    if in_conversation:
        _converse(generator, request)
        return
    rows = [_opening(request) + [{"role": "user", "content": p}] for p in prompts] if request.chat else prompts
    if len(rows) == 1:
        generator(rows, **request.options, stream=_show)
        print()
        return
    for number, (prompt, output) in enumerate(zip(prompts, generator(rows, **request.options), strict=True)):
        print(f"[{number}] {prompt}\n{output.text}\n")


def _prompts(request: Request) -> list[str]:
    if request.prompts and request.file is not None:
        raise InputError("--prompt and --file: give one of them.")
    if request.system is not None and not request.chat:
        raise InputError("--system: goes with --chat.")
    if request.file is None:
        if not request.prompts and not request.chat:
            raise InputError("no prompt: give --prompt TEXT or --file FILE, or --chat for a conversation.")
        return list(request.prompts)
    try:
        lines = [line for line in request.file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--file: {request.file} cannot be read ({error}).") from None
    if not lines:
        raise InputError(f"--file: {request.file} has no line with a prompt in it.")
    return lines


def _model(request: Request) -> tuple[Any, str]:
    """The model, and where its tokenizer is."""
    from ..analysis.best import choose_member
    from ..config.load import load_config
    from ..interop.peft.load import load_peft
    from ..models.load import load_model
    from ..sweeps.restore import restore_member
    from ..tracking import holds_run

    path, run, source = Path(request.source), None, request.source
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        config = load_config(path)
        source, run = config.model.source, Path(config.tracking.dir) / config.name
        if not run.exists() or not holds_run(run):
            _note(f"{run} was not trained yet: this is the base alone")
            run = None
    elif (path / "config.yaml").is_file() or (path.parent / "config.yaml").is_file():
        run = path
    if run is None:
        if request.member is not None:
            raise InputError(f"--member: {request.source} is no run with members.")
        model = load_model(source, key="model.source")
        return (model if request.adapter is None else load_peft(model, request.adapter)), source
    if request.adapter is not None:
        raise InputError("--adapter: goes with a model; a run has adapters of its own (--member).")
    run, member, why = choose_member(run, request.member)
    _note(f"member {member.name}" + (f" ({why})" if why else ""))
    return restore_member(run, member).model, member.config.model.source


def _converse(generator: Any, request: Request) -> None:
    """One turn a line, until the input ends; empty lines are skipped."""
    messages = _opening(request)
    for line in _turns():
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        output = generator([messages], **request.options, stream=_show)[0]
        print(flush=True)
        messages.append({"role": "assistant", "content": output.text})


def _turns() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    _note("a conversation; an end of file (Ctrl-D) ends it")
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _opening(request: Request) -> list[dict[str, str]]:
    return [] if request.system is None else [{"role": "system", "content": request.system}]


def _show(_: int, piece: str) -> None:
    print(piece, end="", flush=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
