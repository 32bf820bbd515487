"""GET /v1/models, /models and /v1/models/{id}; GET /props."""

from __future__ import annotations

import dataclasses
from typing import Any

import orjson

from wingman.api.settings import settings_of
from wingman.engine.types import Job
from wingman.errors import NotFound, NotSupported
from wingman.http.messages import Request, Response
from wingman.options import RANDOM_SEED
from wingman.services.inference import Inference
from wingman.services.served import ServedModel


def list_models(inference: Inference) -> Response:
    """The models, in OpenAI's and in Ollama's shape: those in memory, then those a request may name."""
    loaded = inference.loaded
    waiting = [_waiting_body(name) for name in inference.startable()]
    body = {
        "object": "list",
        "data": [*map(_model_body, loaded), *waiting],
        "models": [*map(_ollama_body, loaded)],
    }
    return Response(200, orjson.dumps(body))


def get_model(inference: Inference, request: Request) -> Response:
    """One model by any of its names."""
    name = request.params["id"]
    for served in inference.loaded:
        if name in served.aliases:
            return Response(200, orjson.dumps(_model_body(served)))
    if name in inference.startable():
        return Response(200, orjson.dumps(_waiting_body(name)))
    raise NotFound(f"no model is called {name!r}")


def _waiting_body(name: str) -> dict[str, Any]:
    """A downloaded model that is loaded when a request names it."""
    return {
        "id": name,
        "aliases": [name],
        "tags": [],
        "object": "model",
        "created": 0,
        "owned_by": "llamacpp",
        "status": {"value": "unloaded"},
    }


def _model_body(served: ServedModel) -> dict[str, Any]:
    info = served.info
    return {
        "id": served.name,
        "aliases": served.aliases,
        "tags": [],
        "object": "model",
        "created": int(served.loaded_at),
        "owned_by": "llamacpp",
        "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
        "meta": {
            "vocab_type": info.vocab_type,
            "n_vocab": info.n_vocab,
            "n_ctx": info.n_ctx_slot,
            "n_ctx_train": info.n_ctx_train,
            "n_embd": info.n_embd,
            "n_params": info.n_params,
            "size": info.size_bytes,
            "ftype": info.ftype,
        },
    }


def _ollama_body(served: ServedModel) -> dict[str, Any]:
    architecture = served.info.metadata.get("general.architecture", "")
    return {
        "name": served.name,
        "model": served.name,
        "modified_at": "",
        "size": str(served.info.size_bytes),
        "digest": "",
        "type": "model",
        "description": served.info.description,
        "tags": [],
        "capabilities": _capabilities(served),
        "parameters": "",
        "details": {
            "parent_model": "",
            "format": "gguf",
            "family": architecture,
            "families": [architecture],
            "parameter_size": "",
            "quantization_level": served.info.ftype,
        },
    }


def _capabilities(served: ServedModel) -> list[str]:
    if not served.info.can_generate:
        return ["embedding"]
    return ["completion", "insert"] if served.info.fim else ["completion"]


def get_props(served: ServedModel, _: Request) -> Response:
    """Server properties: llama-server's, with the original Wingman's beside."""
    info, config = served.info, served.config
    settings = settings_of(_default_job(served), config, served.name)
    body = {
        "user_name": "",
        "assistant_name": "",
        "default_generation_settings": settings
        | {"params": settings, "n_ctx": info.n_ctx_slot, "seed": _shown_seed(settings["seed"])},
        "total_slots": info.n_slots,
        "model_alias": served.name,
        "model_path": info.path,
        "model_ftype": info.ftype,
        "modalities": {"vision": False, "video": False, "audio": False},
        "endpoint_slots": config.server.slots,
        "endpoint_props": config.server.props,
        "endpoint_metrics": config.server.metrics,
        "chat_template": served.template.source,
        "chat_template_caps": served.template.caps.to_dict(),
        "bos_token": info.bos_token,
        "eos_token": info.eos_token,
        "build_info": info.build,
        "system_info": info.system_info,
        "is_sleeping": False,
        "media_marker": "",
        "cors_proxy_enabled": False,
        "ui": False,
        "ui_settings": {},
    }  # fmt: skip
    return Response(200, orjson.dumps(body))


def set_props(served: ServedModel, _: Request) -> Response:
    """POST /props: there is nothing to change, as in llama-server."""
    if not served.config.server.props:
        raise NotSupported("This server does not support changing global properties. Start it with `--props`")
    return Response(200, orjson.dumps({"success": True}))


def _shown_seed(seed: int) -> int:
    """The original Wingman shows -1 for a random seed."""
    return -1 if seed == RANDOM_SEED else seed


def _default_job(served: ServedModel) -> Job:
    context = served.config.context
    return Job(
        0,
        (),
        dataclasses.replace(served.config.sampling),
        n_predict=context.n_predict,
        n_keep=context.n_keep,
        stop=context.reverse_prompt,
        stream=True,
    )
