"""Choosing winners; the audit of early rejection."""
