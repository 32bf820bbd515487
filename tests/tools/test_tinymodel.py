"""Tiny models load in llama.cpp, do what they were made for, and have the same bytes each time."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from tests.support.runner import compute
from tools import tinymodel
from tools.tinymodel import BERT_N_CTX, write_bert, write_llama, write_lora
from tools.tinyparts import CHAT_TEMPLATE, N_EMBD
from wingman.config import ContextConfig, ModelConfig, SamplingParams
from wingman.engine.llama import binding
from wingman.engine.llama.binding import lib
from wingman.engine.llama.runner import LlamaRunner
from wingman.engine.runner import Batch, Chunk, SamplerStart

N_GENERATED = 48


@contextmanager
def loaded(path: Path, **fields: Any) -> Iterator[LlamaRunner]:
    runner = LlamaRunner(ModelConfig(model=path, **fields), ContextConfig(parallel=2, threads=1))
    try:
        yield runner
    finally:
        runner.close()


def generate(runner: LlamaRunner, text: str, temperature: float, lora: tuple[float, ...] = ()) -> list[int]:
    tokens = runner.tokenizer.tokenize(text, add_special=True, parse_special=True)
    sampling = SamplingParams(temperature=temperature, seed=1)
    starts: tuple[SamplerStart, ...] = (SamplerStart(0, sampling, tokens),)
    position, output = 0, []
    for _ in range(N_GENERATED):
        chunks = (Chunk(0, 1, tokens, position, True),)
        samples = compute(runner, Batch((), starts, chunks, 0.0, lora=lora))
        starts = ()
        position += len(tokens)
        tokens = list(samples.tokens[0])
        output += tokens
    return output


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaRunner]:
    path = write_llama(tmp_path_factory.mktemp("models") / "tiny.gguf", n_ctx_train=256)
    with loaded(path) as runner:
        yield runner


class TestLlama:
    def test_facts(self, runner: LlamaRunner) -> None:
        info = runner.info
        assert (info.n_ctx_train, info.n_embd) == (256, N_EMBD)
        assert (info.bos_token, info.eos_token, info.adds_bos) == ("<s>", "</s>", True)
        assert info.chat_template == CHAT_TEMPLATE
        assert info.can_shift
        assert Path(info.path).stat().st_size < 1_000_000

    def test_ends_of_generation(self, runner: LlamaRunner) -> None:
        pieces = [runner.tokenizer.piece(token, special=True) for token in runner.tokenizer.eog_tokens]
        assert pieces == [b"</s>", b"<|im_end|>"]

    def test_fim_tokens(self, runner: LlamaRunner) -> None:
        tokens = runner.tokenizer.tokenize("<|fim_prefix|><|fim_suffix|><|fim_middle|>", False, True)
        vocab = runner._model.vocab
        fim = (lib.llama_vocab_fim_pre, lib.llama_vocab_fim_suf, lib.llama_vocab_fim_mid)
        assert tokens == [get(vocab) for get in fim]

    @pytest.mark.parametrize("text", ["the people", "Zyx {42}\n\n", "é 漢字 🙂", "a <|im_end|> b"])
    def test_text_survives_tokenisation(self, runner: LlamaRunner, text: str) -> None:
        tokens = runner.tokenizer.tokenize(text, add_special=False, parse_special=False)
        assert runner.tokenizer.detokenize(tokens, special=True) == text

    def test_common_words_are_single_tokens(self, runner: LlamaRunner) -> None:
        tokens = runner.tokenizer.tokenize("the people would think", add_special=False, parse_special=False)
        assert len(tokens) == 4

    def test_output_holds_invalid_utf8(self, runner: LlamaRunner) -> None:
        runner.reset()
        output = generate(runner, "hello world", temperature=1.0)
        text = b"".join(runner.tokenizer.piece(token) for token in output)
        with pytest.raises(UnicodeDecodeError):
            text.decode()

    def test_greedy_output_repeats(self, runner: LlamaRunner) -> None:
        outputs = []
        for _ in range(2):
            runner.reset()
            outputs.append(generate(runner, "hello world", temperature=0.0))
        assert outputs[0] == outputs[1]
        assert len(set(outputs[0])) > 5

    def test_repositories(self, tmp_path: Path) -> None:
        with loaded(write_llama(tmp_path / "repo.gguf", knows_repositories=True)) as runner:
            fim = runner.info.fim
            assert fim is not None
            pieces = [runner.tokenizer.piece(token, special=True) for token in (fim.repo, fim.sep)]
        assert pieces == [b"<|repo_name|>", b"<|file_sep|>"]

    def test_template_can_be_left_out(self, tmp_path: Path) -> None:
        with loaded(write_llama(tmp_path / "bare.gguf", chat_template=None)) as runner:
            assert runner.info.chat_template is None


class TestSplit:
    @pytest.mark.parametrize("n_splits", [2, 3])
    def test_loads_from_any_part(self, tmp_path: Path, n_splits: int) -> None:
        whole = write_llama(tmp_path / "whole.gguf")
        first = write_llama(tmp_path / "tiny.gguf", n_splits=n_splits)
        parts = [tmp_path / f"tiny-{i:05d}-of-{n_splits:05d}.gguf" for i in range(1, n_splits + 1)]
        assert first == parts[0]
        assert sorted(tmp_path.glob("tiny*")) == parts
        with loaded(whole) as runner:
            expected = generate(runner, "the world", temperature=0.0)
        for part in parts:
            with loaded(part) as runner:
                assert generate(runner, "the world", temperature=0.0) == expected

    def test_keys(self, tmp_path: Path) -> None:
        first = write_llama(tmp_path / "tiny.gguf", n_splits=2)
        second = first.with_name("tiny-00002-of-00002.gguf")
        readers = [gguf.GGUFReader(path) for path in (first, second)]
        for number, reader in enumerate(readers):
            assert reader.fields["split.no"].contents() == number
            assert reader.fields["split.count"].contents() == 2
            assert reader.fields["split.tensors.count"].contents() == sum(len(r.tensors) for r in readers)
        assert "tokenizer.ggml.tokens" not in readers[1].fields

    @pytest.mark.parametrize("n_splits", [0, 1000])
    def test_impossible_splits_are_refused(self, tmp_path: Path, n_splits: int) -> None:
        with pytest.raises(ValueError, match="can't be split"):
            write_llama(tmp_path / "tiny.gguf", n_splits=n_splits)
        assert not list(tmp_path.iterdir())


class TestLora:
    def test_scale_1_says_other_things(self, tmp_path: Path) -> None:
        model, adapter = write_llama(tmp_path / "tiny.gguf"), write_lora(tmp_path / "lora.gguf")
        with loaded(model) as runner:
            expected = generate(runner, "hello world", temperature=0.0)
        with loaded(model, lora=((adapter, 1.0),)) as runner:
            assert runner.info.loras[0].metadata["adapter.lora.task_name"] == "noise 0"
            off = generate(runner, "hello world", temperature=0.0, lora=(0.0,))
            runner.reset()
            on = generate(runner, "hello world", temperature=0.0, lora=(1.0,))
        assert off == expected
        assert on[:4] != expected[:4]


@contextmanager
def bert_loaded(path: Path) -> Iterator[tuple[Any, Any]]:
    """Model and context, with the pooling the file asks for."""
    binding.initialize()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    assert model, binding.take_errors()
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = BERT_N_CTX
    params.embeddings = True
    params.n_threads = params.n_threads_batch = 1
    context = lib.llama_init_from_model(model, params)
    assert context, binding.take_errors()
    try:
        yield model, context
    finally:
        lib.llama_free(context)
        lib.llama_model_free(model)


def bert_tokens(model: Any, text: str) -> list[int]:
    data = text.encode()
    buffer = (lib.llama_token * BERT_N_CTX)()
    vocab = lib.llama_model_get_vocab(model)
    count = lib.llama_tokenize(vocab, data, len(data), buffer, BERT_N_CTX, True, True)
    return list(buffer[:count])


def encode(context: Any, tokens: list[int], size: int) -> npt.NDArray[np.float32]:
    """The pooled result for one sequence, or without pooling the last token's embedding."""
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = 1
        assert lib.llama_encode(context, batch) == 0
        if lib.llama_pooling_type(context) == lib.LLAMA_POOLING_TYPE_NONE:
            values = lib.llama_get_embeddings_ith(context, -1)
        else:
            values = lib.llama_get_embeddings_seq(context, 0)
        return np.array(ctypes.cast(values, ctypes.POINTER(ctypes.c_float * size)).contents, np.float32)
    finally:
        lib.llama_batch_free(batch)


