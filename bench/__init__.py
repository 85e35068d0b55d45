"""Benchmarks: this project's code beside what a user would otherwise run, in one process and on the same data."""
