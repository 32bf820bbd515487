"""Fuzz targets: hostile bytes against the parsers that face the network.

`python -m fuzz TARGET --seconds N` runs one target. Each target is a module with `one(data)`, which
returns when its invariant (stated at its head) holds and raises when it does not, and `TOKENS`,
byte strings that make mutations meaningful. Seeds lie in `corpus/TARGET/`.
"""
