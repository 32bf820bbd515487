"""How models write tool calls: a table, read by the parser (`output`) and the grammar (`toolgrammar`).

A format is a row of elements, in the order in which the model writes them: literal texts, the tool's
name, its arguments. Everything that differs between model families is in these rows; a new family
is a new row. Facts from the model cards' templates and llama.cpp's tests/test-chat.cpp. Pure.
"""

from __future__ import annotations

import re
from typing import Final

from msgspec import Struct

_SPECIAL_TOKEN: Final = re.compile(r"<[^<>\s=]+>|\[[A-Z_]+\]")


class Literal(Struct, frozen=True):
    """One of `texts`, none of which begins with another. An optional one may be missing; grammars ask for
    it all the same unless `in_grammar` is false."""

    texts: tuple[str, ...]
    optional: bool = False
    in_grammar: bool = True


class Space(Struct, frozen=True):
    """Any white space."""


class Name(Struct, frozen=True):
    """The name of a tool, unquoted."""


class CallId(Struct, frozen=True):
    """An id made by the model, after `open`; both may be missing."""

    open: str


class Arguments(Struct, frozen=True):
    """A JSON object."""


class CallObject(Struct, frozen=True):
    """A JSON object with the name, the arguments (under one of the keys; the first is the model's own)
    and perhaps an id."""

    name: str = "name"
    arguments: tuple[str, ...] = ("arguments", "parameters")
    id: str = "id"


class Parameters(Struct, frozen=True):
    """Arguments one by one, as text: `before` KEY `between` VALUE `after`. A padded value has lines of its own."""

    before: str
    between: tuple[str, ...]
    after: str
    padded: bool = False


Element = Literal | Space | Name | CallId | Arguments | CallObject | Parameters


class OutputFormat(Struct, frozen=True):
    """`opening`, calls with `separator` between them, `closing`; each call is the elements of `call`."""

    name: str
    call: tuple[Element, ...]
    opening: tuple[Element, ...] = ()
    separator: str = ""
    closing: tuple[Element, ...] = ()
    triggers: tuple[str, ...] = ()
    """Texts that begin calls for certain, for a lazy grammar; none: only a `required` call is constrained."""
    dropped: tuple[str, ...] = ()
    """Marks around the content that are no part of it."""
    content_openings: tuple[str, ...] = ()
    """Beginnings of a call that say content follows."""
    call_ends_reasoning: bool = False
    """A call may follow thoughts that were not closed."""
    prompt_opens_call: bool = False
    """The prompt ends with the literal that begins a call."""
    id_length: int = 32
    """Of ids to be made up for calls: some templates refuse any other."""

    @property
    def beginnings(self) -> tuple[str, ...]:
        """Texts of which one begins every call."""
        return _beginnings(self.opening + self.call)[0]

    @property
    def continuations(self) -> tuple[str, ...]:
        """Texts of which one begins a further call within one opening."""
        return _beginnings(self.call)[0] if self.opening and not self.separator else ()

    @property
    def is_bare(self) -> bool:
        """Whether calls may also begin with none of them: at the start of the answer only."""
        return _beginnings(self.opening + self.call)[1]

    @property
    def preserved(self) -> tuple[str, ...]:
        """Texts of tokens that a vocabulary may call special and that must not be left out of the output."""
        elements = (*self.opening, *self.call, *self.closing)
        literals = [text for element in elements if isinstance(element, Literal) for text in element.texts]
        ids = [element.open for element in elements if isinstance(element, CallId)]
        found = _SPECIAL_TOKEN.findall(" ".join((*literals, *ids, *self.dropped)))
        return tuple(dict.fromkeys(found))


def _beginnings(elements: tuple[Element, ...]) -> tuple[tuple[str, ...], bool]:
    texts: list[str] = []
    for element in elements:
        if isinstance(element, Literal):
            texts += element.texts
            if not element.optional:
                return tuple(texts), False
        elif not isinstance(element, Space):
            break
    return tuple(texts), True


def _text(*texts: str) -> Literal:
    return Literal(texts)


