"""What configurations share: their base class, the most pictures of a call, and checks of what learns."""

from typing import TYPE_CHECKING, Any

from pqcad_ao.utils.checks import check_numbers, check_word, is_number

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig
else:
    AOBaseConfig = object

MAX_BATCH = 63  # diffusers 0.42 branches at a batch of 64 in Upsample2D; one captured graph holds one branch


def check_selected(trainable: Any, sensitive_share: Any) -> None:
    if trainable is not None and (
        not isinstance(trainable, list) or not trainable or not all(isinstance(word, str) for word in trainable)
    ):
        raise ValueError(
            f"trainable={trainable!r}: write roles, globs over names, 'time', 'sensitive' and 'norms', such as "
            "['time', 'mid_block.*'], or None for everything"
        )
    if not is_number(sensitive_share, 0, 1) or sensitive_share == 0:
        raise ValueError(f"sensitive_share={sensitive_share!r}: allowed are numbers above 0 and up to 1")


def check_weights(config: Any, words: Any) -> None:
    check_word("sample_weights", config.sample_weights, words)
    check_numbers(config, ("weight_rate", "weight_temperature"), most=1000)
    check_numbers(config, ("weight_pairs",))
    if config.weight_temperature == 0:
        raise ValueError("weight_temperature=0: allowed are numbers above 0")
