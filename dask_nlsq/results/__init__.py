"""Results: statistics, uncertainty, diagnostics, pictures, reports, files."""
