"""What crosses the line between the event loop and the engine thread. All frozen, all plain data:
the engine could as well live in another process.

Loop to engine: Command. Engine to loop: StepOutput, at most one a step. The job id is the only
key both sides share; events for an unknown id are dropped.
"""

from __future__ import annotations

import enum

from msgspec import Struct, field

from wingman.config import SamplingParams


class StopType(enum.Enum):
    """Why a generation ended, in llama-server's words."""

    NONE = "none"
    EOS = "eos"
    WORD = "word"
    LIMIT = "limit"


class Constraint(Struct, frozen=True):
    """A GBNF grammar, start rule `root`, that output must match. A lazy one begins where one of the
    trigger texts or tokens appears."""

    grammar: str
    is_lazy: bool = False
    trigger_texts: tuple[str, ...] = ()
    trigger_tokens: tuple[int, ...] = ()


class DraftKind(enum.Enum):
    """Who guesses tokens ahead, in llama-server's words where it has any."""

    AUTO = "auto"
    """A draft model if there is one, else what the text said before; only as far as it pays."""
    NONE = "none"
    LOOKUP = "ngram-simple"
    MODEL = "draft-simple"


class Drafting(Struct, frozen=True):
    """How tokens are guessed ahead: at most `n_max` of a sequence in a step, at least `n_min` or none; a draft
    model stops where its best guess is less likely than `p_min`."""

    kind: DraftKind = DraftKind.NONE
    n_max: int = 16
    n_min: int = 0
    p_min: float = 0.0


class Job(Struct, frozen=True):
    """One prompt to be completed once. `prompt` is never empty; counts are in tokens."""

    id: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    n_predict: int = -1
    stop: tuple[str, ...] = ()
    n_keep: int = 0
    n_discard: int = 0
    n_indent: int = 0
    t_max_predict_ms: int = -1
    cache_prompt: bool = True
    id_slot: int = -1
    stream: bool = False
    """Deltas are posted while it runs; otherwise only its end is."""
    return_progress: bool = False
    timings_per_token: bool = False
    preserved_tokens: frozenset[int] = frozenset()
    """Special tokens whose text is part of the output."""
    drops_partial_char: bool = False
    """A character that a limit cuts in two is left out, not shown as U+FFFD."""
    constraint: Constraint | None = None
    n_probs: int = 0
    """Alternatives reported with each token; 0: no probabilities at all."""
    post_sampling_probs: bool = False
    lora: tuple[float, ...] = ()
    """Scale of each loaded adapter."""
    drafting: Drafting = Drafting()
    fork_of: int | None = None
    """The job with the same prompt whose evaluation this one shares; both are submitted together."""


class PoolingType(enum.Enum):
    """How token vectors become the vector of an input (llama_pooling_type)."""

    NONE = 0
    MEAN = 1
    CLS = 2
    LAST = 3
    RANK = 4


class EmbedJob(Struct, frozen=True):
    """Inputs to be embedded, as token ids."""

    id: int
    inputs: tuple[tuple[int, ...], ...]


class SlotMove(enum.Enum):
    """What can be done with what an idle slot holds."""

    SAVE = "save"
    RESTORE = "restore"
    ERASE = "erase"


class SlotJob(Struct, frozen=True):
    """Save, restore or erase a slot once it is idle. For a restore, `state` is the runtime's
    serialised cache of `tokens`, computed with the adapter scales `lora`."""

    id: int
    slot_id: int
    move: SlotMove
    tokens: tuple[int, ...] = ()
    state: bytes = b""
    lora: tuple[float, ...] = ()


# -- commands, loop to engine ---------------------------------------------------------------------


class Submit(Struct, frozen=True):
    """Queue jobs; a fork comes after the job it shares its prompt with."""

    jobs: tuple[Job, ...]


class Embed(Struct, frozen=True):
    """Queue inputs to be embedded."""

    job: EmbedJob


class ChangeSlot(Struct, frozen=True):
    """Queue a change of a slot."""

    job: SlotJob


