"""`srpo check`."""
