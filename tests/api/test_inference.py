"""Parameters of a start."""

import pytest

from wingman.api.inference import read_start
from wingman.errors import InvalidRequest

MODEL = {"alias": "a", "modelRepo": "own/repo", "filePath": "m.gguf"}


@pytest.mark.parametrize("address", ["", "127.0.0.1", "::1", "localhost", "box.example"])
def test_a_model_may_listen_at_an_address_or_a_name(address: str) -> None:
    assert read_start({**MODEL, "address": address}).address == address


@pytest.mark.parametrize("address", ["x.sock", "/x.sock", "a b", "-a", "a" * 300, "[::1]", "127.0.0.1:80"])
def test_and_nowhere_else(address: str) -> None:
    with pytest.raises(InvalidRequest):
        read_start({**MODEL, "address": address})
