"""The benchmark's workloads: prompts, the table, and turns against a fake server."""

from __future__ import annotations

import json
import socketserver
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.tools.test_bench_load import PLAIN, Answer, event, fake_server
from tests.tools.test_bench_serve import settings
from tools import bench_turns
from tools.bench_load import LoadFailure
from tools.bench_prompts import copying_prompts, make_prompts, questions, shared_prompts
from tools.bench_report import COLUMNS
from tools.bench_serve import BenchFailure, Contender
from tools.bench_servers import RunningServer
from tools.bench_turns import Turn
from tools.bench_workloads import WORKLOADS


class TestPrompts:
    def test_prompts(self) -> None:
        prompts = make_prompts("1/a", 3, 4, n_words=20)
        assert prompts == make_prompts("1/a", 3, 4, n_words=20)
        flat = {prompt for own in prompts + make_prompts("1/b", 3, 4, n_words=20) for prompt in own}
        assert len(flat) == 24
        assert all(len(prompt.split()) == 20 for prompt in flat)

    def test_shared_prompts_begin_alike_within_a_round_only(self) -> None:
        prompts = shared_prompts("1/a", 8)
        assert len(set(prompts)) == 8
        beginnings = {prompt.split("\n\n")[0] for prompt in prompts}
        assert [len(beginning.split()) for beginning in beginnings] == [240]
        assert not beginnings & {prompt.split("\n\n")[0] for prompt in shared_prompts("1/b", 8)}
        assert all(20 <= len(prompt.split("\n\n")[1].split()) <= 30 for prompt in prompts)

    def test_questions(self) -> None:
        asked = questions("1", 4, 3)
        assert [len(talk) for talk in asked] == [3] * 4
        assert len({question for talk in asked for question in talk}) == 12

    def test_copying_prompts_hold_their_answer(self) -> None:
        for prompt in (prompt for own in copying_prompts("1", 2, 2) for prompt in own):
            begun = prompt.rpartition("\n\n")[2].removeprefix("Once more: ")
            assert prompt.count(begun) >= 2


class TestTable:
    @pytest.mark.parametrize("name", WORKLOADS)
    def test_rows(self, name: str) -> None:
        workload = WORKLOADS[name]
        assert set(workload.columns) <= COLUMNS.keys()
        assert 1 <= workload.n_key <= len(workload.columns)
        fitted = workload.fit(settings())
        assert fitted.levels
        assert fitted.n_ctx >= fitted.n_slots * 64


def answer_everything(seen: list[Any]) -> Answer:
    """Completions of eight words and embeddings of nothing."""

    def answer(handler: socketserver.StreamRequestHandler, body: bytes) -> None:
        request = json.loads(body)
        seen.append(request)
        if "input" in request:
            data = json.dumps({"data": [{} for _ in request["input"]]}).encode()
            handler.wfile.write(
                PLAIN.replace(b"\r\n\r\n", b"\r\nContent-Length: %d\r\n\r\n" % len(data)) + data
            )
            return
        timings = {"prompt_n": 5, "cache_n": 2}
        end = event("", stop=True, tokens_evaluated=7, tokens_predicted=8, timings=timings)
        handler.wfile.write(PLAIN + b"".join(event(f" w{number}") for number in range(8)) + end)

    return answer


def turn(port: int, n_clients: int, n_servers: int = 1) -> Turn:
    server = cast(RunningServer, SimpleNamespace(port=port, rss_mib=lambda: 1.0))
    return Turn(Contender("fake", ()), (server,) * n_servers, settings(n_requests=1), 1, n_clients)


class TestTurns:
    @pytest.mark.parametrize("name", sorted(WORKLOADS.keys() - {"start", "batched"}))
    def test_each_gives_its_numbers(self, name: str) -> None:
        seen: list[Any] = []
        workload = WORKLOADS[name]
        with fake_server(answer_everything(seen)) as port:
            outcome = workload.take(turn(port, 4, workload.n_servers))
        assert set(workload.columns) <= outcome.numbers.keys()
        assert all(value > 0 for column, value in outcome.numbers.items() if "gap" not in column)

    def test_conversations_hold_what_was_said(self) -> None:
        seen: list[Any] = []
        with fake_server(answer_everything(seen)) as port:
            outcome = bench_turns.take_conversations(turn(port, 4))
        prompts = [request["prompt"] for request in seen]
        assert [prompt.count("User:") for prompt in prompts] == [1] * 24 + [2] * 24 + [3] * 24
        assert all(prompt.count("Assistant: w0 w1") == 2 for prompt in prompts[48:])
        assert outcome.numbers["n_evaluated"] == 5 * 72
        assert outcome.numbers["n_cached"] == 2 * 72

    def test_a_long_prompt_comes_last(self) -> None:
        seen: list[Any] = []
        with fake_server(answer_everything(seen)) as port:
            outcome = bench_turns.take_long(turn(port, 4))
        assert [len(request["prompt"].split()) for request in seen] == [60, 60, 60, 1500]
        assert len(outcome.exchanges) == 4

    def test_a_refusal_of_embeddings(self) -> None:
        def refuse(handler: socketserver.StreamRequestHandler, _: bytes) -> None:
            handler.wfile.write(b"HTTP/1.1 501 No\r\nContent-Length: 2\r\n\r\n{}")

        with fake_server(refuse) as port, pytest.raises(LoadFailure, match="501"):
            bench_turns.take_embeddings(turn(port, 1))

    def test_a_decoder_without_result(self, tmp_path: Path) -> None:
        silent = tmp_path / "silent.py"
        silent.write_text("")
        contender = Contender("silent", (), (), (sys.executable, str(silent)))
        with pytest.raises(BenchFailure, match="silent does not decode"):
            bench_turns.take_batched(Turn(contender, (), settings(), 1, 8))

    def test_a_decoder(self, tmp_path: Path) -> None:
        fast = tmp_path / "fast.py"
        fast.write_text(
            "import json, sys; print(json.dumps({'speed_tg': sys.argv.index('-npl')}), end='\\n\\n')"
        )
        contender = Contender("fast", (), (), (sys.executable, str(fast)))
        outcome = bench_turns.take_batched(Turn(contender, (), settings(), 1, 8))
        assert outcome.numbers["tokens_per_s"] > 0
