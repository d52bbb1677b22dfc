"""Command line and xarray accessor."""
