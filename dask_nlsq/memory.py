"""What memory there is."""

import psutil


def available_memory() -> float:
    """Bytes of physical memory that this machine has available now."""
    return float(psutil.virtual_memory().available)
