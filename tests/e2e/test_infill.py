"""Fill in the middle: the order of its tokens is read from the prompt that answers show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.events import read_events
from tests.support.server import ServerProcess
from tools.tinymodel import write_llama

PRE, SUF, MID = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"
REPO, FILE = "<|repo_name|>", "<|file_sep|>"
FILES = [{"filename": "a.py", "text": "one"}, {"text": "two"}]
Start = Callable[..., ServerProcess]


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Iterator[ServerProcess]:
    with ServerProcess(["--model", str(tiny_model), "-np", "2", "-c", "1024", "-b", "256"]) as process:
        yield process


def ask(server: ServerProcess, **fields: Any) -> dict[str, Any]:
    body = {"input_prefix": "the", "input_suffix": "world", "n_predict": 4, "temperature": 0} | fields
    response = server.post("/infill", body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def squeezed(text: str) -> str:
    """Without the spaces that the vocabulary puts before words."""
    return text.replace(" ", "")


def shown(server: ServerProcess, **fields: Any) -> str:
    return squeezed(ask(server, **fields)["prompt"])


def test_order(tiny: ServerProcess) -> None:
    assert shown(tiny) == f"<s>{PRE}the{SUF}world{MID}"
    assert shown(tiny, prompt="people") == f"<s>{PRE}thepeople{SUF}world{MID}"
    assert shown(tiny, prompt=["people"]) == f"<s>{PRE}thepeople{SUF}world{MID}"
    assert shown(tiny, input_prefix="", input_suffix="") == f"<s>{PRE}{SUF}{MID}"


def test_the_answer_is_native(tiny: ServerProcess) -> None:
    body = ask(tiny, return_tokens=True)
    assert body["stop"] is True
    assert len(body["tokens"]) == body["tokens_predicted"]
    tokens = tiny.post("/tokenize", {"content": f"{PRE} the{SUF} world{MID}", "add_special": True})
    same = tiny.complete(tokens.json()["tokens"], n_predict=4)
    assert squeezed(same["prompt"]) == squeezed(body["prompt"])


def test_a_completion_of_the_same_tokens_is_the_same(tiny: ServerProcess) -> None:
    def tokens(text: str) -> list[int]:
        return list(tiny.post("/tokenize", {"content": text}).json()["tokens"])

    prompt = [tokens("<s>")[0], *tokens(PRE), *tokens("the"), *tokens(SUF), *tokens("world"), *tokens(MID)]
    prompt = [
        token for token in prompt if tiny.post("/detokenize", {"tokens": [token]}).json()["content"] != " "
    ]
    same = tiny.complete(prompt, n_predict=12, return_tokens=True)
    assert same["tokens_evaluated"] == ask(tiny)["tokens_evaluated"]
    assert same["tokens"] == ask(tiny, n_predict=12, return_tokens=True)["tokens"]


def test_stream(tiny: ServerProcess) -> None:
    whole = ask(tiny, n_predict=10)
    body = {"input_prefix": "the", "input_suffix": "world", "n_predict": 10, "temperature": 0}
    events = read_events(tiny, "/infill", body)
    assert "".join(event["content"] for event in events) == whole["content"]
    assert events[-1]["prompt"] == whole["prompt"]


def test_sides_may_be_tokens(tiny: ServerProcess) -> None:
    tokens = tiny.post("/tokenize", {"content": "the"}).json()["tokens"]
    assert (
        shown(tiny, input_prefix=tokens, input_suffix=[*tokens, "world"]) == f"<s>{PRE}the{SUF}theworld{MID}"
    )


def test_special_texts_in_the_sides_are_plain(tiny: ServerProcess) -> None:
    body = ask(tiny, input_prefix=MID)
    (middle,) = tiny.post("/tokenize", {"content": MID}).json()["tokens"]
    assert middle >= 0
    assert body["tokens_evaluated"] > ask(tiny, input_prefix="")["tokens_evaluated"] + 5


def test_long_sides_are_cut_to_a_batch(tiny: ServerProcess) -> None:
    body = ask(
        tiny, input_prefix="first " + "the " * 2000 + "last", input_suffix="first " + "the " * 2000 + "last"
    )
    prefix, suffix = body["prompt"].removeprefix(f"<s>{PRE}").split(SUF)
    assert "first" not in prefix
    assert prefix.rstrip().endswith("last")
    assert suffix.lstrip().startswith("first")
    assert "last" not in suffix
    assert body["tokens_evaluated"] == 1 + 1 + 192 + 1 + 62 + 1


def test_other_files_as_snippets(tiny: ServerProcess) -> None:
    prompt = ask(tiny, input_extra=FILES)["prompt"]
    assert prompt.count("--- snippet ---") == 2
    assert prompt.index("one") < prompt.index("two") < prompt.index(PRE)


def test_other_files_in_the_layout_of_repositories(start_server: Start, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "repo.gguf", knows_repositories=True)
    server = start_server("-np", "2", "-c", "1024", "-b", "256", model=model)
    expected = f"{REPO}myproject\n{FILE}a.py\none{FILE}tmp\ntwo{FILE}filename\n{PRE}the{SUF}world{MID}"
    assert shown(server, input_extra=FILES) == f"<s>{expected}"
    assert shown(server) == f"<s>{REPO}myproject\n{FILE}filename\n{PRE}the{SUF}world{MID}"
    long = shown(server, input_extra=[{"filename": "long.py", "text": "work " * 3000}])
    assert REPO not in long
    assert long.endswith(f"{FILE}filename\n{PRE}the{SUF}world{MID}")


def test_spm_infill(start_server: Start, tiny_model: Path) -> None:
    server = start_server("-np", "2", "--spm-infill", model=tiny_model)
    assert shown(server, prompt="people") == f"<s>{SUF}world{PRE}thepeople{MID}"


def test_ids_can_be_given_to_a_model_without(start_server: Start, server: ServerProcess) -> None:
    refused = server.post("/infill", {"nonsense": 1})
    assert refused.status_code == 501
    assert refused.headers["x-should-retry"] == "false"
    text_refused = server.post("/v1/completions", {"prompt": "a", "suffix": "b"})
    assert text_refused.status_code == 400
    assert "suffix" in text_refused.json()["error"]["message"]
    marks = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    ids = [server.post("/tokenize", {"content": mark}).json()["tokens"][0] for mark in marks]
    keys = [f"tokenizer.ggml.fim_{name}_token_id" for name in ("pre", "suf", "mid")]
    flags = ",".join(f"{key}=int:{token}" for key, token in zip(keys, ids, strict=True))
    own = start_server("-np", "2", "-c", "2048", "--override-kv", flags)
    body = ask(own, input_prefix="def add(a, b):\n", input_suffix="\n    return c\n")
    assert body["prompt"] == f"{marks[0]}def add(a, b):\n{marks[1]}\n    return c\n{marks[2]}"


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"input_prefix": None}, "input_prefix"),
        ({"input_suffix": None}, "input_suffix"),
        ({"input_prefix": 5}, "input_prefix"),
        ({"input_suffix": {"a": 1}}, "input_suffix"),
        ({"input_prefix": [10**9]}, "input_prefix"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"input_extra": {}}, "input_extra"),
        ({"input_extra": ["text"]}, "input_extra[0]"),
        ({"input_extra": [{"text": "a"}, {"filename": "b"}]}, "input_extra[1].text"),
        ({"input_extra": [{"text": 5}]}, "input_extra[0].text"),
        ({"input_extra": [{"text": "a", "filename": 5}]}, "input_extra[0].filename"),
        ({"input_extra": [{"text": "a"}] * 2000}, "input_extra"),
    ],
)
def test_refusals(tiny: ServerProcess, fields: dict[str, Any], where: str) -> None:
    response = tiny.post("/infill", {"input_prefix": "a", "input_suffix": "b", "n_predict": 1} | fields)
    assert response.status_code == 400, response.text
    assert where in response.json()["error"]["message"]


def test_suffix_of_text_completions(tiny: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(
            model="x", prompt="the", suffix="world", max_tokens=6, temperature=0
        )
        assert answer.choices[0].text == ask(tiny, n_predict=6)["content"]
        assert squeezed(answer.model_extra["prompt"]) == f"<s>{PRE}the{SUF}world{MID}"
        chunks = client.completions.create(
            model="x", prompt="the", suffix="world", max_tokens=6, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
        for fields in ({"prompt": ["a", "b"], "suffix": "c"}, {"prompt": "a", "suffix": ["c"]}):
            with pytest.raises(openai.BadRequestError):
                client.completions.create(model="x", max_tokens=1, **fields)  # type: ignore[call-overload]
