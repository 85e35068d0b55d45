"""params.yaml: its schema, its loader, the tree of rounds."""
