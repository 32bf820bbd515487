"""Wingman's decode loop without scheduler and server, for comparison with llama-batched-bench.

Takes the flags of that program and prints its `speed_tg`: tokens per second of all sequences
together while each step decodes one token of each. Greedy sampling is part of a step here, as it
is of every step of a server; llama-batched-bench decodes random tokens and samples none.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from wingman.config import ContextConfig, ModelConfig, SamplingParams
from wingman.engine.llama.runner import LlamaRunner
from wingman.engine.runner import Batch, Chunk, SamplerStart

_N_WARM_UP = 2


def decode(runner: LlamaRunner, n_sequences: int, n_prompt: int, n_steps: int) -> float:
    """Tokens per second of `n_sequences` at once, after prompts of `n_prompt` tokens."""
    tokens = runner.tokenizer.tokenize(" the" * n_prompt, add_special=False, parse_special=False)[:n_prompt]
    params = SamplingParams(temperature=0.0)
    starts = tuple(SamplerStart(slot, params, tokens) for slot in range(n_sequences))
    sampled: Mapping[int, Sequence[int]] = {}
    for slot, start in enumerate(starts):
        prompt = Chunk(slot, slot, tokens, 0, wants_sample=True)
        sampled = {**sampled, **_step(runner, Batch((), (start,), (prompt,), 0.0))}
    started = 0.0
    for step in range(n_steps + _N_WARM_UP):
        if step == _N_WARM_UP:
            started = time.perf_counter()
        position = len(tokens) + step
        chunks = (
            Chunk(slot, slot, tokens[-1:], position, wants_sample=True) for slot, tokens in sampled.items()
        )
        sampled = _step(runner, Batch((), (), tuple(chunks), 0.0))
    return n_sequences * n_steps / (time.perf_counter() - started)


def _step(runner: LlamaRunner, batch: Batch) -> Mapping[int, Sequence[int]]:
    runner.prepare(batch)
    return runner.run(batch).tokens


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = build_parser().parse_args(argv)
    context = ContextConfig(ctx_size=options.c, parallel=options.npl, threads=options.t)
    runner = LlamaRunner(ModelConfig(model=options.model), context)
    try:
        speed = decode(runner, options.npl, options.npp, options.ntg)
    finally:
        runner.close()
    print(json.dumps({"pl": options.npl, "speed_tg": speed}))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_decode", description=__doc__)
    parser.add_argument("-m", dest="model", type=Path, required=True, metavar="FILE", help="GGUF file")
    parser.add_argument("-c", type=int, default=4096, metavar="N", help="context in tokens")
    parser.add_argument("-t", type=int, default=0, metavar="N", help="threads; 0: the cores of this machine")
    parser.add_argument("-npp", type=int, default=64, metavar="N", help="tokens of a prompt")
    parser.add_argument("-ntg", type=int, default=64, metavar="N", help="steps")
    parser.add_argument("-npl", type=int, default=8, metavar="N", help="sequences")
    parser.add_argument("--output-format", choices=("jsonl",), default="jsonl", help="always jsonl")
    return parser


if __name__ == "__main__":
    sys.exit(main())
