"""Measures over sets of pictures and of scores."""
