"""Watch one item until it comes to rest: by the event socket, and by asking when that says nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Final

from wingman.commands.api import Api, EventsRefused, Message

POLL_S: Final = 0.5


def follow(
    api: Api,
    event: str,
    is_ours: Callable[[Message], bool],
    fetch: Callable[[], Message],
    sleep: Callable[[float], None] = time.sleep,
) -> Generator[Message, None, None]:
    """The item now and after each change, until it is closed. Raises what `fetch` raises, as when the server
    is gone."""
    try:
        with api.events((event,)) as messages:
            yield fetch()
            for message in messages:
                if message is None:
                    yield fetch()
                elif message.get("event") == event and is_ours(message):
                    yield message
    except EventsRefused:
        pass
    while True:
        yield fetch()
        sleep(POLL_S)
