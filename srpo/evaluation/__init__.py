"""Metrics over images and scores; the gate."""
