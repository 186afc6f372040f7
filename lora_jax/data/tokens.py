"""Texts as tokens, and chats: what a template writes of a conversation, and which of it the assistant says.

A template is a program of whoever made the model, so it runs in a process of its own (`Renderer`), with bounds of time and memory.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import InputError, RunError
from .files import as_text

# Of what a template may take: seconds for one conversation, bytes beyond what its process has at the start, characters of text.
SECONDS, MEMORY, CHARACTERS = 20.0, 512 * 2**20, 8_000_000
_START_SECONDS = 120.0
# The day that templates which write today's date get in its place: what Llama's templates write where there is no clock.
DATE = "2024-07-26"
# Stands in for the words of a message, to see where the template puts them.
_MARK = "zqxjmark7yzv"

Message = dict[str, Any]
Span = tuple[int, int]


class Chat(NamedTuple):
    """A conversation as tokens.

    Attributes:
        ids: the tokens.
        wanted: for each whether the assistant wrote it, the token that ends its turn among them.
        left_out: turns of the assistant whose words the template does not show, or rewrites beyond recognition.
    """

    ids: list[int]
    wanted: list[bool]
    left_out: int


def plain_ids(tokenizer: Any, texts: Sequence[Any]) -> list[list[int]]:
    """Token ids of texts without special tokens."""
    return tokenizer([str(t) for t in texts], add_special_tokens=False, padding=False)["input_ids"]


def with_start(ids: Sequence[int], start: Sequence[int]) -> list[int]:
    """Token ids behind what a decoder's texts begin with (`start_ids`), which is not put there twice."""
    return [*ids] if [*ids[: len(start)]] == [*start] else [*start, *ids]


def start_ids(tokenizer: Any) -> list[int]:
    """The token a decoder's texts begin with, where the tokenizer says there is one; the model was trained with it."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []


def encoder_ids(tokenizer: Any, texts: Sequence[Any], max_length: int) -> list[list[int]]:
    """Token ids of an encoder's texts, cut to `max_length` with the special tokens.

    Raises:
        InputError: the special tokens alone take as many.
    """
    return [ids for ids, _ in encoder_texts(tokenizer, texts, max_length)]


def encoder_texts(tokenizer: Any, texts: Sequence[Any], max_length: int) -> list[tuple[list[int], bool]]:
    """The same, and whether each was cut."""
    # Asked for no more than its special tokens, the tokenizer cuts nothing.
    if max_length <= tokenizer.num_special_tokens_to_add():
        raise InputError(f"task.max_length: {max_length} leaves no room for text beside the special tokens.")
    encoded = tokenizer([str(t) for t in texts], truncation=True, max_length=max_length, padding=False)
    return [(e.ids, bool(e.overflowing)) for e in encoded.encodings]


def messages_of(value: Any, where: str) -> list[Message]:
    """A conversation as a list of messages whose content is text.

    Args:
        value: a list of `{role, content}`; a content is a text or a list of parts, `{type: text, text: ...}` each.
        where: names the row, for messages.

    Raises:
        InputError: another form, a part that is no text, or a message without any.
    """
    if not isinstance(value, list) or not value or not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in value):
        raise InputError(f"{where} is not a list of messages with 'role' and 'content'.")
    return [{**m, "role": _role(m, where, n), "content": _content(m, where, n)} for n, m in enumerate(value, 1)]


def _role(message: Mapping[str, Any], where: str, number: int) -> str:
    role = as_text(message["role"])
    if not role:
        raise InputError(f"{where}: the role of message {number} is {message['role']!r}, not a text.")
    return role


def _content(message: Mapping[str, Any], where: str, number: int) -> str:
    content = message["content"]
    if content is None and message.get("tool_calls"):
        return ""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = []
    for part in parts:
        if isinstance(part, Mapping) and part.get("type", "text") != "text":
            raise InputError(f"{where}: message {number} has a part of type '{part['type']}'; only text can be trained on.")
        text = as_text(part.get("text")) if isinstance(part, Mapping) else as_text(part)
        if text is None:
            raise InputError(f"{where}: message {number} has no text.")
        texts.append(text)
    if not texts:
        raise InputError(f"{where}: message {number} has no text.")
    return "".join(texts)


def encode_chat(messages: Any, tokenizer: Any, row: int, date: str = DATE, *, key: str = "task.messages", after: int = 0) -> Chat:
    """Tokens of a conversation as the template shows the whole of it, and which of them the assistant wrote.

    The template's own marks (`{% generation %}`) say so where it has them. Else a turn is what the template adds to the conversation up
    to its opening words (`add_generation_prompt`), without the white space after the token that ends it. A template that writes an earlier
    turn otherwise than the last one is asked again with a mark in place of the turn's words, which shows where they stand in the whole.

    Args:
        messages: as for `messages_of`.
        tokenizer: with a chat template.
        row: the row's number in its file, for messages.
        date: what `strftime_now` in a template gives, YYYY-MM-DD: no day but this, so that the tokens are the same on every day.
        key: the config key of the column, for messages.
        after: how many messages, from the first, are not asked about: what the assistant says in those counts as written by others.

    Raises:
        InputError: no template, one that refuses the row or takes too long, or the row is not a list of messages.
    """
    template = template_of(tokenizer, f"{key}: this model's tokenizer has no chat template; give texts, such as 'prompt' and 'response'.")
    said = messages_of(messages, f"{key}: row {row}")
    render = functools.partial(_render, template, tokenizer, date, f"{key}: the chat template refuses row {row}: ")
    turns = [i for i, m in enumerate(said) if m["role"] == "assistant" and i >= after]
    if has_marks(template):
        whole, spans = render([(said, False)], marks=True)[0]
        spans = [(start, end) for start, end in spans if whole[start:end].strip()]
        # What a template leaves out, or takes apart, it does of earlier turns.
        spans = spans if not after else spans[max(0, len(spans) - len(turns)) :]
        left_out = max(0, len(turns) - len(spans))
    else:
        whole, spans = _find_turns(said, turns, tokenizer, render)
        left_out = len(turns) - len(spans)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, padding=False)
    ids = list(encoded["input_ids"])
    wanted = [any(start <= a < end for start, end in spans) for a, _ in encoded["offset_mapping"]]
    kept = _said_once(ids, tokenizer)
    return Chat([ids[n] for n in kept], [wanted[n] for n in kept], left_out)


def _said_once(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Which of a conversation's tokens are kept: a message may bear the one that begins or ends a text, and the template adds it again."""
    once = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return [n for n, token in enumerate(ids) if not (n and token in once and ids[n - 1] == token)]