class TestBert:
    @pytest.mark.parametrize("pooling", tinymodel.POOLINGS)
    def test_encodes(self, tmp_path: Path, pooling: str) -> None:
        path = write_bert(tmp_path / "tiny.gguf", pooling=pooling)
        size = 1 if pooling == "rank" else N_EMBD
        with bert_loaded(path) as (model, context):
            assert lib.llama_pooling_type(context) == tinymodel.POOLINGS[pooling]
            results = [
                encode(context, bert_tokens(model, text), size) for text in ("the hello", "people like work!")
            ]
        assert all(np.isfinite(result).all() and result.any() for result in results)
        assert not np.allclose(results[0], results[1])

    def test_poolings_differ(self, tmp_path: Path) -> None:
        results = []
        for pooling in ("mean", "cls", "last"):
            path = write_bert(tmp_path / f"{pooling}.gguf", pooling=pooling)
            with bert_loaded(path) as (model, context):
                results.append(encode(context, bert_tokens(model, "hello world"), N_EMBD))
        assert not np.allclose(results[0], results[1])
        assert not np.allclose(results[1], results[2])

    def test_words_and_specials(self, tmp_path: Path) -> None:
        with bert_loaded(write_bert(tmp_path / "tiny.gguf")) as (model, _):
            vocab = lib.llama_model_get_vocab(model)
            tokens = bert_tokens(model, "Hello worlds, é")
            texts = [lib.llama_vocab_get_text(vocab, token).decode() for token in tokens]
        assert texts == ["[CLS]", "▁hello", "▁world", "s", "▁,", "▁e", "[SEP]"]

    def test_unknown_pooling_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="pooling must be one of"):
            write_bert(tmp_path / "tiny.gguf", pooling="median")


