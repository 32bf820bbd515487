"""Memory estimates against what llama.cpp logged for the starter model, and by hand for other layouts."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.gguf import LLAMA, Pair, build, tensor
from wingman.services.gguf import GgufHeader, parse, read_header
from wingman.services.memory import ContextShape, cache_bytes, compute_bytes, estimate_bytes

MIB = 2**20


def header_of(**facts: Pair) -> GgufHeader:
    """A header of an architecture called llama, unless `architecture` is among the facts."""
    kind, architecture = facts.pop("architecture", ("string", "llama"))
    pairs: dict[str, Pair] = {"general.architecture": (kind, architecture)}
    pairs |= {f"{architecture}.{key.replace('__', '.')}": pair for key, pair in facts.items()}
    data = build(pairs, [tensor("a", [256])], bytes(1024))
    return parse(io.BytesIO(data), len(data))


def attention(n_layer: int, n_head_kv: object, **more: Pair) -> GgufHeader:
    heads: dict[str, Pair] = {"attention__head_count_kv": ("uint32", n_head_kv)}  # type: ignore[dict-item]
    return header_of(
        block_count=("uint32", n_layer),
        embedding_length=("uint32", 64),
        attention__head_count=("uint32", 4),
        **heads,
        **more,
    )


LOGGED = (  # n_ctx, sequences, micro-batch, type of the cache, flash attention; MiB of cache and compute buffer
    (2048, 1, 512, "f16", True, 45.0, 102.51),
    (8192, 1, 512, "f16", True, 180.0, 98.25),
    (8192, 8, 512, "f16", True, 180.0, 98.25),
    (8192, 1, 128, "f16", True, 180.0, 24.56),
    (8192, 1, 2048, "f16", True, 180.0, 393.01),
    (8192, 1, 512, "q8_0", True, 95.62, 99.38),
    (2048, 1, 512, "f16", False, 45.0, 99.38),
    (8192, 1, 512, "f16", False, 180.0, 166.38),
    (131072, 1, 512, "q8_0", True, 1530.0, 140.42),
    (131072, 4, 512, "f16", False, 2880.0, 646.38),
)


@pytest.mark.parametrize("logged", LOGGED)
def test_the_starter_model(
    starter_model: Path, logged: tuple[int, int, int, str, bool, float, float]
) -> None:
    n_ctx, n_parallel, n_ubatch, kind, has_flash_attention, cache, compute = logged
    header = read_header(starter_model)
    shape = ContextShape(n_ctx, n_parallel, n_ubatch, kind, kind, has_flash_attention=has_flash_attention)
    assert cache_bytes(header, shape) / MIB == pytest.approx(cache, abs=0.01)
    assert compute_bytes(header, shape) / MIB == pytest.approx(compute, rel=0.05)
    assert estimate_bytes(
        header,
        n_ctx=n_ctx,
        n_parallel=n_parallel,
        n_ubatch=n_ubatch,
        type_k=kind,
        type_v=kind,
        has_flash_attention=has_flash_attention,
    ) == header.tensor_bytes + cache_bytes(header, shape) + compute_bytes(header, shape)


def test_cells_are_padded_for_each_sequence() -> None:
    header = attention(1, 1)
    a_cell = 16 * 2 * 2
    assert cache_bytes(header, ContextShape(1000)) == 1024 * a_cell
    assert cache_bytes(header, ContextShape(1000, 4)) == 4 * 256 * a_cell
    assert cache_bytes(header, ContextShape(1100, 4)) == 4 * 512 * a_cell
    assert cache_bytes(header, ContextShape(1100, 4, is_unified=True)) == 1280 * a_cell


def test_heads_that_differ_by_layer() -> None:
    assert cache_bytes(attention(3, [1, 0, 2]), ContextShape(256)) == 3 * 256 * 16 * 2 * 2
    shared = attention(3, 2, attention__shared_kv_layers=("uint32", 1))
    assert cache_bytes(shared, ContextShape(256)) == 2 * 2 * 256 * 16 * 2 * 2
    sized = attention(1, 1, attention__key_length=("uint32", 192), attention__value_length=("uint32", 128))
    assert cache_bytes(sized, ContextShape(256, type_k="q8_0")) == 256 * (192 * 34 // 32 + 128 * 2)


@pytest.mark.parametrize(
    ("architecture", "pattern", "n_full"),
    [
        ("gemma3", None, 1),
        ("gpt-oss", None, 3),
        ("llama", None, 6),
        ("gemma3", ("uint32", 3), 2),
        ("new", ("bool", [True, True, True, True, False, True]), 1),
    ],
)
def test_layers_that_see_a_window(architecture: str, pattern: Pair | None, n_full: int) -> None:
    facts: dict[str, Pair] = {"architecture": ("string", architecture)}
    facts["attention__sliding_window"] = ("uint32", 500)
    if pattern is not None:
        facts["attention__sliding_window_pattern"] = pattern
    header = attention(6, 1, **facts)
    a_cell = 16 * 2 * 2
    full, window = 8192 * a_cell, 1024 * a_cell
    assert cache_bytes(header, ContextShape(8192)) == n_full * full + (6 - n_full) * window
    assert cache_bytes(header, ContextShape(8192, has_full_windows=True)) == 6 * full
    assert cache_bytes(header, ContextShape(512)) == 6 * 512 * a_cell


def test_recurrent_layers_hold_a_state_for_each_sequence() -> None:
    ssm: dict[str, Pair] = {
        "ssm__conv_kernel": ("uint32", 4),
        "ssm__inner_size": ("uint32", 128),
        "ssm__state_size": ("uint32", 16),
        "ssm__group_count": ("uint32", 1),
    }
    state = 4 * (3 * (128 + 2 * 16) + 128 * 16)
    pure = header_of(block_count=("uint32", 2), embedding_length=("uint32", 64), **ssm)
    assert cache_bytes(pure, ContextShape(8192, 4)) == 2 * 4 * state
    hybrid = attention(8, 1, full_attention_interval=("uint32", 4), **ssm)
    assert cache_bytes(hybrid, ContextShape(256)) == 2 * 256 * 16 * 2 * 2 + 6 * state


def test_an_encoder_has_no_cache() -> None:
    assert cache_bytes(attention(2, 4, attention__causal=("bool", False)), ContextShape(512)) == 0


def test_more_of_anything_never_takes_less() -> None:
    data = build(LLAMA, [tensor("a", [256])], bytes(1024))
    header = parse(io.BytesIO(data), len(data))
    sizes = [estimate_bytes(header, n_ctx=n_ctx) for n_ctx in (1, 256, 257, 4096, 2**31)]
    assert sizes == sorted(sizes)
    assert sizes[0] > header.tensor_bytes


@given(
    n_layer=st.integers(1, 512),
    facts=st.dictionaries(
        st.sampled_from(
            ["embedding_length", "attention__head_count", "attention__head_count_kv", "attention__key_length",
             "vocab_size", "feed_forward_length", "attention__sliding_window", "attention__shared_kv_layers",
             "full_attention_interval", "ssm__inner_size", "ssm__state_size", "ssm__conv_kernel"]
        ),
        st.integers(0, 2**32 - 1).map(lambda number: ("uint32", number)),
    ),
    n_ctx=st.integers(1, 2**31 - 1),
    n_parallel=st.integers(1, 256),
)  # fmt: skip
def test_any_header_gives_a_number_that_can_be_stored(
    n_layer: int, facts: dict[str, Pair], n_ctx: int, n_parallel: int
) -> None:
    header = header_of(block_count=("uint32", n_layer), **facts)
    assert header.tensor_bytes <= estimate_bytes(header, n_ctx=n_ctx, n_parallel=n_parallel) <= 2**62
