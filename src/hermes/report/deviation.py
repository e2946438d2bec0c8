"""What quantising has changed, in words: weights by what the files say, outputs by what two models were seen to say."""

import math
from typing import TYPE_CHECKING

from hermes.checkpoint import Checkpoint

if TYPE_CHECKING:
    from hermes.tasks.deviation import Deviation

__all__ = ["describe_deviation", "weight_error"]

_OUTPUTS = {"logits": "logits", "last_hidden_state": "last hidden state"}


def weight_error(checkpoint: Checkpoint) -> str:
    """Relative RMS error of all quantised matrices together, and of the worst."""
    errors = {name: matrix.errors for name, matrix in checkpoint.quantized.items() if matrix.errors}
    if not errors:
        return "error of the weights unknown"
    lost, there = (sum(part) for part in zip(*errors.values(), strict=True))
    relative = {name: math.sqrt(one / max(all_, 1e-300)) for name, (one, all_) in errors.items()}
    worst = max(relative, key=relative.__getitem__)
    return (
        f"relative RMS error of the weights {math.sqrt(lost / max(there, 1e-300)):.3%}, "
        f"at worst {relative[worst]:.3%} ({worst})"
    )


def describe_deviation(found: "Deviation") -> str:
    """Relative RMS error of the outputs, and at how many positions the most likely token is the same."""
    text = (
        f"relative RMS error of the {_OUTPUTS[found.output]} {found.relative_error:.3%} over {found.positions} tokens"
    )
    if found.agreeing is None:
        return text
    return f"{text}, the same most likely token at {found.agreeing} of {found.positions}"
