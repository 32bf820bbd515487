"""Embeddings and ranking on the real model and on tiny encoders."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openai
import pytest

from tests.support.events import read_events
from tests.support.server import ServerProcess
from tools.tinymodel import write_bert

Vector = npt.NDArray[np.float32]
TEXTS = ["The cat sits on the mat.", "A dog runs in the park.", "Quarterly revenue rose by 4 %."]
N_DIMS = 576


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = write_bert(tmp_path_factory.mktemp("bert") / "tiny.gguf")
    with ServerProcess(["--model", str(model)]) as process:
        yield process


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = write_bert(tmp_path_factory.mktemp("rank") / "tiny.gguf", pooling="rank")
    with ServerProcess(["--model", str(model), "--reranking", "--alias", "judge"]) as process:
        yield process


def embed(server: ServerProcess, value: Any, **fields: Any) -> list[Vector]:
    """Vectors of OpenAI's form, in the order of the inputs."""
    response = server.post("/v1/embeddings", {"input": value} | fields)
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    assert {item["object"] for item in data} == {"embedding"}
    return [np.array(item["embedding"], np.float32) for item in data]


def refusal(server: ServerProcess, path: str, status: int = 400, **body: Any) -> str:
    response = server.post(path, body)
    assert response.status_code == status, response.text
    return str(response.json()["error"]["message"])


class TestForms:
    def test_similar_texts_are_close(self, server: ServerProcess) -> None:
        cat, kitten, money = embed(server, ["The cat sat.", "The kitten sat.", "Stock markets fell."])
        assert cat.shape == (N_DIMS,)
        assert cat @ kitten > cat @ money
        assert np.linalg.norm(cat) == pytest.approx(1, abs=1e-5)

    def test_inputs_of_every_kind_are_the_same(self, server: ServerProcess) -> None:
        tokens = server.post("/tokenize", {"content": TEXTS[0]}).json()["tokens"]
        (expected,) = embed(server, TEXTS[0])
        forms: list[Any] = [
            [TEXTS[0]], tokens, [tokens], {"prompt_string": TEXTS[0]}, [{"prompt_string": TEXTS[0]}],
            {"content": [{"type": "text", "text": TEXTS[0]}]}, [tokens[0], TEXTS[0].removeprefix("The")],
        ]  # fmt: skip
        for form in forms:
            (found,) = embed(server, form)
            assert np.allclose(found, expected, atol=1e-4), form

    def test_order(self, server: ServerProcess) -> None:
        together = embed(server, [*TEXTS, TEXTS[0]])
        for text, found in zip(TEXTS, together, strict=False):
            assert np.allclose(found, embed(server, text)[0], atol=1e-4)
        assert np.allclose(together[3], together[0], atol=1e-4)
        assert not np.allclose(together[0], together[1], atol=1e-2)

    def test_the_package(self, client: openai.OpenAI) -> None:
        answer = client.embeddings.create(model="any", input=TEXTS)  # asks for base64
        plain = client.embeddings.create(model="any", input=TEXTS, encoding_format="float")
        for one, other in zip(answer.data, plain.data, strict=True):
            assert np.array_equal(np.float32(one.embedding), np.float32(other.embedding))
        assert answer.model == "any"
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 10

    def test_base64(self, server: ServerProcess) -> None:
        body = {"input": TEXTS[:2], "encoding_format": "base64"}
        items = server.post("/v1/embeddings", body).json()["data"]
        for item, expected in zip(items, embed(server, TEXTS[:2]), strict=True):
            assert item["encoding_format"] == "base64"
            assert np.array_equal(np.frombuffer(base64.b64decode(item["embedding"]), "<f4"), expected)

    def test_usage_counts_tokens(self, server: ServerProcess) -> None:
        counts = [len(server.post("/tokenize", {"content": text}).json()["tokens"]) for text in TEXTS]
        body = server.post("/v1/embeddings", {"input": TEXTS}).json()
        assert body["usage"] == {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}
        assert body["object"] == "list"
        assert body["model"] == "smol"

    def test_native_form(self, server: ServerProcess) -> None:
        expected = embed(server, TEXTS)
        for path, body in (
            ("/embedding", {"content": TEXTS}),
            ("/embedding", {"input": TEXTS}),
            ("/embeddings", {"content": TEXTS}),
            ("/v1/embeddings", {"content": TEXTS}),
        ):
            items = server.post(path, body).json()
            assert [item["index"] for item in items] == [0, 1, 2]
            for item, vector in zip(items, expected, strict=True):
                assert np.allclose(item["embedding"], [vector], atol=1e-4)
        assert server.post("/embeddings", {"input": "a"}).json()["object"] == "list"


