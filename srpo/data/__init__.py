"""Datasets, prompts and records.

Latents are read with `srpo.data.parquet.RowReader`: `RowReader(folder).latents(numbers, column)` returns float16
[n, channels, height, width] of the rows with these numbers, read from memory-mapped files row group by row group.
"""
