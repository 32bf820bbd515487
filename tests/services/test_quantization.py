"""Names of files and repositories, and the choice of a file, against names as the Hub has them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wingman.services.quantization import (
    Candidate,
    bits_per_weight,
    choose_file,
    is_model_file,
    is_repacked,
    parameter_count,
    parameter_text,
    quantization_name,
    quantization_of,
    speed_rank,
)

MB = 2**20


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("llama-2-7b-chat.Q4_K_M.gguf", "Q4_K_M"),
        ("Meta-Llama-3-8B-Instruct-IQ3_XS.gguf", "IQ3_XS"),
        ("qwen2.5-0.5b-instruct-q8_0.gguf", "Q8_0"),
        ("model-fp16.gguf", "F16"),
        ("Model.BF16.gguf", "BF16"),
        ("ggml-model-f32.gguf", "F32"),
        ("gpt-oss-20b-MXFP4.gguf", "MXFP4"),
        ("gpt-oss-20b-mxfp4_moe.gguf", "MXFP4"),
        ("Qwen3-8B-UD-Q4_K_XL.gguf", "Q4_K_XL"),
        ("model_Q5_0.gguf", "Q5_0"),
        ("model-Q4_0_4_8.gguf", "Q4_0_4_8"),
        ("model.i1-IQ2_XXS.gguf", "IQ2_XXS"),
        ("Model-Q6_K-00001-of-00003.gguf", "Q6_K"),
        ("Q2_K/model-00001-of-00003.gguf", "Q2_K"),
        ("BF16/model-Q4_1.gguf", "Q4_1"),
        ("F16-trained-Q4_K_S-imat.gguf", "Q4_K_S"),
        ("TriLM-TQ2_0.gguf", "TQ2_0"),
        ("model.gguf", ""),
        ("Q4_Kilo.gguf", ""),
        ("SEQ4_0.gguf", ""),
    ],
)
def test_quantization_of_a_file(path: str, expected: str) -> None:
    assert quantization_of(path) == expected


@pytest.mark.parametrize(
    ("quant", "name"),
    [
        ("Q4_K_M", "4-bit K Medium"),
        ("IQ3_XS", "3-bit I Extra Small"),
        ("IQ4_NL", "4-bit I Non-linear"),
        ("Q8_0", "8-bit 0"),
        ("Q6_K", "6-bit K"),
        ("F16", "16-bit float"),
        ("", ""),
    ],
)
def test_quantization_for_people(quant: str, name: str) -> None:
    assert quantization_name(quant) == name


@pytest.mark.parametrize(
    ("repo", "text", "count"),
    [
        ("TheBloke/Llama-2-7B-Chat-GGUF", "7B", 7_000_000_000),
        ("TheBloke/Mixtral-8x7B-v0.1-GGUF", "8x7B", 56_000_000_000),
        ("bartowski/SmolLM2-135M-Instruct-GGUF", "135M", 135_000_000),
        ("Qwen/Qwen2.5-1.5B-Instruct-GGUF", "1.5B", 1_500_000_000),
        ("qwen/qwen2-0.5b-gguf", "0.5B", 500_000_000),
        ("unsloth/Qwen3-30B-A3B-GGUF", "30B", 30_000_000_000),
        ("owner/Phi-3-mini-128k-4bit-GGUF", "", 0),
        ("7B/none-GGUF", "", 0),
    ],
)
def test_parameters_of_a_repository(repo: str, text: str, count: int) -> None:
    assert parameter_text(repo) == text
    assert parameter_count(text) == count


def test_files_that_hold_no_language_model() -> None:
    assert is_model_file("a/Model-Q4_0.GGUF")
    assert not is_model_file("mmproj-model-f16.gguf")
    assert not is_model_file("Model.imatrix.gguf")
    assert not is_model_file("README.md")


def test_bits_follow_the_name() -> None:
    assert bits_per_weight("Q4_K_M") == 4.89
    assert bits_per_weight("Q4_K_XL") == bits_per_weight("Q4_K_M")
    assert bits_per_weight("Q6_K_L") == bits_per_weight("Q6_K")
    assert bits_per_weight("Q4_K") == bits_per_weight("Q4_K_M")
    assert bits_per_weight("Q8_K_XL") == bits_per_weight("Q8_0")
    assert bits_per_weight("Q4_0_4_8") == 0.0
    assert bits_per_weight("") == 0.0


def test_speed_on_a_cpu_is_that_of_the_repacked_types() -> None:
    assert [
        quant for quant in ("Q4_0", "Q4_1", "Q4_K_S", "Q5_K_M", "IQ4_NL", "Q8_0") if is_repacked(quant)
    ] == [
        "Q4_0",
        "Q4_K_S",
        "IQ4_NL",
        "Q8_0",
    ]
    assert speed_rank("Q4_0", False) < speed_rank("Q4_1", False) < speed_rank("IQ2_XS", False)
    assert speed_rank("Q4_1", True) == speed_rank("Q4_0", True)


def offer(**memory_mb: int) -> list[Candidate]:
    return [Candidate(f"model-{quant}.gguf", quant, need * MB) for quant, need in memory_mb.items()]


LARGE = offer(Q2_K=3000, Q4_1=4600, Q4_0=4500, Q4_K_M=4900, Q5_K_M=5700, Q8_0=8500, F16=16000)


@pytest.mark.parametrize(
    ("files", "available_mb", "on_gpu", "quant", "reason"),
    [
        (LARGE, 24000, False, "Q4_K_M", "fast on a CPU"),
        (LARGE, 24000, True, "Q4_K_M", "most quality for its size"),
        (LARGE, 4700, False, "Q4_0", "fast on a CPU"),
        (LARGE, 3500, False, "Q2_K", "nothing else fits"),
        (LARGE, 100, False, "Q2_K", "nothing fits, so the smallest"),
        (offer(Q4_1=300, Q4_0=290, Q8_0=400, F16=600), 8000, False, "Q8_0", "worth 8 bits"),
        (offer(Q4_1=4000, Q5_K_M=5000), 8000, False, "Q5_K_M", "quality"),
        (offer(Q4_K_M=0, Q8_0=0), 8000, False, "Q4_K_M", "unknown"),
    ],
)
def test_the_choice(files: list[Candidate], available_mb: int, on_gpu: bool, quant: str, reason: str) -> None:
    choice = choose_file(files, available_mb * MB, on_gpu)
    assert choice is not None
    assert choice.file.quantization == quant
    assert reason in choice.reason


def test_projectors_are_never_chosen() -> None:
    assert choose_file([Candidate("mmproj-Q8_0.gguf", "Q8_0", MB)], 100 * MB, False) is None
    assert choose_file([], MB, True) is None


@given(
    st.lists(
        st.builds(Candidate, st.just("m.gguf"), st.sampled_from(["Q4_0", "F16", ""]), st.integers(0, 99))
    )
)
def test_what_is_said_to_fit_fits(files: list[Candidate]) -> None:
    choice = choose_file(files, 50, False)
    assert (choice is None) == (not files)
    if choice is not None:
        assert choice.fits == any(0 < file.memory_bytes <= 50 for file in files)
        assert choice.fits == (0 < choice.file.memory_bytes <= 50)


@given(st.text(max_size=300))
def test_any_name_has_an_answer(name: str) -> None:
    quant = quantization_of(name)
    assert quantization_name(quant) or not quant
    assert bits_per_weight(quant) >= 0
    assert parameter_count(parameter_text(name)) >= 0