def _maybe(text: str, *, in_grammar: bool = True) -> Literal:
    return Literal((text,), optional=True, in_grammar=in_grammar)


def _deepseek(token: str) -> str:
    """Their special tokens are written with full-width bars."""
    return f"<\uff5c{token}\uff5c>"


def _json_list(
    name: str,
    opening: str,
    closing: str,
    call: CallObject,
    *,
    dropped: tuple[str, ...] = (),
    id_length: int = 32,
) -> OutputFormat:
    """`opening` [call, call] `closing`."""
    return OutputFormat(
        name,
        (_SPACE, call),
        opening=(_text(opening), _SPACE, _text("[")),
        separator=",",
        closing=(_SPACE, _text("]"), *((_SPACE, _text(closing)) if closing else ())),
        triggers=(opening,),
        dropped=dropped,
        id_length=id_length,
    )


def _tagged(name: str, opening: str, closing: str, *, padded: bool) -> OutputFormat:
    """<function=NAME> with <parameter=KEY>VALUE</parameter>, between `opening` and `closing`."""
    return OutputFormat(
        name,
        (
            *(_maybe(opening), _SPACE, _text("<function="), _NAME, _text(">"), _SPACE),
            Parameters("<parameter=", (">",), "</parameter>", padded=padded),
            *(_SPACE, _text("</function>"), _SPACE, _text(closing)),
        ),
        triggers=(opening,),
        call_ends_reasoning=True,
    )


_SPACE: Final = Space()
_NAME: Final = Name()
_ARGUMENTS: Final = Arguments()
_DEEPSEEK_OPENING: Final = (_maybe(_deepseek("tool▁calls▁begin")), _SPACE)
_DEEPSEEK_CALL: Final = _text(_deepseek("tool▁call▁begin"))
_DEEPSEEK_SEP: Final = _deepseek("tool▁sep")
_DEEPSEEK_END: Final = _text(_deepseek("tool▁call▁end"))
_DEEPSEEK_CLOSING: Final = (_SPACE, _maybe(_deepseek("tool▁calls▁end")))

