"""What is seen of a fit while it runs: bars, printed lines, the live page."""
