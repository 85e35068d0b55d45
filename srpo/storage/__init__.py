"""Files: atomic writes, hashes, scratch folders."""
