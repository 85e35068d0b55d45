"""Datasets, prompts and records: what is read and written."""
