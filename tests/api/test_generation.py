"""Generation fields of requests as the engine takes them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from wingman.api.generation import read_drafting
from wingman.api.schema import GenerationFields
from wingman.config import ContextConfig
from wingman.engine.types import DraftKind
from wingman.errors import InvalidRequest

WITH_DRAFT = ContextConfig(model_draft=Path("draft.gguf"))


def wants(kind: str | None) -> GenerationFields:
    return msgspec.convert({"speculative.type": kind}, GenerationFields)


def test_a_draft_model_is_asked_only_where_there_is_one() -> None:
    assert read_drafting(wants("draft-simple"), WITH_DRAFT).kind is DraftKind.MODEL
    assert read_drafting(wants(None), ContextConfig()).kind is DraftKind.AUTO
    for kind in ("draft-simple", "nonsense"):
        with pytest.raises(InvalidRequest) as caught:
            read_drafting(wants(kind), ContextConfig())
        assert caught.value.field == "speculative.type"
