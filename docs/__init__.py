"""The documentation, and what mkdocs generates of it."""
