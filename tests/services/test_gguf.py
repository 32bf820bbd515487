"""GGUF headers: facts of real and generated models, refusals of damaged ones, and agreement with the runtime."""

from __future__ import annotations

import ctypes
import importlib.util
import io
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz.gguf import LLAMA, TOKENS, Pair, build, tensor, text
from fuzz.mutate import Mutator, read_corpus
from tools.tinymodel import write_bert, write_llama, write_lora
from wingman.services.gguf import BadGguf, GgufHeader, Omitted, parse, read_header, read_parts
from wingman.services.gguffile import TENSOR_TYPES

ONE = tensor("a", [32])
DATA = bytes(128)


def parse_bytes(data: bytes) -> GgufHeader:
    return parse(io.BytesIO(data), len(data))


def with_pair(key: str, kind: str, value: object) -> bytes:
    return build({**LLAMA, key: (kind, value)}, [ONE], DATA)  # type: ignore[dict-item]


def test_the_starter_model(starter_model: Path) -> None:
    header = read_header(starter_model)
    assert (header.architecture, header.version, header.n_params) == ("llama", 3, 134_515_008)
    assert (header.context_length, header.n_embd, header.n_layer) == (8192, 576, 30)
    assert (header.n_head, header.n_head_kv, header.head_size_k, header.head_size_v) == (9, 3, 64, 64)
    assert (header.n_vocab, header.file_type) == (49_152, 3)
    assert header.tensor_types == {"q8_0": 1, "f32": 61, "q4_1": 210}
    assert header.file_size == starter_model.stat().st_size > header.tensor_bytes
    assert header.metadata["tokenizer.ggml.merges"] == Omitted(48_900)


def test_generated_models(tmp_path: Path) -> None:
    llama = read_header(write_llama(tmp_path / "llama.gguf"))
    assert (llama.name, llama.n_layer, llama.kv_heads(), llama.n_tensors) == ("tiny llama", 2, (2, 2), 21)
    bert = read_header(write_bert(tmp_path / "bert.gguf"))
    assert (bert.architecture, bert.n_head_kv) == ("bert", 4)
    lora = read_header(write_lora(tmp_path / "lora.gguf"))
    assert (lora.text("general.type"), lora.n_layer, lora.n_head_kv, lora.file_type) == ("adapter", 0, 0, -1)


def test_split_models_are_summed_up(tmp_path: Path) -> None:
    whole = read_header(write_llama(tmp_path / "whole.gguf"))
    write_llama(tmp_path / "tiny.gguf", n_splits=3)
    paths = sorted(tmp_path.glob("tiny-*.gguf"))
    parts = read_parts(paths)
    assert (parts.n_params, parts.tensor_bytes) == (whole.n_params, whole.tensor_bytes)
    assert (parts.tensor_types, parts.n_tensors) == (whole.tensor_types, whole.n_tensors)
    assert parts.file_size == sum(path.stat().st_size for path in paths)
    assert (parts.n_layer, parts.split_count, read_header(paths[2]).split_no) == (2, 3, 2)
    for wrong in (paths[:2], paths[::-1], [*paths, paths[0]], [paths[0], paths[1], paths[1]]):
        with pytest.raises(BadGguf):
            read_parts(wrong)


def test_facts_of_each_layer_and_their_defaults() -> None:
    assert parse_bytes(with_pair("llama.attention.head_count_kv", "uint32", [1, 3])).kv_heads() == (1, 3)
    assert parse_bytes(with_pair("llama.attention.head_count_kv", "uint32", 2)).kv_heads() == (2, 2)
    without = {key: pair for key, pair in LLAMA.items() if "kv" not in key}
    assert parse_bytes(build(without, [ONE], DATA)).kv_heads() == (4, 4)
    sized = parse_bytes(with_pair("llama.attention.key_length", "uint32", 96))
    assert (sized.head_size_k, sized.head_size_v) == (96, 16)
    for odd in (("int32", -1), ("string", "2"), ("float32", 2.0), ("uint64", 2**63), ("bool", True)):
        assert parse_bytes(with_pair("llama.context_length", *odd)).context_length == 0


def test_all_kinds_of_values_are_read() -> None:
    pairs: dict[str, Pair] = {
        "general.architecture": ("string", b"x\xff\x00rest"),
        "a": ("float64", [0.5, 0.25]),
        "b": ("uint64", 2**64 - 1),
        "c": ("bool", [True, False]),
        "d": ("int8", [-1] * 513),
        "e": ("string", "x" * 4097),
    }
    header = parse_bytes(build(pairs, [ONE], DATA))
    assert header.metadata == {
        "general.architecture": "x\ufffd",
        "a": (0.5, 0.25),
        "b": 2**64 - 1,
        "c": (True, False),
        "d": Omitted(513),
        "e": Omitted(4097),
    }


