"""The llama.cpp runtime, through llama-cpp-python's low-level API. Nothing else imports it.

`binding` loads and checks the shared library, `weights` loads a model, `model` knows its vocabulary, `context` has
the KV cache and the batch, `sampler` the sampler chains, `runner` puts them together.
"""
