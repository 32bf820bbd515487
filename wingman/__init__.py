"""Wingman: a server that runs large language models on your own machine."""

__version__ = "0.1.0"
