"""Conversations -> prompts. Pure: no engine, no HTTP."""
