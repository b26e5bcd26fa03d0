"""``torch.compile(unet, backend="pqcad")``: found by name, one graph, no recompiling, the eager network's values."""

import re
import subprocess
import sys
import warnings
import zipfile
from collections import Counter

import pytest
import torch
from diffusers import DDIMScheduler
from networks import SHAPE, Plain, Small, cosine_scheduler, quick, sqnr
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.nn import functional as F

from pqcad_ao import plan, quantize_
from pqcad_ao.compile import backend
from pqcad_ao.compile.backend import fuse, pqcad
from pqcad_ao.compile.loaded import load_pt2
from pqcad_ao.compile.package import _one_schedule, export_pt2
from pqcad_ao.denoiser import Denoiser
from pqcad_ao.diffusion.sampling import sample
from pqcad_ao.graph.arguments import bind
from pqcad_ao.graph.capture import capture
from pqcad_ao.passes.attention_kernel import ATTENTION, attention_kernel
from pqcad_ao.passes.fold_timesteps import fold_timesteps
from pqcad_ao.passes.fuse_addends import ADD, fuse_addends
from pqcad_ao.passes.fuse_quantize import CAT, GROUP_NORM, QUANTIZE, SILU, UPSAMPLE, fuse_quantize
from pqcad_ao.passes.identities import drop_identities
from pqcad_ao.passes.inline import traced
from pqcad_ao.passes.join_linears import join_linears
from pqcad_ao.utils import machine
from pqcad_ao.utils.machine import cpu_flags

FUSED = torch.ops.pqcad.norm_silu_quantize
CONV = {torch.ops.pqcad.conv2d, torch.ops.pqcad.conv2d.default}
LINEAR = {torch.ops.pqcad.linear, torch.ops.pqcad.linear.default}


def quantized(model: nn.Module, **options) -> nn.Module:
    quantize_(model, quick(**options), scheduler=cosine_scheduler(), sample_shape=SHAPE, progress=False)
    return model


def noise(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(seed))


def at(timestep: int, batch: int = 2) -> Tensor:
    return torch.full((batch,), timestep)


def graph_of(model: nn.Module, *inputs):
    """The graph that torch.compile hands to a backend, and a call of it."""
    found = []

    def keep(graph, example_inputs):
        if any(node.target in QUANTIZE or node.target in CONV for node in graph.graph.nodes):
            found.append((graph, example_inputs))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep)(*inputs)
    assert len(found) == 1
    return found[0]


def count(graph, targets) -> int:
    return sum(node.target in targets for node in graph.graph.nodes)


# -------------------------------------------------------------------------------------------------- the passes


@torch.no_grad()
def test_everything_in_front_of_a_quantizer_is_fused(quantized_unet):
    graph, inputs = graph_of(quantized_unet, noise(), at(500))
    before = graph(*inputs)
    assert fuse(graph) == 25 + 4 * 4  # convolutions, and the linears of four attentions
    assert count(graph, QUANTIZE) == 4  # what attention's output projections read
    fused = [node for node in graph.graph.nodes if node.target is FUSED]
    assert len(fused) == 37
    assert sum(len(node.args[0]) == 2 for node in fused) == 8  # four concatenations, each with a norm and a shortcut
    assert {node.args[-1] for node in fused} == {1, 2}
    assert count(graph, {F.group_norm, F.interpolate}) == 0
    # rounding is all that moves, and only values on a threshold
    for expected, found in zip(before, graph(*inputs), strict=True):
        assert sqnr(expected, found) > 60


@torch.no_grad()
def test_addends_go_into_the_convolutions(quantized_unet):
    graph, inputs = graph_of(quantized_unet, noise(), at(500))
    before = graph(*inputs)
    drop_identities(graph)
    convolutions = count(graph, CONV)
    assert fuse_addends(graph) == 16  # two for each of eight residual blocks
    assert count(graph, CONV) == convolutions
    for expected, found in zip(before, graph(*inputs), strict=True):
        assert sqnr(expected, found) > 60


