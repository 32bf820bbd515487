"""Messages of any form are read or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from wingman.chat.conversation import read_messages
from wingman.errors import InvalidRequest


@pytest.mark.parametrize("kind", [[], {}, None, 5, "smell"])
def test_a_part_of_unknown_type_is_refused(kind: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_messages([{"role": "user", "content": [{"type": kind, "text": "a"}]}], knows_developer=False)
    assert caught.value.field == "messages[0].content[0].type"


def test_text_parts_are_joined_by_lines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    (message,) = read_messages([{"role": "user", "content": parts}], knows_developer=False)
    assert message["content"] == "a\nb"
