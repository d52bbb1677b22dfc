"""Arguments of `benchmarks.cpufit`; its figures need a library that this project does not have."""

import pytest

from benchmarks.cpufit import main


@pytest.mark.parametrize("arguments", [[], ["absent.so"], ["a.so", "b.so"]])
def test_a_missing_library_is_reported_in_one_line_that_says_what_to_give(arguments):
    with pytest.raises(SystemExit, match=r"path of Cpufit's shared library.* double precision$") as error:
        main(arguments)
    assert "\n" not in str(error.value)
