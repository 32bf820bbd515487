"""Making a model ready: fewer layers on the GPU, templates, constraints, and what stays in memory when it fails."""

from __future__ import annotations

import asyncio
import math
import threading
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from tests.support.runner import N_VOCAB, ScriptedRunner
from wingman.chat.template import Rendering
from wingman.config import Config, ContextConfig, ModelConfig, SamplingParams
from wingman.engine.runner import OnProgress
from wingman.errors import ConfigurationError, DraftMisfit, ModelLoadFailure
from wingman.services.served import Loader, ServedModel, choose_template

USER = [{"role": "user", "content": "Hi"}]


class Garage:
    """To be used as `make_runner`; `n_fit` of 33 layers fit on its GPU."""

    def __init__(self, n_fit: int = 33, **info: Any) -> None:
        self.n_fit = n_fit
        self.info = info
        self.tried: list[int] = []
        self.runners: list[ScriptedRunner] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, model: ModelConfig, _: ContextConfig, on_progress: OnProgress) -> ScriptedRunner:
        self.tried.append(model.n_gpu_layers)
        while not self.gate.wait(0.001):
            if not on_progress(0.25):
                raise ModelLoadFailure("the load was cancelled")
        if self.n_fit < (33 if model.n_gpu_layers < 0 else model.n_gpu_layers):
            raise ModelLoadFailure("out of memory")
        runner = ScriptedRunner()
        runner.info = structs.replace(runner.info, **self.info)
        self.runners.append(runner)
        return runner


def loader(garage: Garage, n_layers: int = 0, names: tuple[str, ...] = (), **fields: Any) -> Loader:
    model = ModelConfig(**{"n_gpu_layers": 0} | fields.pop("model", {}))
    config = Config(model=model, context=ContextConfig(parallel=2, **fields))
    return Loader(config, names, lambda _: None, garage, n_layers)


async def load_and_close(loader: Loader) -> ServedModel:
    served = await loader.load()
    await served.engine.close()
    return served


@pytest.mark.parametrize(
    ("asked", "n_layers", "n_fit", "tried"),
    [
        (-1, 33, 33, [-1]),
        (-1, 33, 10, [-1, 16, 8]),
        (-1, 33, 0, [-1, 16, 8, 4, 2, 1, 0]),
        (20, 33, 10, [20, 10]),
        (99, 33, 16, [99, 16]),  # there are not so many
        (5, 33, 10, [5]),
        (0, 33, 10, [0]),
    ],
)
async def test_half_of_the_layers_are_tried_until_they_fit(
    asked: int, n_layers: int, n_fit: int, tried: list[int]
) -> None:
    garage = Garage(n_fit)
    served = await load_and_close(loader(garage, n_layers, model={"n_gpu_layers": asked}))
    assert garage.tried == tried
    assert served.n_gpu_layers == tried[-1]
    assert len(garage.runners) == 1


async def test_without_a_gpu_there_is_one_try() -> None:
    garage = Garage(n_fit=0)
    with pytest.raises(ModelLoadFailure, match="out of memory"):
        await loader(garage, 0, model={"n_gpu_layers": -1}).load()
    assert garage.tried == [-1]


async def test_what_fits_nowhere_fails_in_the_end() -> None:
    garage = Garage(n_fit=-1)
    with pytest.raises(ModelLoadFailure, match="out of memory"):
        await loader(garage, 4, model={"n_gpu_layers": -1}).load()
    assert garage.tried == [-1, 2, 1, 0]


async def test_an_abandoned_load_ends_soon_and_does_not_try_again() -> None:
    garage = Garage(n_fit=0)
    garage.gate.clear()
    one = loader(garage, 33, model={"n_gpu_layers": 8})
    task = asyncio.create_task(one.load())
    while not garage.tried:  # noqa: ASYNC110 - another thread does that
        await asyncio.sleep(0)
    one.abandon()
    with pytest.raises(ModelLoadFailure, match="cancelled"):
        await task
    assert garage.tried == [8]


async def test_a_load_that_is_abandoned_before_it_begins_does_not() -> None:
    garage = Garage()
    one = loader(garage)
    one.abandon()
    with pytest.raises(ModelLoadFailure, match="cancelled"):
        await one.load()
    assert garage.tried == []


