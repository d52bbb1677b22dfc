"""One fit per pixel."""
