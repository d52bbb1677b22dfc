"""Compiled code: rows [J r] and their reduction, many small fits at once, the rules of a trust region."""
