"""Prompt encoding, denoising and decoding."""
