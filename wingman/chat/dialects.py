"""What particular chat templates need beyond the common form of messages, as llama-server gives it to them.

A row of DIALECTS is recognised by telltale texts in the template. It may rewrite the messages, mend the
prompt, and know how an answer begins, which matters when a client sends the beginning of an answer to be
continued. Facts are from llama.cpp, common/chat.cpp and common/parsers. Pure.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from msgspec import Struct

from wingman.chat.capabilities import ReasoningMarks

Message = dict[str, Any]
Rewrite = Callable[[list[Message]], list[Message]]
Mend = Callable[[str, bool], str]

_THINK: Final = ReasoningMarks("<think>", "</think>")
_THINK_LINES: Final = ReasoningMarks("<think>\n", "\n</think>\n\n")
_HARMONY: Final = ReasoningMarks(
    "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"
)


class Dialect(Struct, frozen=True):
    """The needs of a family of templates: those with all of `signs` and none of `not_signs` in the text."""

    signs: tuple[str, ...]
    not_signs: tuple[str, ...] = ()
    rewrite: Rewrite | None = None
    mend: Mend | None = None
    """Takes the prompt and whether an answer shall follow."""
    opening: str | None = None
    """What comes before the marks of reasoning in an answer; None: what the template adds for an answer."""
    marks: ReasoningMarks | None = None
    """Around reasoning, also when it is empty; None: found by probing."""
    has_short_end: bool = False
    """Without reasoning, the end mark alone begins the answer."""

    def fits(self, source: str) -> bool:
        """Whether a template is of this family."""
        return all(sign in source for sign in self.signs) and not any(
            sign in source for sign in self.not_signs
        )


def dialect_of(source: str) -> Dialect:
    """The first row that fits, else a plain one."""
    return next((dialect for dialect in DIALECTS if dialect.fits(source)), _PLAIN)


# -- messages -------------------------------------------------------------------------------------


def _with_thinking(messages: list[Message]) -> list[Message]:
    """Reasoning is also called `thinking`."""
    return [
        message | {"thinking": message["reasoning_content"]} if "reasoning_content" in message else message
        for message in messages
    ]


def _harmony_messages(messages: list[Message]) -> list[Message]:
    """Beside thinking and calls there can be no content."""
    renamed = _with_thinking(messages)
    for message in renamed:
        if "thinking" in message and message.get("tool_calls"):
            del message["content"]
    return renamed


def _thinking_parts(messages: list[Message]) -> list[Message]:
    """Reasoning is a part of the content, in front."""
    return [
        _as_parts(message) if message["role"] in ("system", "assistant") else message for message in messages
    ]


def _as_parts(message: Message) -> Message:
    parts = [{"type": "thinking", "thinking": text} for text in [message.get("reasoning_content")] if text]
    content = message["content"]
    parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {key: value for key, value in message.items() if key != "reasoning_content"} | {"content": parts}


def _trimmed(messages: list[Message]) -> list[Message]:
    """No white space around texts: it drives StepFun models into loops."""
    for message in messages:
        for key in ("content", "reasoning_content"):
            if isinstance(message.get(key), str):
                message[key] = message[key].strip()
            elif key in message:
                message[key] = [part | {"text": part["text"].strip()} for part in message[key]]
    return messages


def _ordered_results(messages: list[Message]) -> list[Message]:
    """The results of parallel calls come in the order of the calls."""
    order: dict[str, int] = {}
    done: list[Message] = []
    for run in _runs(messages):
        if run[0].get("tool_calls"):
            order = {call.get("id", ""): number for number, call in enumerate(run[0]["tool_calls"])}
        done += _with_sorted_results(run, order)
    return done


def _runs(messages: list[Message]) -> Iterator[list[Message]]:
    """Single messages, and runs of user and tool messages."""
    run: list[Message] = []
    for message in messages:
        if message["role"] not in ("user", "tool") or (run and run[-1]["role"] not in ("user", "tool")):
            if run:
                yield run
            run = []
        run.append(message)
    if run:
        yield run


def _with_sorted_results(run: Sequence[Message], order: dict[str, int]) -> list[Message]:
    results = iter(
        sorted(
            (message for message in run if message["role"] == "tool"),
            key=lambda message: order.get(message.get("tool_call_id", ""), 0),
        )
    )
    return [next(results) if message["role"] == "tool" else message for message in run]


def _gemma_turns(messages: list[Message]) -> list[Message]:
    """Calls, their results and the answer that follows are one message, results being `tool_responses`."""
    done: list[Message] = []
    position = 0
    while position < len(messages):
        message = messages[position]
        position += 1
        if message["role"] == "assistant" and message.get("tool_calls"):
            message, position = _gemma_turn(messages, position)
        done.append(message)
    return done


def _gemma_turn(messages: list[Message], position: int) -> tuple[Message, int]:
    """The turn whose calls are before `position`, and where the next one begins."""
    calling = messages[position - 1]
    turn: Message = {key: value for key, value in calling.items() if key != "content"}
    responses: list[Message] = []
    while position < len(messages) and messages[position]["role"] == "tool":
        responses.append(_gemma_response(messages[position], calling["tool_calls"][len(responses) :]))
        position += 1
    if responses:
        turn["tool_responses"] = responses
    if position < len(messages):
        answer = messages[position]
        if answer["role"] == "assistant" and answer["content"] and not answer.get("tool_calls"):
            turn["content"] = answer["content"]
            position += 1
    return turn, position


def _gemma_response(result: Message, calls: Sequence[Message]) -> Message:
    name = calls[0]["function"]["name"] if calls else result.get("tool_call_id", "")
    response = result["content"]
    with contextlib.suppress(TypeError, ValueError, RecursionError):  # else it stays a text
        response = json.loads(response)
    return {"name": name, "response": response}


# -- prompts --------------------------------------------------------------------------------------


def _end_for_return(prompt: str, adds_answer: bool) -> str:
    """An answer in the history ends with <|end|>; <|return|> is for training."""
    if adds_answer:
        return prompt
    head, found, tail = prompt.rpartition("<|return|>")
    return f"{head}<|end|>{tail}" if found else prompt


def _gemma_opening(prompt: str, adds_answer: bool) -> str:
    """After a turn that ended with calls and content, the template forgets to open the next one."""
    return f"{prompt}<|turn>model\n" if adds_answer and prompt.endswith("<turn|>\n") else prompt


_PLAIN: Final = Dialect(())
_STEPFUN: Final = "You have access to the following functions in JSONSchema format"
_GEMMA: Final = "'<|tool_call>call:'"
_GEMMA_MARKS: Final = ReasoningMarks("<|channel>thought\n", "<channel|>")
_CODER: Final = ("<tool_call>", "<function=", "<parameter=")
_OTHER_CODER: Final = "'<tool_call><function=' ~ tool_call.name ~ '>'"
_DEEPSEEK: Final = "<\uff5cAssistant\uff5c>"
_NONE: Final = ReasoningMarks()

DIALECTS: Final = (
    Dialect(
        ("[SYSTEM_PROMPT]", "[TOOL_CALLS]", "[ARGS]"),
        ("[CALL_ID]",),
        rewrite=_thinking_parts,
        opening="",
        marks=ReasoningMarks("[THINK]", "[/THINK]"),
    ),
    Dialect(
        ("<|channel|>",),
        rewrite=_harmony_messages,
        mend=_end_for_return,
        opening="<|start|>assistant",
        marks=_HARMONY,
    ),
    Dialect(
        ("<atem:function_calls>", "<|eom|>"),
        opening="<|start|>assistant",
        marks=ReasoningMarks(" to=self<|message|>", "<|eom|><|start|>assistant to=user<|message|>"),
    ),
    Dialect(
        (">>>all", ">>>${recipient}"),
        opening="<|start_header_id|>assistant<|end_header_id|>\n\n>>>all\n",
        marks=_NONE,
    ),
    Dialect(
        ("<|tool_calls_section_begin|>", "<|tool_call_begin|>"),
        opening="<|im_assistant|>assistant<|im_middle|>",
        marks=_THINK,
    ),
    Dialect(
        ("<|open|>", "<|close|>", "<|end_of_msg|>"),
        opening='<|open|>message role="assistant"<|sep|>',
        marks=ReasoningMarks("<|open|>think<|sep|>", "<|close|>think<|sep|><|open|>response<|sep|>"),
    ),
    Dialect(("<role>ASSISTANT</role>", "<arg_key>"), opening="<role>ASSISTANT</role>\n", marks=_THINK),
    Dialect(
        ("<|START_TEXT|>", "<|START_ACTION|>"),
        opening="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        marks=ReasoningMarks("<|START_THINKING|>", "<|END_THINKING|><|START_TEXT|>"),
    ),
    Dialect(
        ("<|tool_list_start|>", "<|tool_list_end|>"),
        rewrite=_with_thinking,
        opening="<|im_start|>assistant\n",
        marks=_THINK,
    ),
    Dialect(("List of tools: [",), rewrite=_with_thinking, opening="<|im_start|>assistant\n", marks=_THINK),
    Dialect(
        ("<|role_sep|>", "<|message_sep|>"),
        ("<|function_call|>",),
        opening="assistant<|role_sep|>\n",
        marks=_NONE,
    ),
    Dialect(
        ("]<]minimax[>[", "<tool_call>", "<invoke name="), marks=ReasoningMarks("<mm:think>", "</mm:think>")
    ),
    Dialect(("dsml_token", "DSML", "function_calls"), opening=_DEEPSEEK, marks=_THINK),
    Dialect(
        ("dsml_token", "DSML", "tool_calls"),
        rewrite=_ordered_results,
        opening=_DEEPSEEK,
        marks=_THINK,
        has_short_end=True,
    ),
    Dialect((_GEMMA, "{#- OpenAI Chat Completions:"), mend=_gemma_opening, marks=_GEMMA_MARKS),
    Dialect((_GEMMA,), rewrite=_gemma_turns, mend=_gemma_opening, marks=_GEMMA_MARKS),
    Dialect(
        ("Tool usage guidelines:", '<function name="', '<param name="'),
        opening="<|im_start|>assistant\n",
        marks=_THINK_LINES,
    ),
    Dialect(
        (_STEPFUN, *_CODER, "<think>"),
        rewrite=_trimmed,
        opening="<|im_start|>assistant\n",
        marks=_THINK_LINES,
    ),
    Dialect((*_CODER, "<think>"), (_OTHER_CODER,), opening="<|im_start|>assistant\n", marks=_THINK_LINES),
    Dialect(_CODER, (_OTHER_CODER,), opening="<|im_start|>assistant\n", marks=_NONE),
    Dialect(("laguna_glm_thinking",), marks=_THINK),
    Dialect(("write your response between <response></response>",), marks=_THINK),
    Dialect(("<SPECIAL_12>", "<TOOL_RESPONSE>"), marks=ReasoningMarks("<think>\n", "</think>")),
    Dialect(("content.split('</think>')",), ("reasoning_content", "enable_thinking"), marks=_THINK),
)
