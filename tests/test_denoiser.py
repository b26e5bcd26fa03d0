"""How a network is called, and with which conditioning."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pqcad_ao.denoiser import spread_rows


@given(st.integers(1, 40), st.integers(1, 40))
def test_samples_share_out_all_rows_of_the_conditioning(count, rows):
    chosen = spread_rows({"nested": {"label": torch.arange(rows)}}, torch.arange(count), count)["nested"]["label"]
    assert len(chosen) == count
    times = torch.bincount(chosen, minlength=rows)
    assert times.max() - times.min() <= 1  # no row oftener than another by more than one
    if count > 1 and rows > count:
        assert (chosen.diff() - rows / count).abs().max() < 1
