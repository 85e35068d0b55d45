"""MLflow: what to record, and recording it."""