KINDS = {
    "convolutions": CONV,
    "linears": LINEAR,
    "fused quantizers": {FUSED},
    "quantizers": QUANTIZE,
    "attentions": ATTENTION,
    "sums": ADD,
    "left in floating point": CAT | GROUP_NORM | SILU | UPSAMPLE,
}


def of_the_image(graph: GraphModule) -> Counter[str]:
    """How often each kind of operator stands in a fused graph, but for those of the timestep's embedding."""
    # what a pass has put in by itself was not traced
    image = [node for node in graph.graph.nodes if getattr(traced(node), "ndim", 4) > 2]
    found = Counter(kind for node in image for kind, targets in KINDS.items() if node.target in targets)
    found["addends"] = sum(bind(node)["addend"] is not None for node in image if node.target in CONV)
    return found


@torch.no_grad()
def test_torch_compile_and_packages_run_the_same_operators(quantized_unet):
    graph, _ = graph_of(quantized_unet, noise(), at(500))
    package = bound(quantized_unet)
    fuse(graph)
    fuse(package)
    compiled, expected = of_the_image(graph), of_the_image(package)
    assert expected["left in floating point"] == 0
    # a package knows that the grids of a block's queries, keys and values stay equal; compiled, they may be replaced
    expected["fused quantizers"] += 2 * expected["attentions"]
    assert compiled == expected
    # where timesteps are an input, what a package has tables of reads packed weights, one projection for each block
    assert count(graph, {torch.ops.pqcad.weight_only_linear}) == 8


@torch.no_grad()
def test_a_layers_numbers_are_guarded_as_one(small):
    """A list would be guarded number by number, at every call."""
    torch._dynamo.reset()
    names: list[str] = []

    def keep(entries) -> list[bool]:
        names.extend(entry.name for entry in entries)
        return [True] * len(entries)

    compiled = torch.compile(small, backend=lambda graph, _: graph.forward, options={"guard_filter_fn": keep})
    compiled(noise(), at(500))
    numbers = r"\.(segments|kernel_size|stride|padding|dilation)"
    assert any(re.search(numbers + "$", name) for name in names)
    assert not [name for name in names if re.search(numbers + r"\[", name)]


class Awkward(Plain):
    """Sums and norms that must stay as they are."""

    def build(self) -> None:
        self.one, self.two, self.three = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.norm = nn.GroupNorm(2, 8)

    def middle(self, h: Tensor) -> Tensor:
        one = self.one(h)
        normal = self.norm(one)
        two = self.two(F.silu(normal)) + normal  # the norm has a second reader
        three = self.three(F.interpolate(two, scale_factor=2.0, mode="bilinear"))[:, :, ::2, ::2]
        return three + one.mean((0, 2, 3), keepdim=True) + one * one  # one is read three times; no addend of a batch


@torch.no_grad()
def test_what_something_else_reads_stays():
    model = quantized(Awkward())
    graph, inputs = graph_of(model, noise(), at(300))
    (before,) = graph(*inputs)
    fuse(graph)
    assert count(graph, {F.group_norm}) == 1
    assert count(graph, {F.interpolate}) == 1
    (after,) = graph(*inputs)
    assert sqnr(before, after) > 60


class InPlace(Awkward):
    """Operators that change a tensor which something else reads afterwards."""

    def middle(self, h: Tensor) -> Tensor:
        total = self.one(h) * 1.5
        normal = self.norm(total)
        total += self.two(F.silu(normal, inplace=True))
        return self.three(normal) + total


@torch.no_grad()
def test_changes_in_place_keep_their_meaning():
    model = quantized(InPlace())
    graph, inputs = graph_of(model, noise(), at(300))
    fuse(graph)
    (found,) = graph(*inputs)
    assert sqnr(model(noise(), at(300)), found) > 60


class Spelled(Awkward):
    """Keywords for every argument, and a convolution that is added to itself."""

    def middle(self, h: Tensor) -> Tensor:
        h = F.dropout(input=torch.cat(tensors=[self.one(h), h], dim=1), p=0.5, training=False)
        normal = F.group_norm(input=h[:, :8], num_groups=2)
        two = self.two(F.interpolate(input=F.silu(input=normal), scale_factor=2.0, mode="nearest"))[:, :, ::2, ::2]
        return self.three(torch.cat(tensors=[two[:, :4], h[:, 8:12]], dim=1)) + (two + two)


