"""Prompt encoding, denoising, decoding and early rejection."""
