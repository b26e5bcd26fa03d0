"""The files of an ncnn network, and the networks that its rows of the benchmark call."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pqcad_ao.bench.compile import contenders, ncnn_files, workload
from pqcad_ao.evaluate.sqnr import sqnr_db

PARAM = """7767517
6 7
Input in0 0 1 in0
Split split 1 2 in0 a b
Convolution three 1 1 a c 0=2 1=3 2=1 3=1 4=1 5=1 6=36
Convolution one 1 1 b d 0=2 1=1 5=0 6=4
MultiHeadAttention attention 1 1 c e 0=4 1=2 2=8 3=2 4=2
GroupNorm norm 1 1 e out0 0=1 1=2 2=1e-6
"""
NUMBERS = 36 + 2 + 4 + 4 * 8 + 3 * 4 + 2 + 2 * 2
TAGS = 1 + 1 + 4


def _written(folder, values):
    """A network of random weights, as pnnx writes it."""
    param, weights = folder / "net.param", folder / "net.bin"
    param.write_text(PARAM)
    tag, take = np.uint32(0).tobytes(), iter(np.split(values, np.cumsum([36, 2, 4, 8, 4, 8, 4, 8, 4, 8, 2, 2])))
    parts = [next(take).tobytes() for _ in range(13)]
    for tagged in (0, 2, 3, 5, 7, 9):
        parts[tagged] = tag + parts[tagged]
    weights.write_bytes(b"".join(parts))
    return param, weights


def _values(seed):
    return np.random.default_rng(seed).normal(size=NUMBERS).astype(np.float32)


def test_what_is_read_is_written_again(tmp_path):
    param, weights = _written(tmp_path, _values(0))
    layers = ncnn_files.read(param, weights)
    assert [len(layer.weights) for layer in layers] == [0, 0, 2, 1, 8, 2]
    ncnn_files.write(layers, tmp_path / "again.param", tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == weights.read_bytes()
    assert (tmp_path / "again.param").read_text() == PARAM


@given(seed=st.integers(0, 1000))
def test_8_bit_weights_are_within_half_a_step(seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("net")
    param, weights = _written(folder, _values(seed))
    before, layers = ncnn_files.read(param, weights), ncnn_files.read(param, weights)
    ncnn_files.quantize(layers, {"three": 2.0, "one": 4.0})
    three, one, attention = layers[2:5]
    for layer, float_layer in zip((three, one), before[2:4], strict=True):
        weight, scale, of_input = layer.weights[0].astype(np.float32), *layer.weights[-2:]
        assert (
            np.abs(weight / scale[:, None] - float_layer.weights[0].reshape(weight.shape)).max() <= 0.5001 / scale.min()
        )
        assert of_input == 127 / (2.0 if layer is three else 4.0)
    assert np.abs(three.weights[0]).max(axis=1).tolist() == [31, 31]  # Winograd's sums have 16 bits
    assert np.abs(one.weights[0]).max(axis=1).tolist() == [127, 127]
    assert [len(scale) for scale in attention.weights[8:]] == [4, 4, 4, 1]
    assert (three.options[8], attention.options[18]) == ("2", "2")
    ncnn_files.write(layers, param, weights)
    of_8_bits, plain = 36 + 4 + 4 * 8, NUMBERS - 36 - 4 - 4 * 8
    scales = (2 + 1) + (2 + 1) + (4 * 3 + 1)
    assert weights.stat().st_size == of_8_bits + 4 * (plain + scales + TAGS)


def test_outputs_whose_weights_are_all_zero_stay_zero(tmp_path):
    param, weights = _written(tmp_path, np.zeros(NUMBERS, np.float32))
    layers = ncnn_files.read(param, weights)
    ncnn_files.quantize(layers, {"three": 1.0, "one": 0.0})
    assert all(np.isfinite(weight).all() for layer in layers for weight in layer.weights)
    assert not layers[2].weights[0].any()


def test_files_that_are_not_understood(tmp_path):
    param, weights = _written(tmp_path, _values(0))
    whole = weights.read_bytes()
    weights.write_bytes(whole + bytes(8))
    with pytest.raises(ValueError, match=r"8 bytes of net\.bin are left: one of Input, Split has weights"):
        ncnn_files.read(param, weights)
    weights.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"net\.bin ends within the weights of norm"):
        ncnn_files.read(param, weights)
    weights.write_bytes(np.uint32(ncnn_files.INT8).tobytes() + whole[4:])
    with pytest.raises(ValueError, match="the weights of three are tagged 0xd4b38"):
        ncnn_files.read(param, weights)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of assertions in diffusers
@pytest.mark.parametrize(("name", "floor", "size"), [("ncnn_fp32", 60, 1.02), ("ncnn_int8", 15, 0.35)])
def test_the_prediction_is_the_network_s(name, floor, size, tiny_dir, tmp_path):
    """Of a batch of two images, which ncnn takes one by one."""
    for package in contenders.ROWS[name].requires:
        pytest.importorskip(package)
    unet, scheduler = workload.float_model(str(tiny_dir))
    inputs = workload.trajectory_inputs(unet, scheduler, 2, seed=0)
    inputs["calibration"] = inputs["calibration"][::8]
    work = workload.Workload(unet, scheduler, threads=1, model="", folder=tmp_path, steps=20, **inputs)
    with torch.no_grad():
        expected = [workload.Step(unet)(*batch) for batch in work.check]
        contender = contenders.ROWS[name].build(work)
        given = [contender.call(*batch) for batch in work.check]
    assert sqnr_db(torch.stack(expected), torch.stack(given)) > floor
    assert contender.resident_weight_bytes < size * contenders.module_bytes(unet)
    assert "image by image" in contender.backend


def test_a_network_reads_the_inputs_it_is_given(tmp_path):
    """Not what lies where they were: numpy gives the memory of small arrays that are gone to the next ones."""
    pytest.importorskip("ncnn")
    from pqcad_ao.bench.compile.ncnn_network import NcnnNetwork

    param, weights = tmp_path / "net.param", tmp_path / "net.bin"
    param.write_text("7767517\n2 3\nInput in0 0 1 in0\nSplit split 1 2 in0 out0 other\n")
    weights.write_bytes(b"")
    network = NcnnNetwork(param, weights, threads=1)
    for size in (1, 4, 8, 16, 32):
        batch = torch.randn(3, 3, size, size)
        torch.testing.assert_close(network(batch), batch, rtol=0, atol=0)