WHOLE = build(LLAMA, [ONE], DATA)
REFUSED = {
    "nothing": (b"", "ends within"),
    "another file": (b"PK\x03\x04" + bytes(40), "not a GGUF"),
    "version 1": (build(LLAMA, [ONE], DATA, version=1), "version 1"),
    "version 4": (build(LLAMA, [ONE], DATA, version=4), "version 4"),
    "big-endian": (b"GGUF\x00\x00\x00\x03" + bytes(16), "big-endian"),
    "a cut header": (WHOLE[:100], "ends within"),
    "cut data": (WHOLE[:-1], "incomplete"),
    "counts beyond the file": (b"GGUF\x03\x00\x00\x00" + b"\x10" + bytes(7) + b"\xff" + bytes(7), "ends within"),
    "counts beyond sense": (b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, "claims"),
    "an empty key": (with_pair("", "uint8", 1), "empty"),
    "a key with NUL": (with_pair("split.no\0", "uint32", 1), "NUL"),
    "a long key": (with_pair("k" * 1025, "uint8", 1), "key is longer"),
    "an unknown type": (WHOLE.replace(b"block_count\x04", b"block_count\x0d"), "unknown type: 13"),
    "a list of lists": (WHOLE.replace(b"scores\x09\0\0\0\x06", b"scores\x09\0\0\0\x09"), "unknown type: 9"),
    "no architecture": (build({}, [ONE], DATA), "architecture"),
    "an architecture that is a number": (with_pair("general.architecture", "uint32", 1), "architecture is uint32"),
    "an odd alignment": (with_pair("general.alignment", "uint32", 24), "power of two"),
    "no alignment": (with_pair("general.alignment", "uint32", 0), "power of two"),
    "a wide alignment": (with_pair("general.alignment", "uint64", 32), "uint64"),
    "split.no llama.cpp dies of": (with_pair("split.no", "uint32", 0), "split.no is uint32"),
    "a part beyond the last": (with_pair("split.no", "uint16", 1), "part 2 of 1"),
    "no layers": (with_pair("llama.block_count", "uint32", 0), "0 layers"),
    "513 layers": (with_pair("llama.block_count", "uint32", 513), "513 layers"),
    "layers ahead": (with_pair("llama.nextn_predict_layers", "uint32", 3), "ahead"),
    "experts that are not there": (with_pair("llama.expert_used_count", "uint32", 2), "experts"),
    "odd scaling": (with_pair("llama.rope.scaling.type", "string", "odd"), "scaled"),
    "a token twice": (with_pair("tokenizer.ggml.tokens", "string", ["a", "b", "c", "a"]), "twice"),
    "a token twice to C": (with_pair("tokenizer.ggml.tokens", "string", ["a", "b", "c", "a\0b"]), "twice"),
    "an empty token's name": (with_pair("tokenizer.ggml.tokens", "string", ["a", "[EMPTY_2]", "", "d"]), "twice"),
    "a token beyond the file": (WHOLE.replace(text("b") + text(""), b"\xff" * 8 + b"b" + text("")), "ends within"),
    "too few scores": (with_pair("tokenizer.ggml.scores", "float32", [0.0] * 3), "3 of their scores"),
    "texts as scores": (with_pair("tokenizer.ggml.scores", "string", ["0"] * 4), "scores is string"),
    "no tensors": (build(LLAMA), "no tensors"),
    "a tensor twice": (build(LLAMA, [ONE, tensor("a", [32], offset=128)], bytes(256)), "twice"),
    "a long name": (build(LLAMA, [tensor("n" * 64, [32])], DATA), "name is longer"),
    "5 dimensions": (build(LLAMA, [tensor("a", [1] * 5)], DATA), "5 dimensions"),
    "no elements": (build(LLAMA, [tensor("a", [32, 0])], DATA), "shape"),
    "a size below zero": (build(LLAMA, [tensor("a", [2**64 - 1])], DATA), "shape"),
    "a product that overflows": (build(LLAMA, [tensor("a", [2**32, 2**32])], DATA), "shape"),
    "half a block": (build(LLAMA, [tensor("a", [33], kind=8)], DATA), "shape"),
    "a removed type": (build(LLAMA, [tensor("a", [32], kind=31)], DATA), "q4_0_4_4"),
    "a type of the future": (build(LLAMA, [tensor("a", [32], kind=999)], DATA), "999"),
    "a gap": (build(LLAMA, [tensor("a", [32], offset=32)], bytes(160)), "lie where"),
    "data behind the end": (build(LLAMA, [ONE, tensor("b", [2**40], offset=128)], DATA), "incomplete"),
    "a text beyond the file": (WHOLE.replace(text("llama"), b"\xff" * 8), "ends within"),
    "texts beyond sense": (WHOLE.replace(b"\x08\0\0\0\x04" + bytes(7), b"\x08\0\0\0" + b"\xff" * 8), "texts"),
    "numbers beyond the file": (WHOLE.replace(b"\x06\0\0\0\x04", b"\x06\0\0\0\xff\xff\xff\xff\xff"), "ends within"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    data, part = REFUSED[name]
    with pytest.raises(BadGguf) as caught:
        parse_bytes(data)
    assert part in caught.value.message


def test_experts_that_can_be_used() -> None:
    moe: dict[str, Pair] = {
        **LLAMA,
        "llama.expert_count": ("uint32", 8),
        "llama.expert_used_count": ("uint32", 2),
    }
    assert parse_bytes(build(moe, [ONE], DATA)).fact("expert_count") == 8
    for n_groups, n_used, is_sound in (
        (4, 2, True),
        (3, 2, False),
        (4, 4, False),
        (8, 1, False),
        (4, 0, False),
    ):
        grouped: dict[str, Pair] = {"llama.expert_group_count": ("uint32", n_groups)}
        grouped["llama.expert_group_used_count"] = ("uint32", n_used)
        data = build({**moe, **grouped}, [ONE], DATA)
        if is_sound:
            assert parse_bytes(data).n_tensors == 1
        else:
            with pytest.raises(BadGguf):
                parse_bytes(data)


def test_a_token_larger_than_a_window_is_read() -> None:
    header = parse_bytes(
        with_pair("tokenizer.ggml.tokens", "string", ["a", "x" * (3 << 20), "y" * (1 << 20), "b"])
    )
    assert (header.n_vocab, header.n_tensors) == (4, 1)


def test_lists_are_capped_together() -> None:
    n_texts = 700_000
    lists = (
        text(f"list {index}") + struct.pack("<IIQ", 9, 8, n_texts) + bytes(8 * n_texts) for index in range(3)
    )
    with pytest.raises(BadGguf, match="2100000 texts"):
        parse_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 3) + b"".join(lists))


