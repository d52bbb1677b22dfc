"""Bits of the package's own files that have flipped are found; `tests.damage` is the figure of many more."""

import pytest

from tests.damage import KEPT, flip


@pytest.mark.parametrize(
    "n, names",
    [
        (12, ["result"]),
        pytest.param(60, ["map"], marks=pytest.mark.slow),
        pytest.param(150, [*KEPT], marks=pytest.mark.slow),
    ],
    ids=["results", "maps", "all"],
)
def test_no_flipped_bit_of_any_file_is_silent_and_each_is_one_error_that_names_the_file(n, names):
    counts, wrong = flip(n, names=names)
    assert not wrong and any(verdict == "found" for _, verdict in counts)
