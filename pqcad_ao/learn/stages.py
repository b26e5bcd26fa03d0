"""The stages that learn, weights and then activations: each one's widths, and for how many updates."""

from pqcad_ao.config import PQCADConfig
from pqcad_ao.graph.plan import Plan
from pqcad_ao.learn.transition import MomentumTransition


def ladders(config: PQCADConfig, resolved: Plan) -> dict[str, list[int]]:
    """Each stage's widths, down to the least that the plan asks of any layer; for ``mode="fixed"`` that one alone."""
    widths = {
        "weights": ([row.weight_bits or 0 for row in resolved.quantized], config.weight_ladder),
        "activations": (
            [row.activation_bits for row in resolved.quantized if row.activation_bits],
            config.activation_ladder,
        ),
    }
    return {
        stage: [*(bits for bits in ladder if bits > min(bits_of) and config.mode != "fixed"), min(bits_of)]
        for stage, (bits_of, ladder) in widths.items()
        if bits_of
    }


def budgets(config: PQCADConfig, stages: list[str]) -> dict[str, int]:
    """Updates for each stage; together ``config.iterations``. With ``mode="fixed"`` both sides learn at once."""
    if len(stages) == 1 or config.mode == "fixed":
        return {stages[-1]: config.iterations}
    first = round(config.iterations * config.weight_share)
    return {stages[0]: first, stages[1]: config.iterations - first}


def policies(config: PQCADConfig, resolved: Plan) -> dict[str, MomentumTransition]:
    """The policy of each stage that learns.

    Raises:
        ValueError: too few iterations for the ladders.
    """
    rungs = ladders(config, resolved)
    beta, patience = config.beta, config.patience
    if config.transitions == "schedule":
        # no progress is ever waited for, and α arrives within two updates
        beta, patience = 1e-9, config.iterations + 1
    return {
        stage: MomentumTransition(
            rungs[stage], budget, beta=beta, tau=config.tau, window=config.window, patience=patience
        )
        for stage, budget in budgets(config, [*rungs]).items()
    }
