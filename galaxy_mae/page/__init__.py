"""Pages of results: one HTML file each, which opens from disk and loads nothing from elsewhere."""