class Cancel(Struct, frozen=True):
    """Forget a job; it gets no further event. Unknown ids are ignored."""

    job_id: int


class EndAll(Struct, frozen=True):
    """Finish every running job with what it has, and fail those still queued."""


class Shutdown(Struct, frozen=True):
    """Free everything and end the thread."""


Command = Submit | Embed | ChangeSlot | Cancel | EndAll | Shutdown


# -- events, engine to loop -----------------------------------------------------------------------


class Timings(Struct, frozen=True):
    """Durations in milliseconds and counts in tokens; derived rates follow llama-server: the first
    generated token is free, it comes from the prompt's last logits (server_slot_stats)."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    predicted_n: int
    predicted_ms: float
    draft_n: int = 0
    """Tokens guessed ahead, and how many of them were right."""
    draft_n_accepted: int = 0

    def to_dict(self) -> dict[str, float]:
        """The `timings` object of the API. Never NaN, never infinite."""
        steps = max(self.predicted_n - 1, 0)
        drafts = {"draft_n": self.draft_n, "draft_n_accepted": self.draft_n_accepted} if self.draft_n else {}
        return {
            "cache_n": self.cache_n,
            "prompt_n": self.prompt_n,
            "prompt_ms": self.prompt_ms,
            "prompt_per_token_ms": self.prompt_ms / self.prompt_n if self.prompt_n else 0.0,
            "prompt_per_second": 1e3 / self.prompt_ms * self.prompt_n if self.prompt_ms > 0 else 0.0,
            "predicted_n": self.predicted_n,
            "predicted_ms": self.predicted_ms,
            "predicted_per_token_ms": self.predicted_ms / steps if steps else 0.0,
            "predicted_per_second": 1e3 / self.predicted_ms * steps if self.predicted_ms > 0 else 0.0,
            **drafts,
        }


class Started(Struct, frozen=True):
    """The job got a slot."""

    job_id: int
    slot_id: int


class Progress(Struct, frozen=True):
    """Prompt evaluation, for jobs that asked: `processed` of `total` tokens, `cache` of them reused."""

    job_id: int
    total: int
    cache: int
    processed: int
    time_ms: float


class TokenProb(Struct, frozen=True):
    """A sampled token with its likeliest alternatives, likeliest first, as (token, value).

    Values are natural logarithms of the probability before sampling or, when the job asked for
    post-sampling probabilities, the probabilities the samplers left.
    """

    token: int
    value: float
    top: tuple[tuple[int, float], ...]


class TextDelta(Struct, frozen=True):
    """New text; may be empty when a token's text is held back. `n_decoded` counts tokens so far."""

    job_id: int
    text: str
    tokens: tuple[int, ...]
    n_decoded: int
    timings: Timings | None = None
    probs: tuple[TokenProb, ...] = ()


class Finished(Struct, frozen=True):
    """The job's end. `text` and `tokens` are the whole output, whatever was streamed before."""

    job_id: int
    slot_id: int
    text: str
    tokens: tuple[int, ...]
    n_prompt: int
    n_held: int
    """Tokens now held in the slot: prompt and output, without the last one sampled."""
    stop_type: StopType
    stopping_word: str
    truncated: bool
    has_new_line: bool
    timings: Timings
    probs: tuple[TokenProb, ...] = ()
    """Those of all tokens; none when they were streamed."""
    is_fork: bool = False
    """Whether its prompt was evaluated for another job."""


class Embedded(Struct, frozen=True):
    """The vectors of an EmbedJob as little-endian float32 bytes, one item per input: one vector, or one
    per token when nothing is pooled."""

    job_id: int
    vectors: tuple[bytes, ...]


class SlotChanged(Struct, frozen=True):
    """A SlotJob is done. `tokens` are those saved, restored or erased; `state` is what a save yields, `lora`
    the adapter scales it was computed with."""

    job_id: int
    tokens: tuple[int, ...]
    state: bytes = b""
    lora: tuple[float, ...] = ()


class FailureKind(enum.Enum):
    """What a Failed job died of; turned into an error by `client`."""

    ENGINE = enum.auto()
    INVALID = enum.auto()
    UNAVAILABLE = enum.auto()


