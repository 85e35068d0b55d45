"""Provenance of adapters."""