HERMES: Final = OutputFormat(
    "hermes",
    (_text("<tool_call>"), _SPACE, CallObject(), _SPACE, _text("</tool_call>")),
    triggers=("<tool_call>",),
)
"""Hermes, Qwen, Granite and many more; also what `tools.polyfill` asks for."""
LLAMA: Final = OutputFormat(
    "llama-3",
    (_SPACE, CallObject(arguments=("parameters", "arguments"))),
    opening=(_maybe("<|python_tag|>", in_grammar=False),),
    separator=";",
)
MISTRAL_NEMO: Final = _json_list("mistral-nemo", "[TOOL_CALLS]", "", CallObject(), id_length=9)
APRIEL: Final = _json_list("apriel", "<tool_calls>", "</tool_calls>", CallObject())
FIREFUNCTION: Final = _json_list("firefunction-v2", "functools", "", CallObject())
COMMAND_R7B: Final = _json_list(
    "command-r7b",
    "<|START_ACTION|>",
    "<|END_ACTION|>",
    CallObject("tool_name", ("parameters",), "tool_call_id"),
    dropped=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
)
MISTRAL: Final = OutputFormat(
    "mistral",
    (_text("[TOOL_CALLS]"), _NAME, CallId("[CALL_ID]"), _maybe("[ARGS]"), _SPACE, _ARGUMENTS),
    triggers=("[TOOL_CALLS]",),
    id_length=9,
)
FUNCTIONARY_V3_1: Final = OutputFormat(
    "functionary-v3.1",
    (_text("<function="), _NAME, _text(">"), _SPACE, _ARGUMENTS, _SPACE, _text("</function>")),
    triggers=("<function=",),
)
FUNCTIONARY_V3_2: Final = OutputFormat(
    "functionary-v3.2",
    (_maybe(">>>"), _NAME, _text("\n"), _ARGUMENTS),
    triggers=(">>>",),
    content_openings=(">>>all\n", "all\n"),
    prompt_opens_call=True,
)
DEEPSEEK_R1: Final = OutputFormat(
    "deepseek-r1",
    (
        *(_DEEPSEEK_CALL, _text("function" + _DEEPSEEK_SEP), _NAME, _text("\n```json\n"), _SPACE),
        *(_ARGUMENTS, _SPACE, _text("```"), _SPACE, _DEEPSEEK_END),
    ),
    opening=_DEEPSEEK_OPENING,
    closing=_DEEPSEEK_CLOSING,
    triggers=_DEEPSEEK_OPENING[0].texts,
)
DEEPSEEK_V3_1: Final = OutputFormat(
    "deepseek-v3.1",
    (_DEEPSEEK_CALL, _NAME, _text(_DEEPSEEK_SEP), _SPACE, _ARGUMENTS, _SPACE, _DEEPSEEK_END),
    opening=_DEEPSEEK_OPENING,
    closing=_DEEPSEEK_CLOSING,
    triggers=_DEEPSEEK_OPENING[0].texts,
)
QWEN3_CODER: Final = _tagged("qwen3-coder", "<tool_call>", "</tool_call>", padded=True)
"""Also Qwen 3.5, Nemotron 3 Nano, Step 3.5 Flash; some leave the first `<tool_call>` out."""
SEED: Final = _tagged("seed-oss", "<seed:tool_call>", "</seed:tool_call>", padded=False)
GLM: Final = OutputFormat(
    "glm-4.5",
    (
        *(_text("<tool_call>"), _SPACE, _NAME, _SPACE),
        Parameters("<arg_key>", ("</arg_key>", "<arg_value>"), "</arg_value>"),
        *(_SPACE, _text("</tool_call>")),
    ),
    triggers=("<tool_call>",),
)
_HARMONY_BEGINNINGS: Final = tuple(
    f"{channel}to=functions." for channel in ("<|channel|>commentary ", "<|channel|>analysis ", "")
)
_HARMONY_HEADERS: Final = tuple(
    f"{channel}{constraint}<|message|>"
    for constraint in (" <|constrain|>json", "<|constrain|>json", " json", "")
    for channel in ("", "<|channel|>commentary", "<|channel|>analysis")
)
HARMONY: Final = OutputFormat(
    "harmony",
    (_text(*_HARMONY_BEGINNINGS), _NAME, _text(*_HARMONY_HEADERS), _SPACE, _ARGUMENTS),
    triggers=_HARMONY_BEGINNINGS,
    dropped=(
        "<|start|>assistant",
        "<|channel|>final<|message|>",
        "<|channel|>final <|constrain|>json<|message|>",
        "<|channel|>commentary<|message|>",
        "<|channel|>commentary to=assistant",
        "<|end|>",
    ),
)
"""GPT-OSS. The recipient may stand before or in the channel's header."""

_TEMPLATES: Final = (
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL),
    (("[TOOL_CALLS]",), MISTRAL_NEMO),
    (("<|channel|>",), HARMONY),
    ((">>>${recipient}",), FUNCTIONARY_V3_2),
    (("<|START_ACTION|>",), COMMAND_R7B),
    ((_DEEPSEEK_SEP, "```json"), DEEPSEEK_R1),
    ((_DEEPSEEK_SEP,), DEEPSEEK_V3_1),
    (("<seed:tool_call>",), SEED),
    (("<tool_call>", "<function=", "<parameter="), QWEN3_CODER),
    (("<tool_call>", "<arg_key>"), GLM),
    (("<function=",), FUNCTIONARY_V3_1),
    (("<tool_calls>[",), APRIEL),
    (("functools[",), FIREFUNCTION),
    (("<tool_call>",), HERMES),
    (("<|start_header_id|>", '"parameters": '), LLAMA),
)
"""Texts that are all in a template, and its format."""
FORMATS: Final = tuple(format for _, format in _TEMPLATES)


def detect_format(template_source: str) -> OutputFormat:
    """The format that models with this template were trained on; HERMES when nothing tells."""
    for texts, format in _TEMPLATES:
        if all(text in template_source for text in texts):
            return format
    return HERMES
