"""Tools that work without a project."""
