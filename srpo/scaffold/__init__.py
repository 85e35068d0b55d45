"""`srpo init`."""