async def test_a_load_whose_caller_leaves_is_freed() -> None:
    garage = Garage()
    garage.gate.clear()
    task = asyncio.create_task(loader(garage).load())
    while not garage.tried:  # noqa: ASYNC110 - another thread does that
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()
    assert garage.runners == []


@pytest.mark.parametrize(
    ("model", "context", "message"),
    [
        ({"chat_template": "{% broken"}, {}, "chat template"),
        ({"chat_template": "nonsense"}, {}, "no chat template is called 'nonsense'"),
        ({"chat_template_file": Path("/nowhere/template")}, {}, "can't read --chat-template-file"),
        ({}, {"grammar": "root ::= ("}, "--grammar or --json-schema"),
        ({}, {"json_schema": "{"}, "--grammar or --json-schema: the schema is not valid JSON"),
    ],
)
async def test_a_broken_flag_is_named_and_nothing_stays_in_memory(
    model: dict[str, Any], context: dict[str, Any], message: str
) -> None:
    garage = Garage()
    with pytest.raises(ConfigurationError, match=message):
        await loader(garage, 33, model=model, **context).load()
    (runner,) = garage.runners
    assert runner.is_closed


async def test_a_model_is_called_by_its_aliases_or_by_its_file() -> None:
    garage = Garage(path="/home/models/owner[-]repo[=]tiny.Q4_0.gguf")
    served = await load_and_close(loader(garage))
    assert (served.name, served.aliases) == ("tiny.Q4_0.gguf", ("tiny.Q4_0.gguf",))
    served = await load_and_close(loader(garage, names=("b", "a")))
    assert (served.name, served.aliases) == ("a", ("a", "b"))
    assert served.info.path.endswith("tiny.Q4_0.gguf")
    assert served.load_s >= 0.0


class Choosy(Garage):
    """Whose model no draft model fits."""

    def __call__(self, model: ModelConfig, context: ContextConfig, on_progress: OnProgress) -> ScriptedRunner:
        runner = super().__call__(model, context, on_progress)
        if context.model_draft is not None:
            raise DraftMisfit("it speaks otherwise")
        return runner


async def test_a_draft_model_that_does_not_fit_is_left_out_unless_it_must_be_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    garage, context = Choosy(), ContextConfig(model_draft=Path("draft.gguf"), spec_type="draft-simple")
    served = await load_and_close(Loader(Config(context=context), (), lambda _: None, garage))
    assert (served.config.context.model_draft, served.config.context.spec_type) == (None, "auto")
    assert caplog.messages == ["it speaks otherwise; going on without it"]
    with pytest.raises(DraftMisfit):
        await Loader(Config(context=context), (), lambda _: None, garage, 33, needs_draft=True).load()
    assert len(garage.tried) == 3, "fewer layers on the GPU do not make it fit"


async def test_biases_that_the_model_can_not_apply_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    biases = (
        (5, 1.0),
        (-1, 2.0),
        (N_VOCAB, 3.0),
        (10**20, -math.inf),
        (6, math.nan),
        (N_VOCAB - 1, -math.inf),
    )
    config = Config(context=ContextConfig(parallel=2), sampling=SamplingParams(logit_bias=biases))
    served = await load_and_close(Loader(config, (), lambda _: None, Garage()))
    assert served.config.sampling.logit_bias == ((5, 1.0), (N_VOCAB - 1, -math.inf))
    assert caplog.messages == [
        "--logit-bias: ignoring -1+2, 300+3, 100000000000000000000-inf, 6+nan; the model has tokens 0 to 299"
    ]


def render(template: str | None, **model: Any) -> str:
    info = structs.replace(ScriptedRunner().info, chat_template=template)
    return choose_template(ModelConfig(**model), info).render(USER, Rendering())


def test_the_template_of_the_flags_wins_over_the_models(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ 'from a file' }}")
    assert render("{{ 'its own' }}") == "its own"
    assert render("{{ 'its own' }}", chat_template="{{ 'given' }}") == "given"
    assert render("{{ 'its own' }}", chat_template="{{ 'given' }}", chat_template_file=file) == "from a file"


def test_a_model_without_a_usable_template_gets_chatml() -> None:
    chatml = render(None)
    assert "<|im_start|>user\nHi<|im_end|>" in chatml
    assert render("{% broken") == chatml
