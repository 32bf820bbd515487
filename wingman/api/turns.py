"""A chat request -> jobs, and what the model writes -> an assistant's turn.

The one place where templates, tools, constraints and reasoning meet; chat, responses and messages
are dialects over it. `prepare_turn` runs in the engine's executor, the readers on the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from msgspec import Struct, structs

from wingman.api.constraints import read_call_constraint, read_chat_constraint, read_chat_schema
from wingman.api.generation import JobMaker
from wingman.api.native import Completion
from wingman.api.prompts import refuse_endless
from wingman.api.ranges import INT32_MAX, Range, read_number
from wingman.api.schema import ChatRequest
from wingman.chat.conversation import read_messages, render_prompt, split_prefill
from wingman.chat.fence import FencedParser
from wingman.chat.formats import HERMES, OutputFormat, detect_format
from wingman.chat.output import ContentDelta, Delta, OutputParser, ParsedMessage, ReasoningDelta, collect
from wingman.chat.reasoning import ReasoningMode, ReasoningTags, detect_reasoning
from wingman.chat.template import Rendering
from wingman.chat.tools import ToolChoice, polyfill, read_choice, read_tools
from wingman.engine.types import Constraint, Finished, Job, StopType, TextDelta, TokenProb
from wingman.errors import InvalidRequest
from wingman.services.served import ServedModel

_DEFAULT_TOP_LOGPROBS: Final = 20
_HISTORY_OF_TOOLS: Final = frozenset({"tool", "function"})


class Dialogue(Struct, frozen=True):
    """How a model speaks in this request: the format of its calls, its thoughts, the tools it may call."""

    format: OutputFormat
    choice: ToolChoice
    is_parallel: bool
    reasoning: ReasoningMode
    tags: ReasoningTags | None
    starts_in_reasoning: bool
    is_json: bool = False
    """The answer is bound to a JSON schema."""

    def parser(self) -> OutputParser | FencedParser:
        """A parser for one answer."""
        parser = OutputParser(
            self.format,
            tools=self.choice.tools,
            parallel=self.is_parallel,
            reasoning=self.reasoning,
            tags=self.tags,
            starts_in_reasoning=self.starts_in_reasoning,
        )
        return FencedParser(parser) if self.is_json else parser


class Turn(Struct, frozen=True):
    """A prepared request: `n` jobs for one prompt."""

    jobs: tuple[Job, ...]
    prompt: str
    fields: ChatRequest
    served: ServedModel
    dialogue: Dialogue
    ping_s: int

    def as_completion(self) -> Completion:
        """The same as completions of a prompt."""
        return Completion(self.jobs, (self.prompt,) * len(self.jobs), self.fields, self.served, self.ping_s)

    def parse(self, finished: Finished) -> ParsedMessage:
        """The message of an answer that was not streamed; equal to what its stream adds up to."""
        parser = self.dialogue.parser()
        return collect(parser.push(finished.text) + parser.finish())


class AnswerReader:
    """Follows one streamed answer; probabilities wait for the next text that can be seen."""

    def __init__(self, dialogue: Dialogue) -> None:
        self._parser = dialogue.parser()
        self._probs: list[TokenProb] = []

    def push(self, event: TextDelta) -> list[Delta]:
        """What became certain with this text."""
        self._probs.extend(event.probs)
        return self._parser.push(event.text) if event.text else []

    def finish(self) -> list[Delta]:
        """What the end of the answer makes certain."""
        return self._parser.finish()

    def take_probs(self, delta: Delta) -> Sequence[TokenProb]:
        """The probabilities to be shown with a delta."""
        if not isinstance(delta, ContentDelta | ReasoningDelta):
            return ()
        probs, self._probs = self._probs, []
        return probs

    @property
    def has_called(self) -> bool:
        """Whether a tool was called."""
        return self._parser.called


def finish_reason(finished: Finished, *, has_called: bool) -> str:
    """OpenAI's word for how an answer ended."""
    if finished.stop_type not in (StopType.EOS, StopType.WORD):
        return "length"
    return "tool_calls" if has_called else "stop"


def check_turn(fields: ChatRequest) -> None:
    """Refuse what can be refused without the model; raises InvalidRequest."""
    if fields.messages is None:
        raise InvalidRequest("Field 'messages': is required", "messages")
    if fields.top_logprobs is not None and not fields.logprobs:
        raise InvalidRequest("Field 'top_logprobs': needs logprobs to be true", "top_logprobs")
    if fields.logprobs and fields.stream and (fields.tools or fields.functions):
        raise InvalidRequest("Field 'logprobs': can't be streamed with tools", "logprobs")
    if fields.grammar and (fields.tools or fields.functions):
        raise InvalidRequest("Field 'grammar': can't be used with tools", "grammar")
    if fields.add_generation_prompt is not False and fields.continue_final_message:
        message = "Field 'continue_final_message': needs add_generation_prompt to be false"
        raise InvalidRequest(message, "continue_final_message")


