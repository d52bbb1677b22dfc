"""User arrays and stores become aligned data."""
