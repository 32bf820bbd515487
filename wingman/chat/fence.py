"""Answers that are JSON: their grammar, and the marks around them that are no part of them.

Models like to put JSON into a Markdown fence. A grammar that forbids it makes small ones write worse
JSON, so it is allowed, as in llama-server, and taken off again. Pure.
"""

from __future__ import annotations

from typing import Any, Final

from wingman.chat.constraint import schema_rules
from wingman.chat.deltas import ContentDelta, Delta
from wingman.chat.grammar import check_grammar
from wingman.chat.output import OutputParser
from wingman.chat.reasoning import ReasoningTags
from wingman.chat.toolgrammar import optional_thoughts, until

_OPENING: Final = "```json"
_SPACE: Final = r'blank ::= | " " | "\n"{1,2} [ \t]{0,20}'


def answer_grammar(schema: Any, tags: ReasoningTags | None, *, starts_in_reasoning: bool) -> str:
    """A grammar for a whole answer that matches a JSON schema, after thoughts if the template has tags for
    them, in a fence or not. Raises InvalidRequest."""
    thoughts = optional_thoughts(tags, inside=starts_in_reasoning)
    rules = [
        f'root ::= {thoughts} blank blank ("{_OPENING}" blank answer blank "```" | blank answer blank)',
        schema_rules(schema, "answer"),
        _SPACE,
    ]
    if thoughts and tags is not None:
        rules += [*until("thoughts", tags.close), "space ::= blank"]
    text = "\n".join(rules)
    check_grammar(text, "json_schema", must_finish=False)
    return text


class FencedParser:
    """An OutputParser for answers of `answer_grammar`: their content is the JSON alone."""

    def __init__(self, parser: OutputParser) -> None:
        self._parser = parser
        self._head = ""
        self._tail = ""
        self._has_begun = False
        self._is_fenced = False

    @property
    def called(self) -> bool:
        """Whether a tool was called."""
        return self._parser.called

    def push(self, text: str) -> list[Delta]:
        """More of the answer."""
        return self._bare(self._parser.push(text))

    def finish(self) -> list[Delta]:
        """The end of the answer; what was held back was not part of it."""
        return self._bare(self._parser.finish())

    def _bare(self, deltas: list[Delta]) -> list[Delta]:
        bare: list[Delta] = []
        for delta in deltas:
            if not isinstance(delta, ContentDelta):
                bare.append(delta)
            elif text := self._without_marks(delta.text):
                bare.append(ContentDelta(text))
        return bare

    def _without_marks(self, text: str) -> str:
        if not self._has_begun:
            text = self._begin(text)
        text = self._tail + text
        end = len(_unfenced(text) if self._is_fenced else text.rstrip())
        self._tail = text[end:]
        return text[:end]

    def _begin(self, text: str) -> str:
        """What follows the opening, once it is known whether there is one."""
        self._head = (self._head + text).lstrip()
        if self._head.startswith(_OPENING):
            rest = self._head[len(_OPENING) :].lstrip()
            self._is_fenced = True
            if not rest:
                return ""
        elif not self._head or _OPENING.startswith(self._head):
            return ""
        else:
            rest = self._head
        self._has_begun = True
        return rest


def _unfenced(text: str) -> str:
    """Without what may be the end of a fence, complete or not, and the space around it."""
    bare = text.rstrip()
    n_ticks = len(bare) - len(bare.rstrip("`"))
    return bare[: len(bare) - min(n_ticks, 3)].rstrip()
