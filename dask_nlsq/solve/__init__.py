"""The trust-region loop, its subproblem, many starts and the fit of a sample."""
