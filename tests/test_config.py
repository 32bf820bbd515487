"""Flags, environment and file become a Config; mistakes are named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from wingman.cli import build_parser, load_config
from wingman.config import GROUPS, Config
from wingman.errors import ConfigurationError
from wingman.options import RANDOM_SEED, canonical_samplers, option_of, samplers_from_letters


def config(*arguments: str, environment: dict[str, str] | None = None) -> Config:
    given = vars(build_parser().parse_args(["serve", *arguments]))
    return load_config(given, environment or {})


def test_defaults_are_llama_servers() -> None:
    default = config()
    assert default.sampling.temperature == 0.8
    assert default.sampling.seed == RANDOM_SEED
    assert (default.context.batch_size, default.context.ubatch_size) == (2048, 512)
    assert default.server.host == ("127.0.0.1",)


def test_a_flag_beats_the_environment_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "wingman.toml"
    file.write_text(
        "[context]\nctx_size = 1\nparallel = 1\nn_predict = 1\n"
        '[server]\nhost = ["::1", "a.sock"]\nslots = false\napi_key = ["a", "b"]\n'
    )
    environment = {"WINGMAN_PARALLEL": "2", "LLAMA_ARG_N_PREDICT": "2", "WINGMAN_CONFIG": str(file)}
    found = config("-n", "3", environment=environment)
    assert (found.context.ctx_size, found.context.parallel, found.context.n_predict) == (1, 2, 3)
    assert found.server.host == ("::1", "a.sock")
    assert found.server.api_key == ("a", "b")
    assert found.server.slots is False


@pytest.mark.parametrize(
    ("arguments", "path", "value"),
    [
        (("--no-mmap",), "model.mmap", False),
        (("--mlock",), "model.mlock", True),
        (("-ngl", "all"), "model.n_gpu_layers", -1),
        (("-a", "b, a"), "model.alias", ("b", "a")),
        (("-ctk", "q8_0"), "context.cache_type_k", "q8_0"),
        (("--samplers", "top_k;temp;nonsense"), "sampling.samplers", ("top_k", "temperature")),
        (("--seed", "-1"), "sampling.seed", RANDOM_SEED),
        (("-l", "15+1", "-l", "7-inf"), "sampling.logit_bias", ((15, 1.0), (7, float("-inf")))),
        (("-r", "a,b", "-r", "c"), "context.reverse_prompt", ("a,b", "c")),
        (("--api-key", "a,b", "--api-key", "c"), "server.api_key", ("a", "b", "c")),
        (("--dry-sequence-breaker", "x"), "sampling.dry_sequence_breakers", ("x",)),
        (("--host", "::1,127.0.0.1"), "server.host", ("::1", "127.0.0.1")),
    ],
)
def test_flags(arguments: tuple[str, ...], path: str, value: Any) -> None:
    group, name = path.split(".")
    assert getattr(getattr(config(*arguments), group), name) == value


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("--mirostat", "3"), {}, "one of 0, 1, 2"),
        (("--port", "70000"), {}, "from 0 to 65535"),
        (("--top-k", "x"), {}, "--top-k"),
        ((), {"WINGMAN_SLOTS": "maybe"}, "WINGMAN_SLOTS must be on or off"),
        ((), {"LLAMA_ARG_CTX_SIZE": "big"}, "LLAMA_ARG_CTX_SIZE"),
        (("--config", "/nonexistent.toml"), {}, "can't read"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        config(*arguments, environment=environment)


def test_unknown_keys_of_the_file_are_named(tmp_path: Path) -> None:
    file = tmp_path / "wingman.toml"
    file.write_text("[context]\nctx_sise = 1\n")
    with pytest.raises(ConfigurationError, match="did you mean ctx_size"):
        config("--config", str(file))


def test_negative_environment_names_of_llama_server() -> None:
    assert config(environment={"LLAMA_ARG_NO_MMAP": "1"}).model.mmap is False


def test_help_shows_every_flag_with_its_environment_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--help"])
    text = "".join(capsys.readouterr().out.split())
    for group in GROUPS.values():
        for record in dataclasses.fields(group):
            assert f"WINGMAN_{record.name.upper()}" in text
            assert all(flag in text for flag in option_of(record).flags)


def test_sampler_spellings() -> None:
    names = canonical_samplers(["Top-K", "topk", "TYPICAL_P", "typ", "nucleus", "temp", "tfs_z", "min_p"])
    assert names == ("top_k", "top_k", "typ_p", "typ_p", "top_p", "temperature", "min_p")
    assert samplers_from_letters("kyt?") == ("top_k", "typ_p", "temperature")


def test_drafting_with_a_model_needs_one() -> None:
    with pytest.raises(ConfigurationError, match="--model-draft"):
        config("--spec-type", "draft-simple")
    assert config("--spec-type", "draft-simple", "-md", "a.gguf").context.spec_type == "draft-simple"
