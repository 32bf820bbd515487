"""POST /tokenize and /detokenize. Both run in the engine's executor."""

from __future__ import annotations

from typing import Any

import orjson

from wingman.api.schema import DetokenizeRequest, TokenizeRequest, parse_body
from wingman.engine.runner import Tokenizer
from wingman.errors import InvalidRequest
from wingman.http.messages import Request, Response
from wingman.services.served import ServedModel


async def tokenize(served: ServedModel, request: Request) -> Response:
    """Text, or a mix of texts and token ids, -> token ids, with their pieces if asked for."""
    fields = await parse_body(request.body, TokenizeRequest)
    return Response(200, await served.engine.work(len(request.body), _tokenize, served, fields))


def _tokenize(served: ServedModel, fields: TokenizeRequest) -> bytes:
    tokenizer = served.engine.tokenizer
    parse_special = fields.parse_special is not False
    content = [fields.content] if isinstance(fields.content, str) else fields.content or []
    tokens: list[int] = []
    for index, part in enumerate(content):
        if isinstance(part, int):
            tokens.append(_known(part, served, f"content[{index}]"))
        else:
            tokens += tokenizer.tokenize(part, bool(fields.add_special) and index == 0, parse_special)
    if not fields.with_pieces:
        return orjson.dumps({"tokens": tokens})
    return orjson.dumps({"tokens": [_with_piece(token, tokenizer) for token in tokens]})


def _with_piece(token: int, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.piece(token, special=True)
    try:
        return {"id": token, "piece": data.decode("utf-8")}
    except UnicodeDecodeError:
        return {"id": token, "piece": list(data)}


async def detokenize(served: ServedModel, request: Request) -> Response:
    """Token ids -> text, special tokens included."""
    fields = await parse_body(request.body, DetokenizeRequest)
    return Response(200, await served.engine.work(len(request.body), _detokenize, served, fields))


def _detokenize(served: ServedModel, fields: DetokenizeRequest) -> bytes:
    tokenizer = served.engine.tokenizer
    tokens = [_known(token, served, f"tokens[{index}]") for index, token in enumerate(fields.tokens or [])]
    data = b"".join(tokenizer.piece(token, special=True) for token in tokens)
    return orjson.dumps({"content": data.decode("utf-8", "replace")})


def _known(token: int, served: ServedModel, where: str) -> int:
    if not 0 <= token < served.info.n_vocab:
        raise InvalidRequest(f"Field '{where}': {token} is no token id of this model", where)
    return token