class Counted(io.BytesIO):
    """Counts what is asked of it."""

    n_reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.n_reads += 1
        return super().read(size)


def test_long_lists_are_read_in_large_windows() -> None:
    tokens = [f"token {index} of a vocabulary" for index in range(60_000)]
    merges = [f"a b{index}" for index in range(60_000)]
    plain = {key: pair for key, pair in LLAMA.items() if not key.startswith("tokenizer")}
    lists: dict[str, Pair] = {
        "tokenizer.ggml.merges": ("string", merges),
        "tokenizer.ggml.tokens": ("string", tokens),
    }
    data = build({**plain, **lists}, [ONE], DATA)
    file = Counted(data)
    assert parse(file, len(data)).n_vocab == 60_000
    assert file.n_reads <= len(data) / 2**20 + 2


def test_a_header_beyond_the_cap_is_refused_unread() -> None:
    data = build({"a": ("uint8", 1)}, alignment=1)
    huge = data[:-5] + b"\x09\0\0\0\0\0\0\0" + (200 << 20).to_bytes(8, "little")
    file = Counted(huge)
    with pytest.raises(BadGguf, match="larger than 128 MiB"):
        parse(file, 1 << 40)
    assert file.n_reads == 1


def test_a_file_that_becomes_shorter_is_refused() -> None:
    with pytest.raises(BadGguf, match="ends within"):
        parse(io.BytesIO(WHOLE[:200]), len(WHOLE))


def test_only_plain_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path, tmp_path / "pipe.gguf", tmp_path / "none.gguf", Path("/dev/zero")):
        with pytest.raises(BadGguf):
            read_header(path)


class InitParams(ctypes.Structure):
    """gguf_init_params of gguf.h."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


@pytest.fixture
def ggml() -> Iterator[ctypes.CDLL]:
    """The runtime's own reader, silenced."""
    package = importlib.util.find_spec("llama_cpp")
    assert package is not None
    assert package.submodule_search_locations is not None
    library = ctypes.CDLL(str(Path(package.submodule_search_locations[0]) / "lib" / "libggml-base.so"))
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, InitParams]
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_blck_size.restype = ctypes.c_int64
    library.gguf_free.argtypes = [ctypes.c_void_p]
    return_nothing = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    library.ggml_log_set(return_nothing, None)
    yield library
    library.ggml_log_set(None, None)


def test_types_are_the_runtime_s(ggml: ctypes.CDLL) -> None:
    sizes = {
        number: (
            ggml.ggml_type_name(number).decode(),
            ggml.ggml_blck_size(number),
            ggml.ggml_type_size(number),
        )
        for number in range(43)
        if ggml.ggml_blck_size(number)
    }
    assert {number: TENSOR_TYPES[number] for number in sizes} == sizes
    assert {number for number in TENSOR_TYPES if number < 43} == set(sizes)


def test_what_is_accepted_is_accepted_by_the_runtime(ggml: ctypes.CDLL, tmp_path: Path) -> None:
    path = tmp_path / "mutated.gguf"
    inputs = iter(Mutator(read_corpus("gguf"), TOKENS, seed=11))
    n_accepted = 0
    for _ in range(4000):
        data = next(inputs)
        try:
            parse_bytes(data)
        except BadGguf:
            continue
        n_accepted += 1
        path.write_bytes(data)
        context = ggml.gguf_init_from_file(bytes(path), InitParams(True, None))
        assert context, data
        ggml.gguf_free(context)
    assert n_accepted > 100
