"""Fill in the middle: POST /infill, and /v1/completions with `suffix`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from wingman.api.native import Completion, answer_natively, build_completion
from wingman.api.prompts import refuse_endless
from wingman.api.schema import GenerationFields, InfillRequest, parse_body
from wingman.engine.runner import Tokenizer
from wingman.engine.types import FimTokens, ModelInfo
from wingman.errors import InvalidRequest, NotSupported
from wingman.http.messages import Answer, Request
from wingman.services.served import ServedModel

_REPO_NAME: Final = "myproject\n"
_FILE_NAME: Final = "filename\n"
_DEFAULT_NAME: Final = "tmp"
_SNIPPET: Final = "\n\n--- snippet ---\n\n"
"""Names and the separator that llama-server uses, so that both give a model the same prompt."""
MAX_EXTRA: Final = 1024
"""Chunks of input_extra."""


async def infill(served: ServedModel, request: Request) -> Answer:
    """POST /infill: what goes between two texts, as native objects."""
    fim_of(served.info)
    fields = await parse_body(request.body, InfillRequest)
    return await answer_natively(await served.engine.work(len(request.body), _prepare, served, fields))


def fim_of(info: ModelInfo) -> FimTokens:
    """The model's fill-in-the-middle tokens; raises NotSupported when it has none."""
    if info.fim is None:
        raise NotSupported("Infill is not supported by this model: it has no fill-in-the-middle tokens")
    return info.fim


def _prepare(served: ServedModel, fields: InfillRequest) -> Completion:
    prompt = fields.prompt
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str | None):
        raise InvalidRequest("Field 'prompt': must be a string", "prompt")
    extra = read_extra(fields.input_extra or [])
    prefix = _read_side(fields.input_prefix, "input_prefix", served)
    suffix = _read_side(fields.input_suffix, "input_suffix", served)
    return complete_between(served, fields, prefix, suffix, extra, prompt or "")


def complete_between(
    served: ServedModel,
    fields: GenerationFields,
    prefix: Sequence[int],
    suffix: Sequence[int],
    extra: Sequence[tuple[str, str]] = (),
    prompt: str = "",
) -> Completion:
    """A completion between two token sequences; in the engine's executor."""
    info, tokenizer = served.info, served.engine.tokenizer
    refuse_endless(prompt, tokenizer, info)
    start = tokenizer.tokenize(prompt, add_special=False, parse_special=True)
    n_batch = served.config.context.batch_size
    room = max(0, info.n_ctx_slot - n_batch - 2 * served.config.context.n_predict)
    tokens = infill_tokens(
        prefix,
        suffix,
        start,
        _extra_tokens(extra, fim_of(info), tokenizer, room, max(1, room * tokenizer.max_piece_bytes)),
        fim_of(info),
        n_batch=n_batch,
        spm=served.config.context.spm_infill,
    )
    return build_completion(served, fields, [[info.bos_id, *tokens] if info.adds_bos else tokens])


def infill_tokens(
    prefix: Sequence[int],
    suffix: Sequence[int],
    prompt: Sequence[int],
    extra: Sequence[int],
    fim: FimTokens,
    *,
    n_batch: int,
    spm: bool,
) -> list[int]:
    """The prompt without BOS (format_prompt_infill of llama-server): the end of the prefix and the start of
    the suffix share a batch three to one, `extra` goes in front; `spm` puts the suffix first."""
    n_suffix = max(0, n_batch // 4 - (2 + len(prompt)))
    before = [fim.prefix, *prefix[max(0, len(prefix) - 3 * (n_batch // 4)) :], *prompt]
    after = [fim.suffix, *suffix[:n_suffix]]
    parts = (after, before) if spm else (before, after)
    return [*extra, *parts[0], *parts[1], fim.middle]


def _extra_tokens(
    chunks: Sequence[tuple[str, str]], fim: FimTokens, tokenizer: Tokenizer, room: int, n_chars: int
) -> list[int]:
    """Other files in the repository layout when the model knows it, else as snippets; the last `room`. Read
    from the end, and no more than that."""

    def plain(text: str) -> list[int]:
        return tokenizer.tokenize(text, add_special=False, parse_special=False)

    parts = [[fim.sep, *plain(_FILE_NAME)]] if fim.sep >= 0 else []
    n_tokens = sum(map(len, parts))
    for name, text in reversed(chunks):
        if n_tokens >= room:
            break
        head = [fim.sep, *plain((name + "\n")[-n_chars:])] if fim.sep >= 0 else plain(_SNIPPET)
        parts.append([*head, *plain(text[-n_chars:])])
        n_tokens += len(parts[-1])
    if fim.repo >= 0:
        parts.append([fim.repo, *plain(_REPO_NAME)])
    tokens = [token for part in reversed(parts) for token in part]
    return tokens[max(0, len(tokens) - room) :] if room else []


def read_extra(raw: list[Any]) -> list[tuple[str, str]]:
    """`input_extra` as (file name, text); raises InvalidRequest naming the item at fault."""
    if len(raw) > MAX_EXTRA:
        raise InvalidRequest(f"Field 'input_extra': at most {MAX_EXTRA} are taken", "input_extra")
    chunks = []
    for index, item in enumerate(raw):
        where = f"input_extra[{index}]"
        text = item.get("text") if isinstance(item, dict) else None
        if not isinstance(text, str):
            raise InvalidRequest(f"Field '{where}.text': must be a string", f"{where}.text")
        name = item.get("filename", _DEFAULT_NAME)
        if not isinstance(name, str):
            raise InvalidRequest(f"Field '{where}.filename': must be a string", f"{where}.filename")
        chunks.append((name, text))
    return chunks


def _read_side(raw: Any, field: str, served: ServedModel) -> list[int]:
    """`input_prefix` or `input_suffix`: a string, or a list of strings and token ids."""
    if raw is None:
        raise InvalidRequest(f"Field '{field}': is required", field)
    items = [raw] if isinstance(raw, str) else raw
    if not isinstance(items, list):
        raise InvalidRequest(f"Field '{field}': must be a string, or strings and token ids", field)
    tokens: list[int] = []
    for item in items:
        if isinstance(item, str):
            tokens += side_tokens(item, field, served)
        elif isinstance(item, int) and not isinstance(item, bool) and 0 <= item < served.info.n_vocab:
            tokens.append(item)
        else:
            raise InvalidRequest(f"Field '{field}': must be a string, or strings and token ids", field)
    return tokens


def side_tokens(text: str, field: str, served: ServedModel) -> list[int]:
    """Tokens of one side; only the part that can be used is read, so its length does not matter."""
    tokenizer = served.engine.tokenizer
    n_chars = served.config.context.batch_size * tokenizer.max_piece_bytes
    used = text[:n_chars] if field.endswith("suffix") else text[-n_chars:]
    return tokenizer.tokenize(used, add_special=False, parse_special=False)
