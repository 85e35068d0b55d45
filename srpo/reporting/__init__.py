"""Pages, charts, contact sheets, tables."""
