"""Configuration, files, single values, text: what every other folder uses."""
