"""`lora-jax generate`: a model, or what a run trained of it, goes on from prompts; or holds a conversation."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError

# How long a conversation may become before its program is compiled anew.
_CHAT_LENGTH = 1024


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command line says.

    Attributes:
        source: a run directory or a member's folder in it, a config, or a model.
        member, adapter: which member of a run; a PEFT adapter for a model.
        prompts, file: texts to go on from; a file with one a line.
        chat, system: whether prompts are what a user says; what comes before a conversation.
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


def generate_command(asked: Asked) -> None:
    """Prints what follows each prompt; a single one's as it comes."""
    prompts = _prompts(asked)
    from ..generation.generate import Generator
    from ..generation.sampling import Sampling
    from ..weights.tokenizer import load_tokenizer

    Sampling(*(asked.options[k] for k in ("temperature", "top_k", "top_p")))  # refused before anything is loaded
    model, source = _model(asked)
    tokenizer = load_tokenizer(source)
    if asked.chat and not tokenizer.chat_template:
        raise InputError(f"--chat: the tokenizer of {source} has no chat template.")
    talk = asked.chat and not prompts
    generator = Generator(model, tokenizer, length=_CHAT_LENGTH if talk else 0)
    if talk:
        _converse(generator, asked)
        return
    rows = [_opening(asked) + [{"role": "user", "content": p}] for p in prompts] if asked.chat else prompts
    if len(rows) == 1:
        generator(rows, **asked.options, stream=_show)
        print()
        return
    for number, (prompt, output) in enumerate(zip(prompts, generator(rows, **asked.options), strict=True)):
        print(f"[{number}] {prompt}\n{output.text}\n")


def _prompts(asked: Asked) -> list[str]:
    if asked.prompts and asked.file is not None:
        raise InputError("--prompt and --file: give one of them.")
    if asked.system is not None and not asked.chat:
        raise InputError("--system: goes with --chat.")
    if asked.file is None:
        if not asked.prompts and not asked.chat:
            raise InputError("no prompt: give --prompt TEXT or --file FILE, or --chat for a conversation.")
        return list(asked.prompts)
    try:
        lines = [line for line in asked.file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--file: {asked.file} cannot be read ({error}).") from None
    if not lines:
        raise InputError(f"--file: {asked.file} has no line with a prompt in it.")
    return lines


def _model(asked: Asked) -> tuple[Any, str]:
    """The model, and where its tokenizer is."""
    from ..config.load import load_config
    from ..interop.export import choose_member
    from ..interop.peft.load import load_peft
    from ..models.load import load_model
    from ..sweeps.restore import restore_member
    from ..tracking import holds_run

    path, run, source = Path(asked.source), None, asked.source
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        config = load_config(path)
        source, run = config.model.source, Path(config.tracking.dir) / config.name
        if not run.exists() or not holds_run(run):
            _say(f"{run} was not trained yet: this is the base alone")
            run = None
    elif (path / "config.yaml").is_file() or (path.parent / "config.yaml").is_file():
        run = path
    if run is None:
        if asked.member is not None:
            raise InputError(f"--member: {asked.source} is no run with members.")
        model = load_model(source, key="model.source")
        return (model if asked.adapter is None else load_peft(model, asked.adapter)), source
    if asked.adapter is not None:
        raise InputError("--adapter: goes with a model; a run has adapters of its own (--member).")
    run, member, why = choose_member(run, asked.member)
    _say(f"member {member.name}" + (f" ({why})" if why else ""))
    return restore_member(run, member).model, member.config.model.source


def _converse(generator: Any, asked: Asked) -> None:
    """Turn after turn, until the input ends. A turn that is empty is passed over."""
    messages = _opening(asked)
    for line in _turns():
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        output = generator([messages], **asked.options, stream=_show)[0]
        print(flush=True)
        messages.append({"role": "assistant", "content": output.text})


def _turns() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    _say("a conversation; an end of file (Ctrl-D) ends it")
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _opening(asked: Asked) -> list[dict[str, str]]:
    return [] if asked.system is None else [{"role": "system", "content": asked.system}]


def _show(_: int, piece: str) -> None:
    print(piece, end="", flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
