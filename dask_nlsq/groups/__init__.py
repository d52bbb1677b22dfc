"""Fits with parameters that all data share and others of their own for each group."""
