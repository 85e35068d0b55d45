"""Prefect over DVC: schedules, retries, cancellation and artifacts. Nothing here computes."""