class TestBytes:
    def test_same_arguments_give_the_same_bytes(self, tmp_path: Path) -> None:
        paths = [tmp_path / "one.gguf", tmp_path / "two.gguf"]
        assert len({write_llama(path, seed=3).read_bytes() for path in paths}) == 1
        assert len({write_bert(path, seed=3, pooling="rank").read_bytes() for path in paths}) == 1
        assert len({write_lora(path, seed=3).read_bytes() for path in paths}) == 1
        for path in paths:
            write_llama(path, seed=3, n_splits=2)
        for part in ("00001-of-00002", "00002-of-00002"):
            assert len({path.with_name(f"{path.stem}-{part}.gguf").read_bytes() for path in paths}) == 1

    def test_seeds_differ(self, tmp_path: Path) -> None:
        path = tmp_path / "tiny.gguf"
        assert write_llama(path, seed=0).read_bytes() != write_llama(path, seed=1).read_bytes()
        assert write_bert(path, seed=0).read_bytes() != write_bert(path, seed=1).read_bytes()


class TestCommand:
    def test_llama(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["llama", str(tmp_path / "tiny.gguf"), "--splits", "2", "--n-ctx-train", "64"]
        assert tinymodel.main(arguments) == 0
        path = Path(capsys.readouterr().out.strip())
        assert gguf.GGUFReader(path).fields["llama.context_length"].contents() == 64

    def test_bert(self, tmp_path: Path) -> None:
        path = tmp_path / "tiny.gguf"
        assert tinymodel.main(["bert", str(path), "--pooling", "cls", "--seed", "5"]) == 0
        assert path.read_bytes() == write_bert(tmp_path / "same.gguf", seed=5, pooling="cls").read_bytes()

    def test_lora(self, tmp_path: Path) -> None:
        path = tmp_path / "lora.gguf"
        assert tinymodel.main(["lora", str(path), "--seed", "5"]) == 0
        assert path.read_bytes() == write_lora(tmp_path / "same.gguf", seed=5).read_bytes()

    def test_unwritable_path_ends_with_a_message(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            tinymodel.main(["llama", str(tmp_path / "none" / "tiny.gguf")])
        assert ended.value.code == 1
        assert "No such file" in capsys.readouterr().err