class SelfAdded(Awkward):
    def middle(self, h: Tensor) -> Tensor:
        h = self.one(h)
        return h + h


@pytest.mark.parametrize("network", [Spelled, SelfAdded])
@torch.no_grad()
def test_any_way_to_write_it_is_understood(network):
    model = quantized(network())
    graph, inputs = graph_of(model, noise(), at(300))
    fuse(graph)
    (found,) = graph(*inputs)
    assert sqnr(model(noise(), at(300)), found) > 60


@torch.no_grad()
def test_the_passes_take_exported_graphs_too():
    model = quantized(Small())
    captured = capture(model, SHAPE, {})
    call = (noise(2), at(700), {})
    before = captured.graph(*call)
    drop_identities(captured.graph)
    assert fuse_quantize(captured.graph) == 10
    assert fuse_addends(captured.graph) == 2
    assert sqnr(before, captured.graph(*call)) > 60
    assert sqnr(Denoiser(model)(*call), before) > 60


class Attention(nn.Module):
    """Attention that the kernel can compute, and attention that it cannot."""

    def forward(self, query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        plain = F.scaled_dot_product_attention(query, key, key)
        scaled = F.scaled_dot_product_attention(query, key, key, scale=0.1)
        masked = F.scaled_dot_product_attention(query, key, key, mask)
        return plain, scaled, masked, F.scaled_dot_product_attention(query, key, key, is_causal=True)


@torch.no_grad()
def test_attention_on_its_own_kernel_multiplies_bfloat16():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, count, 8, generator=generator) for count in (5, 4))
    inputs = (query, key, torch.ones(5, 4, dtype=torch.bool))
    graph = torch.export.export(Attention(), inputs).module(check_guards=False)
    before = graph(*inputs)
    assert attention_kernel(graph) == 2
    for expected, found in zip(before, graph(*inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2**-6)


def test_another_attention_is_refused(tmp_path, quantized_unet):
    with pytest.raises(ValueError, match="attention='int8': allowed are 'float32', 'bfloat16'"):
        export_pt2(quantized_unet, tmp_path / "unet.pt2", attention="int8")
    with pytest.raises(ValueError, match="attention='int8'"):
        pqcad(GraphModule({}, Graph()), [], options={"attention": "int8"})


SCHEDULE = torch.tensor([700, 300])


def bound(model: nn.Module):
    """The graph of a network for batches of two at the steps of SCHEDULE, its timesteps folded."""
    graph = torch.export.export(Denoiser(model), (noise(), at(0), {})).module(check_guards=False)
    drop_identities(graph)
    return fold_timesteps(graph, [node for node in graph.graph.nodes if node.op == "placeholder"][1], SCHEDULE)


@torch.no_grad()
def test_one_row_of_the_time_embedding_is_an_addend_of_every_sample():
    model = quantized(Plain())
    graph = bound(model)
    fuse(graph)
    assert count(graph, ADD) == 0
    for step, timestep in enumerate(SCHEDULE):
        assert sqnr(model(noise(), at(int(timestep))), graph(noise(), torch.tensor([step]), {})) > 60


@pytest.mark.parametrize(("other_grid", "joined"), [(False, 2), (True, 1)], ids=["one grid", "keys have their own"])
@torch.no_grad()
def test_with_a_schedule_attention_is_projected_at_once(other_grid, joined):
    """Queries, keys and values read one quantizer, where their grids are equal at every step."""
    model = quantized(Small())
    if other_grid:
        model.to_k.set_grid(model.to_k.input_scale * 1.1, model.to_k.input_low)
    graph = bound(model)
    assert fuse(graph) == 10 - joined
    before = [graph(noise(), torch.tensor([step]), {}) for step in range(2)]
    assert join_linears(graph) == joined
    assert count(graph, LINEAR) == 4 - joined
    for step, timestep in enumerate(SCHEDULE):
        assert torch.equal(graph(noise(), torch.tensor([step]), {}), before[step])
        assert sqnr(model(noise(), at(int(timestep))), before[step]) > 45


# ------------------------------------------------------------------------------------------------- the backend


@torch.no_grad()
def test_compiled_equals_eager_over_a_trajectory(quantized_unet):
    compiled = torch.compile(quantized_unet, backend="pqcad", fullgraph=True)
    for step, timestep in enumerate((999, 700, 400, 100, 0)):
        x = noise(seed=step)
        expected, found = quantized_unet(x, at(timestep)).sample, compiled(x, at(timestep)).sample
        assert sqnr(expected, found) > 45


@torch.no_grad()
def test_it_compiles_once_for_timesteps_and_once_more_for_batches(small):
    torch._dynamo.reset()
    graphs = []

    def counting(graph, example_inputs):
        if count(graph, QUANTIZE):
            graphs.append(graph)
        return pqcad(graph, example_inputs)

    compiled = torch.compile(small, backend=counting, fullgraph=True)
    for timestep in (999, 501, 3):
        compiled(noise(2), at(timestep, 2))
    assert len(graphs) == 1
    for batch in (3, 5, 7):
        x = noise(batch)
        assert sqnr(small(x, at(10, batch)), compiled(x, at(10, batch))) > 45
    assert len(graphs) == 2


@torch.no_grad()
def test_a_float_network_passes_through_and_is_told():
    torch._dynamo.reset()
    model = Small()
    with pytest.warns(
        UserWarning, match=r"no layer quantized by pqcad_ao among 11 convolutions and linears.*quantize_"
    ):
        found = torch.compile(model, backend="pqcad")(noise(), at(10))
    assert sqnr(model(noise(), at(10)), found) > 80


@torch.no_grad()
def test_inductors_configuration_stays_as_it_was():
    """And of what the backend sets for a quantized network, one call's code shows it."""
    import torch._inductor.config as inductor
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    before = inductor.save_config_portable()
    model = quantized(Plain())
    model(noise(), at(10))  # the kernels, or the warning that there are none
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled = torch.compile(model, backend="pqcad", options={"epilogue_fusion": False})
        found, code = run_and_get_code(compiled, noise(), at(10))
    assert sqnr(model(noise(), at(10)), found) > 45
    assert "torch.ops.pqcad." in code[-1]
    assert "assert_size_stride(" not in code[-1]
    assert inductor.save_config_portable() == before


@pytest.mark.slow
@torch.no_grad()
def test_bfloat16_networks_compile():
    torch._dynamo.reset()
    model = quantized(Small()).to(torch.bfloat16)
    x = noise().to(torch.bfloat16)
    expected, found = model(x, at(200)), torch.compile(model, backend="pqcad")(x, at(200))
    assert found.dtype == torch.bfloat16
    assert sqnr(expected.float(), found.float()) > 15  # bfloat16 between the layers: 8 bits, rounded elsewhere


@pytest.mark.slow
@torch.no_grad()
def test_on_a_gpu_inductor_writes_the_quantizers_itself(monkeypatch):
    """What a GPU's graph goes through, here on the CPU and with the convolutions left to its kernels."""
    torch._dynamo.reset()
    monkeypatch.setattr(backend, "has_gpu_kernels", lambda device: True)
    monkeypatch.setattr(backend, "to_triton", lambda graph, form: 0)
    monkeypatch.setattr(backend.reference, "_check_finite", lambda values: None)  # as on a GPU
    model = quantized(Small())
    compiled = torch.compile(model, backend="pqcad")
    # whose key of a graph does not hold the decompositions: it knows the same graph as the CPU's own (torch 2.13). By
    # `patch`, as monkeypatch puts back a setting of torch's by deleting it
    with torch._functorch.config.patch(enable_autograd_cache=False):
        compiled(noise(), at(200))
    with torch.profiler.profile() as profile:
        found = compiled(noise(), at(200))
    called = {event.key for event in profile.key_averages()}
    assert "pqcad::conv2d" in called
    assert not called & {"pqcad::quantize", "pqcad::norm_silu_quantize"}
    assert sqnr(model(noise(), at(200)), found) > 45


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("bits", [(4, 8), (8, 8), (3, 4), (4, None)])
def test_other_widths_compile(bits):
    torch._dynamo.reset()
    model = quantized(Small(), weight_bits=bits[0], activation_bits=bits[1])
    found = torch.compile(model, backend="pqcad")(noise(), at(200))
    assert sqnr(model(noise(), at(200)), found) > 45


@pytest.mark.slow
@torch.no_grad()
def test_it_works_in_a_pipeline(quantized_unet, scheduler):
    from diffusers import DDIMPipeline

    torch._dynamo.reset()
    call = {"num_inference_steps": 3, "batch_size": 2, "output_type": "np"}
    images = []
    for unet in (quantized_unet, torch.compile(quantized_unet, backend="pqcad")):
        pipe = DDIMPipeline(unet, scheduler)
        pipe.set_progress_bar_config(disable=True)
        images.append(torch.from_numpy(pipe(**call, generator=torch.Generator().manual_seed(0)).images))
    assert sqnr(*images) > 30


def test_the_name_is_enough(tmp_path, quantized_unet):
    """Installation alone makes the string work: nothing of the package is imported before torch.compile sees it."""
    program = (
        "import torch, sys; assert 'pqcad' in torch.compiler.list_backends(); assert 'pqcad_ao' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


# ---------------------------------------------------------------------------------------------- AOTInductor


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A small network and its package with a scheduler."""
    model = quantized(Plain())
    path = tmp_path_factory.mktemp("package") / "unet.pt2"
    export_pt2(model, path, scheduler=cosine_scheduler(), sample_shape=SHAPE)
    return model, path


LOAD = """
import sys, torch
from pqcad_ao.compile.loaded import load_pt2
unet = load_pt2(sys.argv[1])
x = torch.load(sys.argv[2])
torch.save([unet(x, 400), unet(x[:1], torch.tensor([10])), unet.sample(x, 3)], sys.argv[3])
"""


@torch.no_grad()
def test_a_package_runs_in_a_fresh_process(package, tmp_path):
    model, path = package
    x = noise(5)
    torch.save(x, tmp_path / "x.pt")
    files = [str(path), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    subprocess.run([sys.executable, "-c", LOAD, *files], check=True)
    five, one, images = torch.load(tmp_path / "y.pt")
    assert sqnr(model(x, at(400, 5)), five) > 45
    assert sqnr(model(x[:1], at(10, 1)), one) > 45
    assert sqnr(sample(model, cosine_scheduler(), x, 3), images) > 30


def test_a_package_refuses_what_it_cannot_take(package):
    unet = load_pt2(package[1])
    with pytest.raises(ValueError, match=r"shape \(2, 1, 8, 9\): this package takes \(1 to 63, 1, 8, 8\)"):
        unet(torch.zeros(2, 1, 8, 9), 3)
    with pytest.raises(ValueError, match="1 to 63"):
        unet(torch.zeros(64, *SHAPE), 3)


def test_a_foreign_or_damaged_package_is_refused_before_its_code_is_loaded(package, tmp_path, monkeypatch):
    monkeypatch.setattr("pqcad_ao.compile.loaded._program", lambda *_: pytest.fail("its code was loaded"))
    content = package[1].read_bytes()
    path = tmp_path / "other.pt2"
    for at in (len(content) // 3, 2 * len(content) // 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(
            ValueError, match=r"other\.pt2 is no package that pqcad_ao\.export_pt2 wrote, or is damaged"
        ):
            load_pt2(path)
    for changed in (content[:-100], b"no archive", b""):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="or is damaged"):
            load_pt2(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("unet/data/aotinductor/model/wrapper_metadata.json", "{}")
        archive.writestr("unet/data/aotinductor/model/wrapper.so", b"code")
    with pytest.raises(ValueError, match="the exporter's description is not in it"):
        load_pt2(path)


def test_a_package_for_another_processor_is_refused_before_its_code_is_loaded(package, monkeypatch):
    monkeypatch.setattr("pqcad_ao.compile.loaded._program", lambda *_: pytest.fail("its code was loaded"))
    lesser = cpu_flags() - {"avx2", "asimd"}
    monkeypatch.setattr(machine, "cpu_flags", lambda: lesser)
    with pytest.raises(ValueError, match=r"unet\.pt2 was compiled for a processor with (avx2|asimd): export"):
        load_pt2(package[1])


def test_loading_a_package_asks_no_compiler(package, monkeypatch):
    """PyTorch's own way tries what it can do, which takes a second in each process, and longer in the first."""
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", lambda: pytest.fail("a compiler was tried"))
    load_pt2(package[1])


@torch.no_grad()
@pytest.mark.parametrize("chained", [True, False])
def test_a_package_bound_to_a_schedule_calls_its_operators_in_chains(chained, monkeypatch):
    """Where all values are small: larger ones would scatter over the heap."""
    model = quantized(Small())
    if not chained:
        monkeypatch.setattr(backend, "LARGEST_CHAINED", 16)
    programs = _one_schedule(model, None, noise(2), {}, torch.tensor([999, 499]), "float32")
    targets = [node.target for node in programs["model"].graph.nodes]
    assert (torch.ops.pqcad.chain.default in targets) == chained
    own = [target for target in targets if str(target).startswith("pqcad.")]
    assert (len(own) < len(plan(model).quantized)) == chained


@pytest.mark.slow
@torch.no_grad()
def test_a_package_bound_to_a_schedule(tmp_path):
    model = quantized(Small())
    path = export_pt2(
        model, tmp_path / "s.pt2", scheduler=cosine_scheduler(), num_inference_steps=4, batch_size=2, sample_shape=SHAPE
    )
    unet, x = load_pt2(path), noise(4)
    assert unet.timesteps == [999, 749, 499, 249]
    assert sqnr(model(x[:2], at(499)), unet(x[:2], at(499))) > 45
    assert sqnr(sample(model, cosine_scheduler(), x, 4), unet.sample(x)) > 30
    for wrong in (
        lambda: unet(x[:2], 500),
        lambda: unet(x, 499),
        lambda: unet.sample(x, 5),
        lambda: unet.sample(x[:3]),
    ):
        with pytest.raises(ValueError, match="this package"):
            wrong()


def test_what_cannot_be_packaged_is_refused(tmp_path, quantized_unet):
    with pytest.raises(ValueError, match="not quantized by pqcad_ao"):
        export_pt2(Small(), tmp_path / "unet.pt2")
    with pytest.raises(ValueError, match="500 training timesteps"):
        export_pt2(quantized_unet, tmp_path / "unet.pt2", scheduler=DDIMScheduler(num_train_timesteps=500))
    with pytest.raises(ValueError, match="pass the scheduler as well"):
        export_pt2(quantized_unet, tmp_path / "unet.pt2", num_inference_steps=4)
    with pytest.raises(ValueError, match="batch_size=3 without num_inference_steps"):
        export_pt2(quantized_unet, tmp_path / "unet.pt2", batch_size=3)
    with pytest.raises(ValueError, match="from 1 to 1000, the scheduler's training timesteps"):
        export_pt2(quantized_unet, tmp_path / "unet.pt2", scheduler=cosine_scheduler(), num_inference_steps=0)
    with pytest.raises(OSError, match="folder"):
        export_pt2(quantized_unet, tmp_path / "nowhere" / "unet.pt2")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_pt2(tmp_path / "missing.pt2")
    (tmp_path / "damaged.pt2").write_bytes(b"not a package")
    with pytest.raises(ValueError, match=r"no package that pqcad_ao\.export_pt2 wrote"):
        load_pt2(tmp_path / "damaged.pt2")


def test_a_package_that_departs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("pqcad_ao.compile.package.fuse", lambda graph, attention: _spoil(graph))
    with pytest.raises(RuntimeError, match=r"departs from the network: .* dB"):
        export_pt2(quantized(Plain()), tmp_path / "unet.pt2", sample_shape=SHAPE)
    assert not list(tmp_path.iterdir())


def _spoil(graph) -> None:
    """Halve what the network returns."""
    output = next(iter(reversed(graph.graph.nodes)))
    with graph.graph.inserting_before(output):
        half = graph.graph.call_function(torch.ops.aten.mul.Tensor, (output.args[0][0], 0.5))
    output.args = ((half,),)
    graph.recompile()
