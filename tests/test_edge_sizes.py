"""A .pte for several batch sizes: which may be asked for, how images are shared out, and what its methods compute."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import SHAPE, Plain, Small, cosine_scheduler, quick
from torch import Tensor, nn

from pqcad_ao import CacheConfig, PTESampler, cache_, export_pte, quantize_
from pqcad_ao.edge import export
from pqcad_ao.edge.parity import ParityError
from pqcad_ao.edge.report import PTEReport
from pqcad_ao.edge.sizes import check_sizes, ending, shared_out

WALK = {"scheduler": cosine_scheduler(), "num_inference_steps": 3, "sample_shape": SHAPE, "progress": False}


@given(st.integers(0, 200), st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True))
def test_every_image_is_drawn_once_and_in_calls_as_large_as_can_be(count, sizes):
    calls = shared_out(count, sizes)
    assert sum(images for images, _ in calls) == count
    assert all(1 <= images <= size and size in sizes for images, size in calls)
    assert all(images == size for images, size in calls[:-1]), "the last call alone has places left"
    assert all(before >= after for (_, before), (_, after) in pairwise(calls)), "the largest first"
    left = count
    for images, size in calls:
        assert size == max((s for s in sizes if s <= left), default=min(sizes))
        left -= images


@pytest.mark.parametrize(
    "wrong", [0, 1.5, True, "14", None, [], [1, 1], [0, 4], [1, 4.0], [1, True], [[1, 4]], (4, 4), {1, 4}]
)
def test_sizes_that_there_cannot_be_are_named(wrong):
    with pytest.raises(ValueError, match=r"^batch_size=.*: allowed are whole numbers from 1, one or a list without"):
        check_sizes(wrong)


def test_a_first_size_keeps_the_names_of_a_single_one():
    assert check_sizes(4) == check_sizes([4]) == check_sizes((4,)) == [4]
    assert [ending(check_sizes([4, 1, 2]), size) for size in (4, 1, 2)] == ["", "_1", "_2"]


def exported(unet: nn.Module, path: Path, batch_size: int | list[int], **options) -> PTEReport:
    pytest.importorskip("executorch.exir", reason="executorch is not installed: pip install pqcad_ao[edge]")
    return export_pte(unet, path, batch_size=batch_size, trajectories=2, **{**WALK, **options})


def quantized(unet: nn.Module) -> nn.Module:
    quantize_(unet, quick(), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    return unet


def noise(count: int) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(count))


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True], ids=["in full", "with a cache plan"])
def test_a_file_for_two_sizes_draws_what_two_files_draw(cached, tmp_path, monkeypatch):
    unet = quantized(Small())
    if cached:
        cache_(unet, CacheConfig(points=4), **WALK)
    both = exported(unet, tmp_path / "both.pte", [3, 2])
    three, two = (exported(unet, tmp_path / f"{size}.pte", size) for size in (3, 2))
    assert both.sqnr_db == {t: min(three.sqnr_db[t], two.sqnr_db[t]) for t in three.sqnr_db}
    sampler, of_three, of_two = (PTESampler(report.path) for report in (both, three, two))
    assert (sampler.batch_size, sampler.batch_sizes) == (3, [3, 2])
    assert (of_three.batch_sizes, of_two.batch_sizes) == ([3], [2])
    x = noise(9)
    for drawn, expected in (
        (sampler.sample(x), of_three.sample(x)),
        (sampler.sample(x[:8]), torch.cat([of_three.sample(x[:6]), of_two.sample(x[6:8])])),
        (sampler.sample(x[:4]), torch.cat([of_three.sample(x[:3]), of_two.sample(x[3:4])])),  # the last is filled up
        (sampler.predict(x[:2], 1), of_two.predict(x[:2], 1)),
        (sampler.step(x[:3], 1), of_three.step(x[:3], 1)),
    ):
        assert torch.equal(drawn, expected)
    assert sampler.sample(x[:0]).shape == (0, *SHAPE)
    assert sampler._program.load_method("image_2").execute([x[:2]])[0].shape == (2, 8, 8, 1)
    with pytest.raises(ValueError, match=r"exported for \(3, 1, 8, 8\) and \(2, 1, 8, 8\)"):
        sampler.step(x[:1], 0)

    constant = sampler._constant
    for sizes in ([], [2, 3], [3, 3], [3, 0], [[3]]):
        damaged = {"batch_sizes": torch.tensor(sizes)}
        monkeypatch.setattr(sampler, "_constant", lambda name, d=damaged: d[name] if name in d else constant(name))
        with pytest.raises(ValueError, match="batch_size"):
            sampler._read_constants()


@pytest.mark.slow
def test_two_sizes_share_the_weights(tmp_path):
    class Wide(Plain):
        def build(self):
            self.wide = nn.Sequential(nn.Conv2d(8, 2048, 3, padding=1), nn.Conv2d(2048, 8, 3, padding=1))

        def middle(self, h):
            return h + self.wide(h)

    unet = quantized(Wide())
    one, two = exported(unet, tmp_path / "one.pte", [1]), exported(unet, tmp_path / "two.pte", [1, 4])
    assert two.plan == one.plan
    assert one.bytes < two.bytes < 1.25 * one.bytes


@pytest.mark.slow
def test_a_further_size_that_departs_from_the_network_is_not_written(tmp_path, monkeypatch):
    rewrite = export._rewrite

    def wrong(graph, *args):
        graph, arithmetic = rewrite(graph, *args)
        x_t = next(node for node in graph.graph.nodes if node.op == "placeholder")
        if x_t.meta["val"].shape[0] == 2:
            graph.last_weight_0 = graph.last_weight_0.roll(1, 1)
        return graph, arithmetic

    monkeypatch.setattr(export, "_rewrite", wrong)
    with pytest.raises(ParityError, match="the lowered program departs from the network in batches of 2: "):
        exported(quantized(Plain()), tmp_path / "a.pte", [1, 2])
    assert list(tmp_path.iterdir()) == []
