"""Requests and answers of OpenAI's responses and Anthropic's messages, as types.

As in `wingman.api.schema`, unknown fields are skipped and null counts as absent. Items, parts and blocks
have one type each with the fields of all their kinds; the translations say which kind needs which.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

import msgspec

from wingman.api.schema import GenerationFields, Number

# -- POST /v1/responses: requests -------------------------------------------------------------------


class InputPart(msgspec.Struct, kw_only=True):
    """A part of a message, of thoughts or of a call's output."""

    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(msgspec.Struct, kw_only=True):
    """An item of `input`; without a type it is a message."""

    type: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[InputPart] | None = None
    summary: list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None


class ResponseTool(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A tool; only functions can be called here."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class AllowedTool(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A tool by its name."""

    type: str
    name: str | None = None


class ResponseToolChoice(msgspec.Struct, kw_only=True, omit_defaults=True):
    """`tool_choice` when it names tools."""

    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[AllowedTool] | None = None


class TextFormat(msgspec.Struct, kw_only=True, omit_defaults=True):
    """`text.format`: what the answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, kw_only=True, omit_defaults=True):
    """`text`."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(msgspec.Struct, kw_only=True):
    """`reasoning`."""

    effort: str | None = None
    summary: str | None = None


class ResponseRequest(GenerationFields, kw_only=True):
    """POST /responses and /v1/responses."""

    input: str | list[InputItem] | None = None
    instructions: str | None = None
    max_output_tokens: Number | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: str | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = None
    top_logprobs: Number | None = None
    metadata: dict[str, str] | None = None
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


# -- POST /v1/messages: requests --------------------------------------------------------------------


class Block(msgspec.Struct, kw_only=True):
    """A block of a message's content or of a tool's result."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None
    is_error: bool | None = None


class InputMessage(msgspec.Struct, kw_only=True):
    """A message of the conversation so far."""

    role: Literal["user", "assistant", "system"] | None = None
    content: str | list[Block] | None = None


class MessageTool(msgspec.Struct, kw_only=True):
    """A tool of the client's; those of Anthropic's servers have other types."""

    type: str | None = None
    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class MessageToolChoice(msgspec.Struct, kw_only=True):
    """Whether a tool may, must or can't be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, kw_only=True):
    """Whether to think: enabled, disabled, or another type to leave it to the model."""

    type: str
    budget_tokens: Number | None = None


class OutputFormat(msgspec.Struct, kw_only=True):
    """`output_config.format`: a JSON schema that the answer has to match."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, kw_only=True):
    """`output_config`."""

    effort: str | None = None
    format: OutputFormat | None = None


class MessageRequest(GenerationFields, kw_only=True):
    """POST /v1/messages; /v1/messages/count_tokens takes the same."""

    messages: list[InputMessage] | None = None
    system: str | list[Block] | None = None
    stop_sequences: list[str] | None = None
    tools: list[MessageTool] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None


# -- POST /v1/responses: answers --------------------------------------------------------------------


class InputDetails(TypedDict):
    """Input tokens that needed no evaluation."""

    cached_tokens: int


class OutputDetails(TypedDict):
    """Output tokens that are thoughts, by their share of the text."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class OutputPart(TypedDict):
    """Text of a message, or a thought."""

    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: NotRequired[list[Any]]
    logprobs: NotRequired[list[dict[str, Any]]]


class OutputItem(TypedDict):
    """A message, thoughts (with `summary`) or a call (with `call_id`, `name`, `arguments`)."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[list[OutputPart]]
    summary: NotRequired[list[Any]]
    encrypted_content: NotRequired[None]
    call_id: NotRequired[str]
    name: NotRequired[str]
    arguments: NotRequired[str]


class ResponseObject(TypedDict):
    """OpenAI's response; nothing of it is stored."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, str | None]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None


class ResponseInputTokens(TypedDict):
    """How many tokens the input of a response has."""

    object: Literal["response.input_tokens"]
    input_tokens: int


# -- POST /v1/messages: answers ---------------------------------------------------------------------


class MessageUsage(TypedDict):
    """Tokens of a message; `input_tokens` are those that were evaluated."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class OutputBlock(TypedDict):
    """Thoughts, text or a call of a tool."""

    type: Literal["thinking", "text", "tool_use"]
    thinking: NotRequired[str]
    signature: NotRequired[str]
    text: NotRequired[str]
    id: NotRequired[str]
    name: NotRequired[str]
    input: NotRequired[dict[str, Any]]


class MessageObject(TypedDict):
    """Anthropic's message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[OutputBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage
