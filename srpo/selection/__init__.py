"""Selection of winners; the audit of early rejection."""