class Failed(Struct, frozen=True):
    """The job ended without a result; `message` is fit for the client."""

    job_id: int
    kind: FailureKind
    message: str


JobEvent = Started | Progress | TextDelta | Finished | Embedded | SlotChanged | Failed


class SlotView(Struct, frozen=True):
    """One slot at the end of a step, for monitoring; the numbers are of its current or last job."""

    id: int
    job_id: int | None
    is_busy: bool
    n_prompt: int = 0
    n_processed: int = 0
    n_cached: int = 0
    n_decoded: int = 0
    n_held: int = 0
    has_new_line: bool = False
    stop_type: StopType = StopType.NONE
    stopping_word: str = ""


class HistogramView(Struct, frozen=True):
    """Counts per bucket under the bounds of `wingman.engine.stats`, +Inf last, and the sum in seconds."""

    counts: tuple[int, ...]
    sum_s: float


class Snapshot(Struct, frozen=True):
    """The engine at the end of a step. Counters only grow; times are of `time.monotonic`."""

    slots: tuple[SlotView, ...] = ()
    n_waiting: int = 0
    n_steps: int = 0
    n_busy_slots_total: int = 0
    prompt_tokens_total: int = 0
    prompt_tokens_cached_total: int = 0
    prompt_seconds_total: float = 0.0
    predicted_tokens_total: int = 0
    predicted_seconds_total: float = 0.0
    sample_seconds_total: float = 0.0
    n_preemptions_total: int = 0
    n_drafts_total: int = 0
    draft_tokens_total: int = 0
    draft_tokens_accepted_total: int = 0
    parked_bytes: int = 0
    parked_budget_bytes: int = 0
    n_parked: int = 0
    """Sequences kept in host memory."""
    n_tokens_max: int = 0
    threads: tuple[tuple[str, int], ...] = ()
    """Threads of the last step of each phase."""
    thread_changes_total: int = 0
    first_token: HistogramView | None = None
    token_gap: HistogramView | None = None
    queue_wait: HistogramView | None = None


class StepOutput(Struct, frozen=True):
    """Everything a step has to say to the loop: one wake-up."""

    events: tuple[JobEvent, ...] = ()


class FimTokens(Struct, frozen=True):
    """Ids of the fill-in-the-middle tokens; -1 for a missing one of `repo` and `sep`."""

    prefix: int
    suffix: int
    middle: int
    repo: int = -1
    sep: int = -1


class EmbeddingInfo(Struct, frozen=True):
    """What a model's embeddings look like; `n_max` is the longest input in tokens."""

    pooling: PoolingType
    n_dims: int
    n_max: int


class LoraInfo(Struct, frozen=True):
    """A loaded LoRA adapter and its scale at start."""

    path: str
    scale: float
    metadata: dict[str, str] = field(default_factory=dict)


class ModelInfo(Struct, frozen=True):
    """What the loop may know of a loaded model; sizes are in bytes, counts in tokens."""

    path: str
    description: str
    n_vocab: int
    n_ctx_train: int
    n_ctx_slot: int
    n_ctx_total: int
    """Of all slots together: as much for each, or one pool that they share."""
    n_embd: int
    n_params: int
    size_bytes: int
    ftype: str
    vocab_type: int
    n_slots: int
    bos_token: str
    eos_token: str
    adds_bos: bool
    chat_template: str | None
    build: str
    system_info: str
    can_shift: bool
    can_generate: bool = True
    """False for a model that only embeds."""
    embedding: EmbeddingInfo = EmbeddingInfo(PoolingType.MEAN, 0, 0)
    fim: FimTokens | None = None
    loras: tuple[LoraInfo, ...] = ()
    sep_token: int = -1
    eos_id: int = -1
    bos_id: int = -1
    adds_eos: bool = False
    adds_sep: bool = False
    rerank_template: str | None = None
    """A prompt with {query} and {document}, for models that rank."""
    metadata: dict[str, str] = field(default_factory=dict)
