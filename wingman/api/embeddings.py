"""Vectors: POST /embedding, /embeddings and /v1/embeddings; POST /rerank, /v1/rerank and /reranking.

Inputs are tokenised and vectors turned into JSON in the engine's executor.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from wingman.api.prompts import read_prompt, refuse_endless, split_prompts
from wingman.api.ranges import Range, read_number
from wingman.api.schema import EmbeddingRequest, RerankRequest, parse_body
from wingman.engine.runner import Tokenizer
from wingman.engine.types import ModelInfo, PoolingType
from wingman.errors import ContextOverflow, InvalidRequest, NotSupported
from wingman.http.messages import Request, Response
from wingman.services.served import ServedModel

Matrix = npt.NDArray[np.float32]
_NORM: Final = Range(int, -1, 1024)
_MAX_ABS_SCALE: Final = 32760.0
"""embd_normalize 0 scales the largest component to this (common_embd_normalize)."""


async def embed(served: ServedModel, request: Request) -> Response:
    """Embed one or several inputs, as OpenAI's object or, for `content` and /embedding, as llama-server's
    array."""
    fields = await parse_body(request.body, EmbeddingRequest)
    if _pooling(served) is PoolingType.RANK:
        raise NotSupported("this model ranks; it has no embeddings")
    is_native = fields.input is None or request.path == "/embedding"
    if not is_native and _pooling(served) is PoolingType.NONE:
        if request.path.startswith("/v1/"):
            raise InvalidRequest("pooling none can't be expressed in OpenAI's form; use /embeddings")
        is_native = True
    work = served.engine.work
    inputs = await work(len(request.body), _tokenize, served, fields)
    vectors = await served.engine.embed(inputs)
    n_tokens = sum(map(len, inputs))
    return Response(
        200, await work(sum(map(len, vectors)), _body, served, fields, vectors, n_tokens, is_native)
    )


def _pooling(served: ServedModel) -> PoolingType:
    return served.info.embedding.pooling


def _tokenize(served: ServedModel, fields: EmbeddingRequest) -> tuple[tuple[int, ...], ...]:
    field = "content" if fields.input is None else "input"
    raw = getattr(fields, field)
    if raw is None:
        raise InvalidRequest("Field 'input': is required", "input")
    if raw == []:
        raise InvalidRequest(f"Field '{field}': must not be empty", field)
    _refuse_many(raw, served, field)
    if fields.encoding_format not in (None, "float", "base64"):
        raise InvalidRequest("Field 'encoding_format': must be float or base64", "encoding_format")
    return tuple(
        _checked(partial(read_prompt, item, served.engine.tokenizer, served.info, where), served.info, where)
        for item, where in split_prompts(raw, field)
    )


def _refuse_many(raw: Any, served: ServedModel, field: str) -> None:
    """Refuse more inputs than --max-embed-inputs; a list with a number in it is one input."""
    most = served.config.context.max_embed_inputs
    if isinstance(raw, list) and len(raw) > most and not any(isinstance(one, int | float) for one in raw):
        message = f"Field '{field}': at most {most} inputs are taken (--max-embed-inputs)"
        raise InvalidRequest(message, field)


def _checked(read: Callable[[], list[int]], info: ModelInfo, where: str) -> tuple[int, ...]:
    """The tokens of an input; raises InvalidRequest naming it when there are none or too many."""
    try:
        tokens = read()
        n_tokens = len(tokens)
    except ContextOverflow as error:
        n_tokens = error.n_prompt_tokens
    if not n_tokens:
        raise InvalidRequest(f"Field '{where}': has no tokens", where)
    if n_tokens > info.embedding.n_max:
        message = f"has {n_tokens} tokens, which is too large; {info.embedding.n_max} are taken"
        raise InvalidRequest(f"Field '{where}': {message} (--max-embed-tokens)", where)
    return tuple(tokens)


def _body(
    served: ServedModel, fields: EmbeddingRequest, vectors: Sequence[bytes], n_tokens: int, is_native: bool
) -> bytes:
    info = served.info.embedding
    matrices = [np.frombuffer(data, "<f4").reshape(-1, info.n_dims) for data in vectors]
    if info.pooling is not PoolingType.NONE:
        matrices = [_finish(matrix, fields) for matrix in matrices]
    if is_native:
        return _dump([{"index": index, "embedding": matrix} for index, matrix in enumerate(matrices)])
    is_base64 = fields.encoding_format == "base64"
    return _dump(
        {
            "object": "list",
            "model": fields.model if isinstance(fields.model, str) else served.name,
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
            "data": [_item(index, matrix[0], is_base64) for index, matrix in enumerate(matrices)],
        }
    )


def _dump(body: Any) -> bytes:
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _item(index: int, vector: Matrix, is_base64: bool) -> dict[str, Any]:
    if not is_base64:
        return {"object": "embedding", "index": index, "embedding": vector}
    text = base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return {"object": "embedding", "index": index, "embedding": text, "encoding_format": "base64"}


def _finish(matrix: Matrix, fields: EmbeddingRequest) -> Matrix:
    """Cut to `dimensions` and normalise, shape (1, n_dims)."""
    n_dims = matrix.shape[1]
    if fields.dimensions is not None:
        n_dims = int(read_number(fields.dimensions, "dimensions", Range(int, 1, n_dims)))
    norm = (
        2
        if fields.embd_normalize is None
        else int(read_number(fields.embd_normalize, "embd_normalize", _NORM))
    )
    return normalize(np.ascontiguousarray(matrix[:, :n_dims]), norm)


def normalize(matrix: Matrix, norm: int) -> Matrix:
    """Scale each row as `embd_normalize` says: -1 not at all, 0 by the largest component, p by the p-norm
    (common_embd_normalize)."""
    if norm < 0:
        return matrix
    wide = np.abs(matrix.astype(np.float64))
    largest = wide.max(axis=1, keepdims=True)
    if norm == 0:
        total = largest / _MAX_ABS_SCALE
    else:  # relative to the largest component, so that no power overflows
        scaled = np.divide(wide, largest, out=np.zeros_like(wide), where=largest > 0)
        total = largest * (scaled**norm).sum(axis=1, keepdims=True) ** (1 / norm)
    factor = np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)
    scaled_rows: Matrix = (matrix * factor).astype(np.float32)
    return scaled_rows


async def rerank(served: ServedModel, request: Request) -> Response:
    """Score documents against a query, best first: Jina's form, or TEI's when the field is `texts`."""
    fields = await parse_body(request.body, RerankRequest)
    if _pooling(served) is not PoolingType.RANK:
        raise NotSupported("this model does not rank; serve one that does, or start with --reranking")
    inputs = await served.engine.work(len(request.body), _rerank_inputs, served, fields)
    vectors = await served.engine.embed(inputs)
    scores = [float(np.frombuffer(data, "<f4")[0]) for data in vectors]
    n_tokens = sum(map(len, inputs))
    ranking = await served.engine.work(len(request.body), _ranking, served, fields, scores, n_tokens)
    return Response(200, ranking)


def _rerank_inputs(served: ServedModel, fields: RerankRequest) -> tuple[tuple[int, ...], ...]:
    if fields.query is None:
        raise InvalidRequest("Field 'query': is required", "query")
    documents = fields.texts if fields.documents is None else fields.documents
    if not documents:
        raise InvalidRequest("Field 'documents': must be a list of strings, not empty", "documents")
    _refuse_many(documents, served, "documents")
    read = partial(_rerank_tokens, fields.query, tokenizer=served.engine.tokenizer, info=served.info)
    return tuple(
        _checked(partial(read, document), served.info, f"documents[{index}]")
        for index, document in enumerate(documents)
    )


def _rerank_tokens(query: str, document: str, tokenizer: Tokenizer, info: ModelInfo) -> list[int]:
    """A query and a document as the model was trained to see them (format_prompt_rerank)."""
    for text in (query, document):
        refuse_endless(text, tokenizer, info)
    if info.rerank_template is not None:
        text = info.rerank_template.replace("{query}", query).replace("{document}", document)
        return tokenizer.tokenize(text, add_special=False, parse_special=True)
    end = info.eos_id if info.eos_id >= 0 else info.sep_token
    head = [info.bos_id] if info.adds_bos else []
    first_end = [end] if info.adds_eos else []
    separator = [info.sep_token] if info.adds_sep else []
    asked = tokenizer.tokenize(query, add_special=False, parse_special=False)
    told = tokenizer.tokenize(document, add_special=False, parse_special=False)
    return [*head, *asked, *first_end, *separator, *told, *first_end]


def _ranking(served: ServedModel, fields: RerankRequest, scores: Sequence[float], n_tokens: int) -> bytes:
    is_tei = fields.documents is None
    label = "score" if is_tei else "relevance_score"
    order = sorted(range(len(scores)), key=lambda index: _sort_key(scores[index]))
    if fields.top_n is not None:
        order = order[: int(read_number(fields.top_n, "top_n", Range(int, 0, len(scores), clamps=True)))]
    results: list[dict[str, Any]] = [{"index": index, label: scores[index]} for index in order]
    if is_tei:
        if fields.return_text and fields.texts is not None:
            results = [one | {"text": fields.texts[one["index"]]} for one in results]
        return orjson.dumps(results)
    return orjson.dumps(
        {
            "model": fields.model if isinstance(fields.model, str) else served.name,
            "object": "list",
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
            "results": results,
        }
    )


def _sort_key(score: float) -> float:
    return math.inf if math.isnan(score) else -score
