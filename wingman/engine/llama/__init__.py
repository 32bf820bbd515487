"""The llama.cpp runtime, through llama-cpp-python's low-level API. Nothing else imports it.

`binding` loads and checks the shared library, `model` holds weights and vocabulary, `context`
the KV cache and the batch, `sampler` the sampler chains, `runner` puts them together.
"""

from wingman.engine.llama.runner import LlamaRunner

__all__ = ["LlamaRunner"]
