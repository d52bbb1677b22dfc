"""A demonstration with a known answer."""