def prompt_ids(prompt: str | Sequence[Mapping[str, Any]], tokenizer: Any, where: str, date: str | None = None) -> list[int]:
    """The tokens that a decoder goes on from, as it was trained on them: what begins a text stands there, once, and nothing ends it.

    Args:
        prompt: a text; or a conversation, which the chat template shows up to where the assistant begins.
        tokenizer: of the model.
        where: names the prompt, for messages.
        date: as in `encode_chat`; None: today's.

    Raises:
        InputError: half of a character stands in it; no template, or one that refuses the conversation or takes too long.
    """
    from ..weights.tokenizer import check_text  # on use: the process that renders imports this file, and has no need of tokenizers

    if isinstance(prompt, str):
        return with_start(plain_ids(tokenizer, [check_text(prompt, where)])[0], start_ids(tokenizer))
    template = template_of(tokenizer, f"{where}: this model's tokenizer has no chat template; give the prompt as text.")
    shown = _render(template, tokenizer, date, f"{where}: the chat template refuses it: ", [([dict(m) for m in prompt], True)])[0][0]
    ids = plain_ids(tokenizer, [check_text(shown, where)])[0]
    return [ids[n] for n in _said_once(ids, tokenizer)]


def template_of(tokenizer: Any, missing: str) -> str:
    """The chat template; `InputError` with this message where there is none."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(missing)
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # several, and none is the default
        raise InputError(f"{missing.partition(':')[0]}: {error}") from None


def has_marks(template: str) -> bool:
    """Whether a template marks what the assistant writes."""
    return "generation" in template and any("{%" + mark in template.replace(" ", "") for mark in ("generation", "-generation"))


def writes_date(template: str) -> bool:
    """Whether a template may write the day it is used on."""
    return "strftime_now" in template


def _find_turns(said: list[Message], turns: list[int], tokenizer: Any, render: Any) -> tuple[str, list[Span]]:
    """The whole conversation's text, and where in it the assistant's turns are that can be found."""
    asked = [(said, False)] + [part for i in turns for part in ((said[:i], True), (said[:i], False), (said[: i + 1], False)) if part[0]]
    texts = {(len(part), opening): text for (part, opening), (text, _) in zip(asked, render(asked, partly=True), strict=True)}
    whole = texts[len(said), False]
    spans: list[Span] = []
    for i in turns:
        before, opening, so_far = (texts.get(key) for key in ((i, False), (i, True), (i + 1, False)))
        if opening is not None and so_far is not None and whole.startswith(so_far) and so_far.startswith(opening):
            span = (len(opening), len(so_far.rstrip()))
        else:
            prompt = opening[len(before) :] if opening and before is not None and opening.startswith(before) else ""
            span = _find_marked(said, i, whole, prompt, tokenizer, render, spans[-1][1] if spans else 0)
        if span is not None and span[0] < span[1]:
            spans.append(span)
    return whole, spans


def _find_marked(said: list[Message], i: int, whole: str, prompt: str, tokenizer: Any, render: Any, after: int) -> Span | None:
    """Where in the whole text message `i` stands; None where that cannot be told.

    Args:
        prompt: the template's opening words of the assistant; "" where it has none.
        after: the end of the turn before.
    """
    marked = [*said[:i], {**said[i], "content": _MARK}, *said[i + 1 :]]
    (shown, _), (ended, _) = render([(marked, False), (marked[: i + 1], False)], partly=True)
    if shown is None or shown.count(_MARK) != 1:
        return None
    head, _, tail = shown.partition(_MARK)
    if not whole.endswith(tail):
        return None
    stop = len(whole) - len(tail)
    # A template may take the words apart (thoughts and answer): then what it writes before them differs too.
    start = next((n for n, (a, b) in enumerate(zip(head, whole[:stop], strict=False)) if a != b), min(len(head), stop))
    if said[i]["content"].strip() and not whole[start:stop].strip():
        return None
    opened = whole.rfind(prompt, after, start + len(prompt)) if prompt else -1
    if opened >= 0 and opened + len(prompt) <= stop:
        start = opened + len(prompt)
    # What ends a turn ends the last one too; of several tokens there, an earlier turn may have the first alone.
    end = ended.partition(_MARK)[2].rstrip() if ended is not None else ""
    if whole.startswith(end, stop):
        return start, stop + len(end)
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    while token := next((t for t in added if end.startswith(t) and whole.startswith(t, stop)), None):
        end, stop = end[len(token) :], stop + len(token)
    return start, stop


Rendered = tuple[Any, list[Span]]


def _render(
    template: str, tokenizer: Any, date: str | None, refuses: str, asked: Sequence[tuple[list[Message], bool]], **options: Any
) -> list[Rendered]:
    """(text, marked spans) of each (messages, whether the assistant's opening words follow).

    Args:
        refuses: begins the message where the template refuses the first, or (unless `partly`) any; text is None for the others.
        options: `marks`: whether spans are wanted; `partly`.
    """
    request = {
        "template": template,
        "tokens": dict(tokenizer.special_tokens_map),
        "date": date,
        "marks": options.get("marks", False),
        "asked": asked,
    }
    answers = _RENDERER.ask(request, refuses)
    for number, answer in enumerate(answers):
        if "error" in answer and (number == 0 or not options.get("partly")):
            raise InputError(f"{refuses}{answer['error']}")
    return [(answer.get("text"), [(a, b) for a, b in answer.get("spans", ())]) for answer in answers]


class Renderer:
    """A process in which chat templates run; it begins with the first request, and anew after one that went beyond its bounds."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, request: Mapping[str, Any], refuses: str) -> list[dict[str, Any]]:
        """The answers to a request of `serve`; `InputError`, beginning with `refuses`, where the template takes too long or too much."""
        with self._lock:
            if self._process is None:
                self._process = self._start()
            answer, late = self._exchange(self._process, json.dumps(request, default=str), SECONDS)
            if answer:
                return json.loads(answer)
            self.close()
            raise InputError(f"{refuses}it takes more than {f'{SECONDS:g} seconds' if late else 'the memory that a template may have'}.")

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> subprocess.Popen[str]:
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        # Its own session: Ctrl-C is for the run, which ends it.
        process = subprocess.Popen([sys.executable, "-c", code], **pipes, text=True, encoding="ascii", start_new_session=True)
        if not self._exchange(process, "{}", _START_SECONDS)[0]:
            process.kill()
            process.communicate()
            raise RunError("the process that renders chat templates does not start.")
        return process

    @staticmethod
    def _exchange(process: subprocess.Popen[str], line: str, seconds: float) -> tuple[str, bool]:
        """The line that answers a line, "" where there is none; and whether that is for want of time."""
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), process.kill()))
        timer.daemon = True
        timer.start()
        answer = ""
        with contextlib.suppress(OSError):
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        timer.cancel()
        return answer if answer.endswith("\n") else "", late.is_set()


_RENDERER = Renderer()
atexit.register(_RENDERER.close)


def serve() -> None:
    """The other end of `Renderer`: reads requests and writes answers, a line of JSON each, until there are no more."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import importlib

    templates: Any = importlib.import_module("transformers.utils.chat_template_utils")

    answers, sys.stdout = sys.stdout, sys.stderr
    _bound_memory()
    for line in sys.stdin:
        request = json.loads(line)
        if request and request["date"] is not None:
            templates.datetime = _clock(request["date"])
        elif request:
            templates.datetime = datetime.datetime
        found = [_answer(templates, request, *asked) for asked in request.get("asked", ())]
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def _answer(templates: Any, request: Mapping[str, Any], messages: list[Message], opening: bool) -> dict[str, Any]:
    options = {"add_generation_prompt": opening, "return_assistant_tokens_mask": request["marks"], **request["tokens"]}
    try:
        texts, spans = templates.render_jinja_template([messages], chat_template=request["template"], **options)
        if len(texts[0]) > CHARACTERS:
            return {"error": f"it writes more than {CHARACTERS:,} characters"}
        return {"text": texts[0], "spans": spans[0] if spans else []}
    except MemoryError:
        return {"error": "it takes more than the memory that a template may have"}
    except Exception as error:  # a template may refuse a conversation in any way it likes
        return {"error": next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]}


def _clock(date: str) -> type:
    day = datetime.datetime.fromisoformat(date)
    return type("Clock", (datetime.datetime,), {"now": classmethod(lambda cls, tz=None: day)})


def _bound_memory() -> None:
    """Allows this process so much more memory than it has; nothing is bound where the system does not say or allow it."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
