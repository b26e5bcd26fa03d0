"""What every room may use: checks of numbers, files written whole, tensor files read back, assets."""

import pytest

from pqcad_ao.utils.checks import check_count, check_counts, is_whole


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 0, 64])
def test_what_is_no_whole_number_in_the_range_is_refused(value):
    assert not is_whole(value, 1, 63)
    with pytest.raises(ValueError, match=r"^n=.*: allowed are whole numbers from 1 to 63, or none$"):
        check_count("n", value, 1, 63, otherwise=", or none")


@pytest.mark.parametrize("value", [1, 63])
def test_both_ends_of_the_range_are_allowed(value):
    assert is_whole(value, 1, 63)
    check_count("n", value, 1, 63)


def test_the_first_count_that_is_wrong_is_named():
    check_counts(steps=1, rounds=2**70)
    with pytest.raises(ValueError, match=r"^rounds=0: allowed are whole numbers from 1$"):
        check_counts(steps=1, rounds=0, batch_size=-1)
