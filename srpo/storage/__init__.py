"""Files on disk: atomic writes, checksums, content hashes, scratch folders."""
