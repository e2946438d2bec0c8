"""What quantising has changed, in words: weights by what the files say, outputs by what two models were seen to say."""

import math

from hermes.checkpoint import Checkpoint

__all__ = ["weight_error"]


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
