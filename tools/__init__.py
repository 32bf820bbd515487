"""Programs for people who work on Wingman; no part of the server and not installed with it.

`tinymodel` writes models for tests, `bench_serve` compares servers under load.
"""
