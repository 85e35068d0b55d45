"""Metrics over images and scores, with their intervals, and the gate."""
