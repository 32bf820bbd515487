"""Loop-side domain services: what is loaded, what is measured, where files come from."""
