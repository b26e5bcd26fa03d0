"""Give every activation fake quantizer of a prepared graph the timestep group of each sample as a second input."""

from itertools import pairwise

from torch.fx import GraphModule, Node

from pqcad_ao.fake_quant import ActivationFakeQuantize, timestep_group


def wire_timesteps(graph: GraphModule, timesteps: Node, groups: int, num_train_timesteps: int) -> GraphModule:
    """Insert ``timestep_group(timesteps)`` once and pass it to each :class:`ActivationFakeQuantize`, in place.

    PT2E calls an observer with the tensor alone; a scale for each timestep needs the timestep as well, as an explicit
    input of the graph and for each sample.

    Args:
        graph: as ``prepare_qat_pt2e`` returns it.
        timesteps: the graph's (B,) timestep placeholder.

    Returns:
        the same GraphModule, recompiled.
    """
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    # prepare puts an input's observer between it and the next input: bring the inputs together again
    for left, right in pairwise(placeholders):
        left.append(right)
    with graph.graph.inserting_after(placeholders[-1]):
        group = graph.graph.call_function(timestep_group, (timesteps, groups, num_train_timesteps))
    modules = dict(graph.named_modules())
    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], ActivationFakeQuantize):
            node.args = (node.args[0], group)
    graph.graph.lint()
    graph.recompile()
    return graph
