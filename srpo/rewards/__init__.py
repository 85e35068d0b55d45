"""Reward models: one file per family, their loading, and image preprocessing."""
