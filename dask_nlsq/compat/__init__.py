"""Names of NLSQ and homodyne, on top of everything."""
