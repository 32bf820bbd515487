"""What routes answer, as types: the source of /openapi.json. Keys that may be absent are NotRequired."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict


class ErrorDetail(TypedDict):
    """Why a request failed."""

    code: int
    message: str
    type: str
    param: NotRequired[str]
    n_prompt_tokens: NotRequired[int]
    n_ctx: NotRequired[int]


class Error(TypedDict):
    """Every answer that is no success."""

    error: ErrorDetail
    status: NotRequired[str]


class Status(TypedDict):
    """How it is with the server, in a word or two."""

    status: str


class Success(TypedDict):
    """A change was made."""

    success: bool


class Health(TypedDict):
    """Whether slots are free."""

    status: Literal["ok", "no slot available"]
    slots_idle: int
    slots_processing: int
    slots: NotRequired[list[Slot]]


class NextToken(TypedDict):
    """How far a slot is."""

    has_next_token: bool
    has_new_line: bool
    n_remain: int
    n_decoded: int
    stopped_eos: bool
    stopped_word: bool
    stopped_limit: bool
    stopping_word: str


class Slot(TypedDict):
    """A slot; one that was used also shows the settings of its job at top level."""

    id: int
    n_ctx: int
    speculative: bool
    is_processing: bool
    state: Literal[0, 1]
    model: str
    id_task: NotRequired[int]
    n_prompt_tokens: NotRequired[int]
    n_prompt_tokens_processed: NotRequired[int]
    n_prompt_tokens_cache: NotRequired[int]
    params: NotRequired[dict[str, Any]]
    next_token: NotRequired[list[NextToken]]


class Props(TypedDict):
    """Facts of the server and its model."""

    user_name: str
    assistant_name: str
    default_generation_settings: dict[str, Any]
    total_slots: int
    model_alias: str
    model_path: str
    model_ftype: str
    modalities: dict[str, bool]
    endpoint_slots: bool
    endpoint_props: bool
    endpoint_metrics: bool
    chat_template: str
    chat_template_caps: dict[str, bool]
    bos_token: str
    eos_token: str
    build_info: str
    system_info: str
    is_sleeping: bool
    media_marker: str
    cors_proxy_enabled: bool
    ui: bool
    ui_settings: dict[str, Any]


class ModelMeta(TypedDict):
    """Sizes of a model, in tokens, dimensions, parameters and bytes."""

    vocab_type: int
    n_vocab: int
    n_ctx: int
    n_ctx_train: int
    n_embd: int
    n_params: int
    size: int
    ftype: str


class Model(TypedDict):
    """A model as OpenAI lists it."""

    id: str
    aliases: list[str]
    tags: list[str]
    object: Literal["model"]
    created: int
    owned_by: str
    architecture: dict[str, list[str]]
    meta: ModelMeta


class Models(TypedDict):
    """The loaded models, in OpenAI's and in Ollama's shape."""

    object: Literal["list"]
    data: list[Model]
    models: list[dict[str, Any]]


class Tokens(TypedDict):
    """Token ids."""

    tokens: list[int]


class TokenPieces(TypedDict):
    """Token ids with their pieces."""

    tokens: list[TokenPiece]


class TokenPiece(TypedDict):
    """A token; its piece is a list of bytes when it is no text."""

    id: int
    piece: str | list[int]


class Content(TypedDict):
    """Text."""

    content: str


class Prompt(TypedDict):
    """A rendered conversation."""

    prompt: str


class InputTokens(TypedDict):
    """A number of tokens."""

    object: NotRequired[Literal["response.input_tokens"]]
    input_tokens: int


class Timings(TypedDict):
    """Durations in milliseconds, counts in tokens."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class Completion(TypedDict, total=False):
    """A native answer; `response_fields` may leave out any key."""

    index: int
    content: str
    tokens: list[int]
    id_slot: int
    stop: bool
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    generation_settings: dict[str, Any]
    prompt: str
    has_new_line: bool
    truncated: bool
    stop_type: Literal["eos", "word", "limit", "none"]
    stopping_word: str
    tokens_cached: int
    timings: Timings
    completion_probabilities: list[dict[str, Any]]
    stopped_eos: bool
    stopped_word: bool
    stopped_limit: bool
    multimodal: bool


class PromptDetails(TypedDict):
    """Prompt tokens that needed no evaluation."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens of a request."""

    completion_tokens: int
    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TextChoice(TypedDict):
    """An answer of a text completion."""

    text: str
    index: int
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"] | None


class TextCompletion(TypedDict):
    """OpenAI's text completion; the keys of a native answer stand beside these."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage
    timings: Timings


class Function(TypedDict):
    """A called function; arguments are JSON text."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A call that the model wants made."""

    id: str
    type: Literal["function"]
    function: Function


class Message(TypedDict):
    """The model's message."""

    role: Literal["assistant"]
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    function_call: NotRequired[Function]


class ChatChoice(TypedDict):
    """An answer of a chat."""

    finish_reason: Literal["stop", "length", "tool_calls", "function_call"]
    index: int
    message: Message
    logprobs: NotRequired[dict[str, Any]]


class ChatCompletion(TypedDict):
    """OpenAI's chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings


class EmbeddingUsage(TypedDict):
    """Tokens of a request."""

    prompt_tokens: int
    total_tokens: int


class Embedding(TypedDict):
    """A vector, as numbers or as base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    encoding_format: NotRequired[Literal["base64"]]


class Embeddings(TypedDict):
    """OpenAI's embeddings."""

    object: Literal["list"]
    model: str
    usage: EmbeddingUsage
    data: list[Embedding]


class NativeEmbedding(TypedDict):
    """The vectors of an input: one, or one per token when nothing is pooled."""

    index: int
    embedding: list[list[float]]


class Rank(TypedDict):
    """A document's place."""

    index: int
    relevance_score: float | None


class Ranking(TypedDict):
    """Documents, best first."""

    object: Literal["list"]
    model: str
    usage: EmbeddingUsage
    results: list[Rank]


class TextRank(TypedDict):
    """A document's place in TEI's form."""

    index: int
    score: float | None
    text: NotRequired[str]


class SlotErased(TypedDict):
    """A slot is empty now."""

    id_slot: int
    n_erased: int


class SlotSaved(TypedDict):
    """A slot was written to a file."""

    id_slot: int
    filename: str
    n_saved: int
    n_written: int
    timings: dict[str, float]


class SlotRestored(TypedDict):
    """A slot was read from a file."""

    id_slot: int
    filename: str
    n_restored: int
    n_read: int
    timings: dict[str, float]


class LoraAdapter(TypedDict):
    """A loaded adapter."""

    id: int
    path: str
    scale: float
    task_name: str
    prompt_prefix: str
