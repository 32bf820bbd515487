"""`run`: talk with a model in the terminal, or ask it one thing.

Ctrl-C ends the answer, not the talk; what had come of it stays part of the talk. Ctrl-D or /bye ends.
"""

from __future__ import annotations

import sys
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, Final

from wingman.commands import INTERRUPTED
from wingman.commands.api import Api, CommandFailed, Message
from wingman.commands.loading import load, start_query
from wingman.commands.names import read_items
from wingman.commands.output import Output, speakable
from wingman.commands.session import Session

_PATH: Final = "/v1/chat/completions"
_MAX_PROMPT_CHARS: Final = 16 * 1024 * 1024
_HELP: Final = """\
/clear  forget what was said
/bye    end; ctrl-D does too
/help   this
ctrl-C  stop the answer"""


def run_command(session: Session) -> int:
    """`wingman run`."""
    prompt = _one_prompt(session.arguments.prompt)
    if prompt is not None and not prompt.strip():
        raise CommandFailed("the prompt is empty")
    api = session.api()
    alias = _loaded_alias(session, api)
    talk = Talk(api, session.output, alias, session.arguments.system)
    if prompt is None:
        _converse(talk, session.output)
        return 0
    return INTERRUPTED if talk.say(prompt).is_stopped else 0


def _loaded_alias(session: Session, api: Api) -> str:
    """The alias of the model, which is loaded now."""
    query = start_query(session, api, session.arguments.model)
    alias = query["alias"]
    is_loaded = any(item.alias == alias and item.status == "inferring" for item in read_items(api))
    if not is_loaded:
        load(api, session.output, query)
    return alias


def _one_prompt(words: list[str]) -> str | None:
    """The prompt of the command line, else of a pipe; None when a person is there to talk."""
    if words:
        return " ".join(words)
    return None if sys.stdin.isatty() else sys.stdin.read(_MAX_PROMPT_CHARS)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said."""

    text: str
    reasoning: str
    finish_reason: str | None
    usage: dict[str, Any] | None
    is_stopped: bool
    """By ctrl-C."""


class Talk:
    """A conversation: what was said, and how to say more."""

    def __init__(self, api: Api, output: Output, alias: str, system: str | None) -> None:
        self._api = api
        self._output = output
        self._alias = alias
        self._opening = [{"role": "system", "content": system}] if system else []
        self._messages: list[Message] = list(self._opening)

    def clear(self) -> None:
        """Forget everything but the system message."""
        self._messages = list(self._opening)

    def say(self, text: str) -> Answer:
        """Say something, show the answer as it comes. Raises CommandFailed, and then it was not said."""
        asked = [*self._messages, {"role": "user", "content": text}]
        answer = self._listen(asked)
        self._messages = [*asked, {"role": "assistant", "content": answer.text}]
        if self._output.is_json:
            self._output.document(self._document(answer))
        return answer

    def _document(self, answer: Answer) -> Message:
        return {
            "model": self._alias,
            "content": answer.text,
            "reasoning_content": answer.reasoning,
            "finish_reason": answer.finish_reason,
            "usage": answer.usage,
        }

    def _listen(self, messages: list[Message]) -> Answer:
        text: list[str] = []
        reasoning: list[str] = []
        ending: Message = {}
        body = {
            "model": self._alias,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        is_stopped = False
        printer = _Printer(is_on=not self._output.is_json)
        try:
            with closing(self._api.infer(_PATH, body)) as chunks:
                for chunk in chunks:
                    delta = _delta(chunk, ending)
                    reasoning.append(delta.get("reasoning_content") or "")
                    text.append(delta.get("content") or "")
                    printer.show(reasoning[-1], is_thought=True)
                    printer.show(text[-1])
        except KeyboardInterrupt:
            is_stopped = True
        finally:
            printer.end()
        reason = "stopped" if is_stopped else ending.get("finish_reason")
        if reason == "length":
            self._output.note("(cut: the context is full, or the server stopped)")
        return Answer("".join(text), "".join(reasoning), reason, ending.get("usage"), is_stopped)


def _delta(chunk: Message, ending: Message) -> Message:
    """The news of a chunk; its last facts go to `ending`."""
    if chunk.get("usage"):
        ending["usage"] = chunk["usage"]
    if not chunk.get("choices"):
        return {}
    choice = chunk["choices"][0]
    if choice.get("finish_reason"):
        ending["finish_reason"] = choice["finish_reason"]
    delta: Message = choice.get("delta") or {}
    return delta


class _Printer:
    """Shows an answer as it comes: thoughts dimmed and only to people, words to everyone."""

    def __init__(self, *, is_on: bool) -> None:
        self._is_on = is_on
        self._is_terminal = sys.stdout.isatty()
        self._is_dim = False
        self._last = "\n"

    def show(self, text: str, *, is_thought: bool = False) -> None:
        """Print a piece. A terminal gets no control characters: a model can't be trusted with it."""
        if not text or not self._is_on or (is_thought and not self._is_terminal):
            return
        shown = speakable(text) if self._is_terminal else text
        sys.stdout.write(self._dimmed(is_thought) + shown)
        sys.stdout.flush()
        self._last = shown[-1:] or self._last

    def end(self) -> None:
        """End the line."""
        if self._is_on:
            sys.stdout.write(self._dimmed(False) + ("" if self._last == "\n" else "\n"))
            sys.stdout.flush()

    def _dimmed(self, is_thought: bool) -> str:
        if is_thought == self._is_dim:
            return ""
        self._is_dim = is_thought
        return "\x1b[2m" if is_thought else "\x1b[0m\n"


def _converse(talk: Talk, output: Output) -> None:
    """Read and answer until the person ends it."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing
    prompt = "" if output.is_json else ">>> "
    output.note("ask something; /help tells more")
    while True:
        try:
            line = input(prompt)
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            output.note("ctrl-D or /bye ends")
            continue
        if line.strip() == "/bye":
            return
        _take(talk, output, line.strip())


def _take(talk: Talk, output: Output, line: str) -> None:
    """Do what one line says."""
    if line == "/clear":
        talk.clear()
        output.note("forgotten")
    elif line == "/help":
        for text in _HELP.splitlines():
            output.note(text)
    elif line.startswith("/") and " " not in line and "/" not in line[1:]:
        output.note(f"{line} is unknown; /help lists what there is")
    elif line:
        try:
            talk.say(line)
        except CommandFailed as error:
            hint = "; /clear starts anew" if error.status == 400 else ""
            output.note(f"wingman: {error.message}{hint}")