class TestScaling:
    def test_norms(self, server: ServerProcess) -> None:
        (raw,) = embed(server, TEXTS[0], embd_normalize=-1)
        wide = raw.astype(np.float64)
        expected = {
            0: wide / np.abs(wide).max() * 32760,
            1: wide / np.abs(wide).sum(),
            2: wide / np.linalg.norm(wide),
            3: wide / np.linalg.norm(wide, 3),
        }
        for norm, vector in expected.items():
            assert np.allclose(embed(server, TEXTS[0], embd_normalize=norm)[0], vector, rtol=1e-3, atol=1e-5)
        assert np.array_equal(embed(server, TEXTS[0])[0], embed(server, TEXTS[0], embd_normalize=2)[0])
        assert np.linalg.norm(raw) > 2

    def test_dimensions(self, server: ServerProcess) -> None:
        (whole,) = embed(server, TEXTS[0])
        (cut,) = embed(server, TEXTS[0], dimensions=64)
        assert cut.shape == (64,)
        assert np.allclose(cut, whole[:64] / np.linalg.norm(whole[:64]), atol=1e-4)
        for bad in (0, -1, N_DIMS + 1, "64"):
            assert "dimensions" in refusal(server, "/v1/embeddings", input="a", dimensions=bad)
        assert embed(server, "a", dimensions=N_DIMS)[0].shape == (N_DIMS,)


class TestRefusals:
    @pytest.mark.parametrize(
        ("value", "where"),
        [
            (None, "input"),
            ([], "input"),
            (5, "input"),
            (True, "input"),
            ({}, "input"),
            ([[]], "input"),
            (["a", []], "input[1]"),
            (["a", None], "input[1]"),
            (["a", {"x": 1}], "input[1]"),
            ([[1, 10**9]], "input"),
            ([-1], "input"),
            (["a", [1.5]], "input[1]"),
            ("", "input"),
            (["a", ""], "input[1]"),
        ],
    )
    def test_the_item_is_named(self, server: ServerProcess, value: Any, where: str) -> None:
        assert where in refusal(server, "/v1/embeddings", input=value)

    def test_fields(self, server: ServerProcess) -> None:
        assert "encoding_format" in refusal(server, "/v1/embeddings", input="a", encoding_format="hex")
        assert "embd_normalize" in refusal(server, "/v1/embeddings", input="a", embd_normalize=-2)
        assert "input" in refusal(server, "/v1/embeddings")

    def test_too_long(self, server: ServerProcess, bert: ServerProcess) -> None:
        assert "input[1]" in refusal(server, "/v1/embeddings", input=["a", "word " * 5000])
        message = refusal(bert, "/v1/embeddings", input=["hello", "word " * 200])
        assert "input[1]" in message
        assert "too large" in message or "context size" in message

    def test_too_many(self, server: ServerProcess) -> None:
        assert "--max-embed-inputs" in refusal(server, "/v1/embeddings", input=["a"] * 5000)

    def test_rank_needs_a_model_that_ranks(self, server: ServerProcess) -> None:
        refusal(server, "/rerank", 501, query="a", documents=["b"])


class TestTogether:
    def test_beside_a_running_chat(self, server: ServerProcess) -> None:
        body = {"messages": [{"role": "user", "content": "Write a long story."}], "temperature": 0}
        body |= {"max_tokens": 100, "ignore_eos": True}
        expected = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
        (before,) = embed(server, TEXTS[0])
        texts: list[str] = []

        def listen() -> None:
            events = read_events(server, "/v1/chat/completions", body)
            texts.append("".join(event["choices"][0]["delta"].get("content") or "" for event in events))

        listener = threading.Thread(target=listen)
        listener.start()
        for _ in range(6):
            assert np.allclose(embed(server, TEXTS)[0], before, atol=1e-4)
        listener.join()
        assert texts == [expected]

    def test_many_clients(self, bert: ServerProcess) -> None:
        texts = [f"hello {index} " + "people " * (index * 7 % 40) for index in range(24)]
        expected = [embed(bert, text)[0] for text in texts]
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda text: embed(bert, [text, "the world"]), texts))
        for one, vectors in zip(expected, found, strict=True):
            assert np.allclose(vectors[0], one, atol=1e-3)
        assert all(np.allclose(vectors[1], found[0][1], atol=1e-3) for vectors in found)

    def test_a_big_request_goes_in_several_batches(self, server: ServerProcess) -> None:
        texts = [f"{index} " + "filler " * 30 for index in range(70)]
        vectors = embed(server, texts)
        assert len(vectors) == 70
        for index in (0, 42, 69):  # weights of 4 bits round differently in batches of other shapes
            assert vectors[index] @ embed(server, texts[index])[0] > 0.999

    def test_a_client_that_leaves(self, server: ServerProcess) -> None:
        with pytest.raises(Exception, match="timed out"):
            server.client.post("/v1/embeddings", json={"input": ["word " * 500] * 200}, timeout=0.3)
        assert len(embed(server, "a")[0]) == N_DIMS


