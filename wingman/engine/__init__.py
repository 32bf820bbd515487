"""Continuous batching over one model: a scheduler thread that no client can wedge.

`client` is the loop's side, `thread` the engine's; between them travel the frozen values of
`types`. `scheduler`, `sequence`, `slots` and `detokenizer` are pure; `llama` does the work.
"""
