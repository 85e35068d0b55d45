"""Simple Rejection Preference Optimization: SDXL fine-tuning by rejection sampling, with lineage."""

__version__ = "0.2.0"
