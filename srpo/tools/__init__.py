"""Commands that need no project."""
