"""How a model is to be loaded: what --model-draft means for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import structs

from tools.tinymodel import write_llama
from wingman.config import Config, ContextConfig, ModelConfig
from wingman.errors import ModelLoadFailure
from wingman.services.deployments import Deployer, Start
from wingman.services.home import Home
from wingman.services.items import DownloadItem

REPO, PATH = "owner/repo", "tiny.gguf"


def deployer(root: Path, draft: Path | None) -> Deployer:
    home = Home(root)
    file = home.model_file(REPO, PATH)
    if not file.exists():
        home.create()
        write_llama(file)
    context = ContextConfig(ctx_size=512, model_draft=draft, spec_type="draft-simple" if draft else "auto")
    here = DownloadItem(model_repo=REPO, file_path=PATH, status="complete")
    return Deployer(Config(ModelConfig(model=file), context), home, lambda: [here])


async def test_a_draft_model_counts_and_must_fit_the_model_of_the_flag_only(tmp_path: Path) -> None:
    draft = write_llama(tmp_path / "draft.gguf")
    start = Start("chat", REPO, PATH)
    alone, both = deployer(tmp_path, None), deployer(tmp_path, draft)
    assert (await both.deploy_file()).need_bytes == 2 * (await alone.deploy_file()).need_bytes
    assert (await both.deploy(start)).need_bytes == 2 * (await alone.deploy(start)).need_bytes
    assert (await both.deploy_file()).needs_draft
    assert not (await both.deploy(start)).needs_draft


async def test_a_draft_model_that_is_not_there_is_an_error_for_the_model_of_the_flag_only(
    tmp_path: Path,
) -> None:
    missing = deployer(tmp_path, tmp_path / "none.gguf")
    with pytest.raises(ModelLoadFailure, match="is not a file"):
        await missing.deploy_file()
    found = await missing.deploy(Start("chat", REPO, PATH))
    assert (found.config.context.model_draft, found.config.context.spec_type) == (None, "auto")
    plain = await deployer(tmp_path, None).deploy(Start("chat", REPO, PATH))
    assert structs.replace(found, config=plain.config) == plain
