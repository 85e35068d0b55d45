"""Reward models: one file per family."""
