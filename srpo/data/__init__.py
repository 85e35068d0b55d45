"""Datasets, prompts and records.

Latents are read with `srpo.data.parquet.RowReader`: `RowReader(folder).latents(numbers, column)` returns float16
[n, channels, height, width] of the rows with these numbers, of which only the row groups
that hold these rows are read.
"""
