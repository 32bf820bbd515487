"""Connections, listeners and routing on asyncio. Knows no engine and no JSON schema."""