class TestBert:
    def test_embeds(self, bert: ServerProcess) -> None:
        one, other = embed(bert, ["hello world", "people like work"])
        assert one.shape == (64,)
        assert not np.allclose(one, other, atol=1e-2)
        assert np.allclose(embed(bert, "hello world")[0], one, atol=1e-4)

    def test_does_not_generate(self, bert: ServerProcess) -> None:
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        for path, body in (
            ("/v1/chat/completions", chat),
            ("/completion", {"prompt": "hi"}),
            ("/v1/completions", {"prompt": "hi"}),
        ):
            for stream in (False, True):
                response = bert.post(path, body | {"stream": stream})
                assert response.status_code == 501, response.text
                assert response.headers["x-should-retry"] == "false"
        assert bert.get("/v1/models").json()["models"][0]["capabilities"] == ["embedding"]

    @pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
    def test_poolings_by_flag(
        self, start_server: Callable[..., ServerProcess], tmp_path: Path, bert: ServerProcess, pooling: str
    ) -> None:
        server = start_server("--pooling", pooling, model=write_bert(tmp_path / "tiny.gguf"))
        is_same = np.allclose(embed(server, "hello world")[0], embed(bert, "hello world")[0], atol=1e-4)
        assert is_same == (pooling == "mean")


class TestUnpooled:
    def test_tokens_have_vectors_of_their_own(
        self, start_server: Callable[..., ServerProcess], tmp_path: Path, bert: ServerProcess
    ) -> None:
        server = start_server("--pooling", "none", model=write_bert(tmp_path / "tiny.gguf"))
        for path in ("/embedding", "/embeddings"):
            one, other = server.post(path, {"input": ["hello world", "the people"]}).json()
            assert (one["index"], other["index"]) == (0, 1)
            matrix = np.array(one["embedding"])
            assert matrix.shape == (4, 64)  # [CLS] hello world [SEP]
            mean = matrix.mean(axis=0)
            (pooled,) = embed(bert, "hello world")
            assert np.allclose(mean / np.linalg.norm(mean), pooled, atol=1e-4)
        assert "pooling" in refusal(server, "/v1/embeddings", input="hello")


class TestRank:
    DOCUMENTS = ["the people", "hello world", "work like time", "other day"]

    def ranked(self, ranker: ServerProcess, **fields: Any) -> Any:
        response = ranker.post("/v1/rerank", {"query": "hello"} | fields)
        assert response.status_code == 200, response.text
        return response.json()

    def test_best_first(self, ranker: ServerProcess) -> None:
        body = self.ranked(ranker, documents=self.DOCUMENTS)
        scores = [result["relevance_score"] for result in body["results"]]
        assert scores == sorted(scores, reverse=True)
        assert sorted(result["index"] for result in body["results"]) == [0, 1, 2, 3]
        assert len(set(scores)) == 4
        assert (body["object"], body["model"]) == ("list", "judge")
        assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 4 * 4

    def test_a_score_depends_on_its_document_and_query_alone(self, ranker: ServerProcess) -> None:
        scores = {
            one["index"]: one["relevance_score"]
            for one in self.ranked(ranker, documents=self.DOCUMENTS)["results"]
        }
        for index, document in enumerate(self.DOCUMENTS):
            (alone,) = self.ranked(ranker, documents=[document])["results"]
            assert alone["relevance_score"] == pytest.approx(scores[index], abs=1e-4)
        (other,) = self.ranked(ranker, documents=[self.DOCUMENTS[0]], query="world time")["results"]
        assert other["relevance_score"] != pytest.approx(scores[0], abs=1e-4)

    def test_top_n(self, ranker: ServerProcess) -> None:
        everything = self.ranked(ranker, documents=self.DOCUMENTS)["results"]
        for top_n, expected in ((2, 2), (4, 4), (9, 4)):
            found = self.ranked(ranker, documents=self.DOCUMENTS, top_n=top_n)["results"]
            assert [one["index"] for one in found] == [one["index"] for one in everything[:expected]]

    def test_tei_form(self, ranker: ServerProcess) -> None:
        results = self.ranked(ranker, texts=self.DOCUMENTS, return_text=True)
        assert [result["text"] for result in results] == [
            self.DOCUMENTS[result["index"]] for result in results
        ]
        jina = self.ranked(ranker, documents=self.DOCUMENTS)["results"]
        assert [result["score"] for result in results] == pytest.approx(
            [one["relevance_score"] for one in jina], abs=1e-4
        )
        assert set(self.ranked(ranker, texts=["a"])[0]) == {"index", "score"}

    @pytest.mark.parametrize("path", ["/rerank", "/reranking", "/v1/rerank", "/v1/reranking"])
    def test_refusals(self, ranker: ServerProcess, path: str) -> None:
        assert "query" in refusal(ranker, path, documents=["a"])
        assert "documents" in refusal(ranker, path, query="a")
        assert "documents" in refusal(ranker, path, query="a", documents=[])
        assert "documents" in refusal(ranker, path, query="a", documents=["a", 5])

    @pytest.mark.parametrize("n_words", [60, 300, 30_000])
    def test_a_long_item_is_named(self, ranker: ServerProcess, bert: ServerProcess, n_words: int) -> None:
        long = "word " * n_words
        assert "documents[1]" in refusal(ranker, "/rerank", query="a", documents=["a", long])
        assert "input[1]" in refusal(bert, "/v1/embeddings", input=["a", long])

    def test_a_ranker_has_no_embeddings(self, ranker: ServerProcess) -> None:
        refusal(ranker, "/v1/embeddings", 501, input="a")
        refusal(ranker, "/completion", 501, prompt="a")
