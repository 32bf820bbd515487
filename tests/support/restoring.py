"""Restores changed slot files in a process of its own, for what native code does to it can't be caught.

`python -m tests.support.restoring MODEL SEED COUNT FLAG...`: ends with 0 and a line of counts when every slot was
empty or usable afterwards. Flags: `unified`, `no-flash`.
"""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path

from tests.support.runner import compute
from wingman.config import ContextConfig, ModelConfig, SamplingParams
from wingman.engine.llama.runner import LlamaRunner
from wingman.engine.runner import Batch, Chunk, KvRemove, SamplerStart
from wingman.errors import InvalidRequest
from wingman.services.slotfiles import SavedSlot, fingerprint, pack, unpack

TOKENS = tuple(range(300, 312))
N_HEAD_BYTES = 240
"""Where counts, positions and sizes are; most changes go there."""
N_END_BYTES = 72
"""The mark, the digest and the fingerprint that only Wingman writes."""
WORDS = tuple(
    struct.pack("<I", word) for word in (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 2, 255, 256, 65536)
)


def change(data: bytes, rng: random.Random) -> bytes:
    """A few edits."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        changed = changed or bytearray(1)
        near = rng.random() < 0.6
        at = rng.randrange(min(len(changed), N_HEAD_BYTES) if near else len(changed))
        edit = rng.choice((0, 0, 0, 0, 1, 1, 1, 1, 2, 3, 4))
        if edit == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif edit == 1:
            changed[at & ~3 : (at & ~3) + 4] = rng.choice(WORDS)
        elif edit == 2:
            del changed[at : at + rng.randrange(1, 20)]
        elif edit == 3:
            changed[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            del changed[max(at, 1) :]
    return bytes(changed)


def step(runner: LlamaRunner, slot: int, tokens: tuple[int, ...], position: int) -> int:
    """Add tokens to a slot; the one that follows."""
    start = SamplerStart(slot, SamplingParams(temperature=0.0), ())
    chunk = Chunk(slot, 1, tokens, position, wants_sample=True)
    return compute(runner, Batch((), (start,), (chunk,), 0.0)).tokens[slot][0]


def main(model: str, seed: str, count: str, *flags: str) -> None:
    rng = random.Random(int(seed))
    config = ContextConfig(
        ctx_size=512, parallel=2, threads=1, kv_unified="unified" in flags,
        flash_attn="off" if "no-flash" in flags else "auto",
    )  # fmt: skip
    runner = LlamaRunner(ModelConfig(model=Path(model)), config)
    mark = fingerprint(runner.info)
    following = step(runner, 0, TOKENS, 0)
    whole = pack(SavedSlot(TOKENS, runner.save_slot(0)), mark)
    plain = whole[:-N_END_BYTES]  # as llama-server writes it
    assert unpack(plain, mark, runner.info.n_vocab) == unpack(whole, mark, runner.info.n_vocab)
    n_restored = n_refused = n_unread = 0
    for turn in range(int(count)):
        try:
            slot = unpack(change(whole if turn % 4 == 0 else plain, rng), mark, runner.info.n_vocab)
        except InvalidRequest:
            n_unread += 1
            continue
        if turn % 50 == 0:
            intact = unpack(whole, mark, runner.info.n_vocab)
            assert runner.restore_slot(1, intact.state, len(intact.tokens)), "what came before is still there"
        held = slot.tokens if runner.restore_slot(1, slot.state, len(slot.tokens)) else ()
        n_restored += bool(held)
        n_refused += not held
        step(runner, 1, (320,), len(held))
        compute(runner, Batch((KvRemove(1, 0),), (), (), 0.0))
        step(runner, 1, (320,), 0)
        compute(runner, Batch((KvRemove(1, 0), KvRemove(0, len(TOKENS) - 1)), (), (), 0.0))
        assert step(runner, 0, TOKENS[-1:], len(TOKENS) - 1) == following, "a neighbour has changed"
    print(f"restored {n_restored}, refused {n_refused}, unread {n_unread}")
    runner.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
