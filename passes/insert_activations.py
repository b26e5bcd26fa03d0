"""Insert activation fake quantizers into a graph, each with the timestep group of every sample as an input."""

from itertools import pairwise

from torch.fx import GraphModule

from pqcad_ao.denoiser import Span, timestep_group
from pqcad_ao.prepare.annotate import PQCADQuantizer, insert_fake_quantizers
from pqcad_ao.prepare.fake_quant import ActivationFakeQuantize


def insert_activations(graph: GraphModule, quantizer: PQCADQuantizer, span: Span) -> GraphModule:
    """Annotate the inputs of the plan's layers and insert their fake quantizers.

    PT2E calls a fake quantizer with the tensor alone; a scale for each timestep needs the timestep as well, as an
    explicit input of the graph and for each sample: ``timestep_group(timesteps)`` is inserted once and wired to each.

    Args:
        graph: called as ``f(x_t, timesteps, ...)``, captured, or with the weights' fake quantizers in it already.
        quantizer: a ``PQCADQuantizer(plan, "activations")``.
        span: of the noise process's timesteps; the groups tile it.

    Returns:
        the GraphModule to use from now on. With the fake quantizers switched off it computes what it did before.
    """
    graph = insert_fake_quantizers(graph, quantizer)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    # PT2E puts an input's fake quantizer between it and the next input: bring the inputs together again
    for left, right in pairwise(placeholders):
        left.append(right)
    with graph.graph.inserting_after(placeholders[-1]):
        group = graph.graph.call_function(timestep_group, (placeholders[1], quantizer.groups, span))
    modules = dict(graph.named_modules())
    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], ActivationFakeQuantize):
            node.args = (*node.args, group)
    graph.graph.lint()
    graph.recompile()
    return graph