def prepare_turn(served: ServedModel, fields: ChatRequest) -> Turn:
    """Render, tokenise, compile; raises InvalidRequest naming the field at fault, ContextOverflow."""
    prompt, choice, uses_own_prompt = render_turn(served, fields)
    dialogue = _dialogue(served, fields, choice, prompt, uses_own_prompt)
    tokens = _tokenize(served, prompt)
    maker = JobMaker.of(served)
    fields.n_probs = _n_probs(fields)
    constraint = _constraint(served, fields, dialogue)
    jobs = maker.build_jobs(tokens, fields, constraint, _preserved(served, dialogue))
    jobs = [structs.replace(job, drops_partial_char=True) for job in jobs]
    return Turn(tuple(jobs), prompt, fields, served, dialogue, maker.ping_interval(fields))


def count_tokens(served: ServedModel, fields: ChatRequest) -> int:
    """Tokens of the prompt."""
    return len(_tokenize(served, render_turn(served, fields)[0]))


def _tokenize(served: ServedModel, prompt: str) -> list[int]:
    tokenizer = served.engine.tokenizer
    refuse_endless(prompt, tokenizer, served.info)
    return tokenizer.tokenize(prompt, add_special=True, parse_special=True)


def render_turn(served: ServedModel, fields: ChatRequest) -> tuple[str, ToolChoice, bool]:
    """The prompt text, the tools the model may call, and whether the prompt about them is ours."""
    info, template = served.info, served.template
    choice = read_choice(fields.tool_choice, fields.function_call, read_tools(fields.tools, fields.functions))
    messages = read_messages(
        fields.messages or (),
        knows_developer=template.knows_developer,
        typed_content=template.caps.typed_content,
    )
    speaks_of_tools = any(one.get("tool_calls") or one["role"] in _HISTORY_OF_TOOLS for one in messages)
    is_polyfilled = (bool(choice.tools) and not template.caps.tools) or (
        speaks_of_tools and not template.caps.tool_calls
    )
    if is_polyfilled:
        plain = read_messages(fields.messages or (), knows_developer=template.knows_developer)
        messages = polyfill(plain, choice)
    rendering = Rendering(
        fields.add_generation_prompt is not False,
        info.bos_token,
        info.eos_token,
        _variables(served, fields),
        () if is_polyfilled else tuple(tool.as_json() for tool in choice.tools),
    )
    prompt = render_prompt(template, split_prefill(messages), rendering, adds_bos=info.adds_bos)
    return prompt, choice, is_polyfilled


def _variables(served: ServedModel, fields: ChatRequest) -> dict[str, Any]:
    """Variables for the template; an effort of "none" turns thinking off, as in llama-server."""
    variables = dict(served.config.model.chat_template_kwargs) | (fields.chat_template_kwargs or {})
    effort = fields.reasoning_effort
    if effort == "none":
        variables.setdefault("enable_thinking", False)
    elif isinstance(effort, str):
        variables.setdefault("reasoning_effort", effort)
    return variables


def _dialogue(
    served: ServedModel, fields: ChatRequest, choice: ToolChoice, prompt: str, is_polyfilled: bool
) -> Dialogue:
    source = served.template.source
    is_parallel = fields.parallel_tool_calls
    if is_parallel is None:
        is_parallel = not is_polyfilled and served.template.caps.parallel_tool_calls
    tags = detect_reasoning(source)
    return Dialogue(
        HERMES if is_polyfilled else detect_format(source),
        choice,
        is_parallel and not fields.functions,
        _reasoning_mode(served, fields),
        tags,
        tags is not None and tags.opened_by(prompt),
        not choice.tools and read_chat_schema(fields) is not None,
    )


def _reasoning_mode(served: ServedModel, fields: ChatRequest) -> ReasoningMode:
    name = fields.reasoning_format or served.config.model.reasoning_format
    try:
        return ReasoningMode(name)
    except ValueError:
        known = ", ".join(mode.value for mode in ReasoningMode)
        raise InvalidRequest(
            f"Field 'reasoning_format': must be one of {known}", "reasoning_format"
        ) from None


def _n_probs(fields: ChatRequest) -> int:
    """Alternatives of each token: as asked for by `logprobs`, else by `n_probs`."""
    if not fields.logprobs:
        return _count(fields.n_probs, "n_probs") if fields.n_probs is not None else 0
    if not isinstance(fields.top_logprobs, int | float):
        return _DEFAULT_TOP_LOGPROBS
    return _count(fields.top_logprobs, "top_logprobs")


def _count(value: Any, field: str) -> int:
    return int(read_number(value, field, Range(int, 0, INT32_MAX, clamps=True)))


def _constraint(served: ServedModel, fields: ChatRequest, dialogue: Dialogue) -> Constraint | None:
    if not dialogue.choice.tools:
        return read_chat_constraint(
            fields, dialogue.tags, served.constraint, starts_in_reasoning=dialogue.starts_in_reasoning
        )
    return read_call_constraint(
        fields,
        dialogue.format,
        dialogue.choice,
        parallel=dialogue.is_parallel,
        tags=dialogue.tags,
        starts_in_reasoning=dialogue.starts_in_reasoning,
    )


def _preserved(served: ServedModel, dialogue: Dialogue) -> frozenset[int]:
    """Special tokens whose text the parser needs to see."""
    texts = list(dialogue.tags.texts if dialogue.tags else ())
    if dialogue.choice.tools or dialogue.format.dropped or dialogue.format.content_openings:
        texts += dialogue.format.preserved
    tokenize = served.engine.tokenizer.tokenize
    found = [tokenize(text, add_special=False, parse_special=True) for text in texts]
    return frozenset(tokens[0] for tokens in found if len(tokens) == 1)
