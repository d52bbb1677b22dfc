"""Command line, progress, live page and xarray accessor."""
