"""`lora-jax generate`: text from prompts, or a conversation, with a model or a member of a run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError

# Tokens a conversation may reach before its program is compiled again.
_CHAT_LENGTH = 1024


@dataclasses.dataclass(frozen=True)
class Asked:
    """The arguments of the command.

    Attributes:
        source: a run directory or a member's folder in it, a config, or a model.
        member, adapter: a member of a run; a PEFT adapter for a model.
        prompts, file: texts to continue; a file with one per line.
        chat, system: whether prompts are user messages; the system message.
        options: keyword arguments of `lora_jax.generate`.
    """

    source: str
    member: str | None
    adapter: Path | None
    prompts: tuple[str, ...]
    file: Path | None
    chat: bool
    system: str | None
    options: dict[str, Any]


def generate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CONFIG|MODEL",
            help="RUN: a run directory or the folder of a member in it. CONFIG: its run, or the base alone if it is not trained yet. "
            "MODEL: a folder, a .safetensors or .gguf file, hf://org/name, package://import_name/path.",
            show_default=False,
        ),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="A text to continue. Repeatable.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="FILE", help="A file of prompts, one per line, generated as one batch.", show_default=False),
    ] = None,
    member: Annotated[
        str | None,
        typer.Option("--member", metavar="NAME", help="A member of a sweep. Default: the best finished one.", show_default=False),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="DIR", help="MODEL only: a PEFT adapter to load.", show_default=False)
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Treat prompts as user messages. Without prompts: a conversation in the terminal, or one turn per line from stdin.",
        ),
    ] = False,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="With --chat: the system message.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1, help="The largest number of new tokens.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", metavar="T", help="Sampling temperature. 0 decodes greedily.")] = 0.0,
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="K", help="Sample from the K most likely tokens.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            metavar="P",
            help="Sample from the smallest set of most likely tokens whose total probability is at least P.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the sampling. Prompt i uses seed N + i.")] = 0,
    num_beams: Annotated[int, typer.Option("--num-beams", metavar="N", help="Beam search with N beams, in place of sampling.")] = 1,
    length_penalty: Annotated[
        float, typer.Option("--length-penalty", metavar="P", help="With --num-beams: scores are divided by length^P.")
    ] = 1.0,
    no_repeat_ngram_size: Annotated[
        int, typer.Option("--no-repeat-ngram-size", metavar="N", help="With --num-beams: no N tokens in a row come twice. 0: any may.")
    ] = 0,
    target_language: Annotated[
        int | None,
        typer.Option("--forced-bos-token-id", metavar="ID", help="The answer's first token: a target language's code.", show_default=False),
    ] = None,
) -> None:
    """Generate text from prompts, or hold a conversation.

    Uses a member of a run, or any language model; an encoder-decoder reads the prompt as its source. A single answer is printed as it is
    generated; several, and those of beam search, are printed at the end.
    """
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    options |= {"num_beams": num_beams, "length_penalty": length_penalty, "no_repeat_ngram_size": no_repeat_ngram_size}
    options |= {"forced_bos_token_id": target_language}
    generate_command(Asked(source, member, adapter, tuple(prompt or ()), file, chat, system, options))


def generate_command(asked: Asked) -> None:
    """Prints the continuation of each prompt; a single one is streamed."""
    prompts = _prompts(asked)
    from ..generation.beam import Beams
    from ..generation.generate import Generator
    from ..generation.sampling import Sampling
    from ..weights.tokenizer import load_tokenizer

    # Refused before anything is loaded.
    Sampling(*(asked.options[k] for k in ("temperature", "top_k", "top_p")))
    beams = Beams(asked.options["num_beams"], asked.options["length_penalty"], False, asked.options["no_repeat_ngram_size"])
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
    if len(rows) == 1 and beams.count == 1:
        generator(rows, **asked.options, stream=_show)
        print()
        return
    for number, (prompt, output) in enumerate(zip(prompts, generator(rows, **asked.options), strict=True)):
        print(f"[{number}] {prompt}\n{output.text}\n" if len(rows) > 1 else output.text)


def _prompts(asked: Asked) -> list[str]:
    if asked.prompts and asked.file is not None:
        raise InputError("--prompt and --file: give only one of them.")
    if asked.system is not None and not asked.chat:
        raise InputError("--system: needs --chat.")
    if asked.file is None:
        if not asked.prompts and not asked.chat:
            raise InputError("no prompt: give --prompt TEXT or --file FILE, or --chat for a conversation.")
        return list(asked.prompts)
    try:
        lines = [line for line in asked.file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--file: {asked.file} cannot be read ({error}).") from None
    if not lines:
        raise InputError(f"--file: {asked.file} contains no prompt.")
    return lines


def _model(asked: Asked) -> tuple[Any, str]:
    """The model, and the source of its tokenizer."""
    from ..analysis.compare import choose_member
    from ..config.load import load_config
    from ..interop.peft.load import load_peft
    from ..models.load import load_model
    from ..sweeps.restore import restore_member
    from ..tracking import holds_run

    path, run, source = Path(asked.source), None, asked.source
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        config = load_config(path)
        source, run = config.model.source, Path(config.tracking.dir) / config.name
        if not run.exists() or not holds_run(run):
            _say(f"{run} is not trained yet; using the base model alone")
            run = None
    elif (path / "config.yaml").is_file() or (path.parent / "config.yaml").is_file():
        run = path
    if run is None:
        if asked.member is not None:
            raise InputError(f"--member: {asked.source} is a model, not a run with members.")
        model = load_model(source, key="model.source")
        return (model if asked.adapter is None else load_peft(model, asked.adapter)), source
    if asked.adapter is not None:
        raise InputError("--adapter: needs a MODEL. A run has its own adapters; choose one with --member.")
    run, member, why = choose_member(run, asked.member)
    _say(f"member {member.name}" + (f" ({why})" if why else ""))
    return restore_member(run, member).model, member.config.model.source


def _converse(generator: Any, asked: Asked) -> None:
    """A turn per line until the input ends. Empty lines are skipped."""
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
    _say("end the conversation with Ctrl-D")
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
