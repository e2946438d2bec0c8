"""SwapNet's delay model: seconds of loading, computing and releasing a block as linear functions, by least squares.

    t_in ~ a bytes + b depth + c        t_ex ~ a FLOPs + b depth + c        t_out ~ a bytes + b depth + c

t_ex is not linear in FLOPs where a layer is bound by memory (a matrix times one vector, depthwise convolutions): there
bytes and activations decide. `fit_delays` therefore fits a second model of t_ex, with bytes of weights and of
activations as further terms, and keeps it where it explains more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["BlockSample", "DelayModel", "LinearFit", "fit_delays"]

WORTH_MORE_TERMS = 0.02
"""How much more of the variance they must explain."""


@dataclass(frozen=True, kw_only=True)
class BlockSample:
    """A block that was profiled. `depth` is how many units it has; seconds that are None were not measured."""

    nbytes: int
    flops: int
    activation_bytes: int
    depth: int
    in_seconds: float | None = None
    ex_seconds: float | None = None
    out_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class LinearFit:
    """Coefficients by term, a constant, and R^2: the share of the variance that they explain (1: all of it)."""

    coefficients: Mapping[str, float]
    constant: float
    r_squared: float
    num_samples: int

    def seconds(self, sample: BlockSample) -> float:
        """Predicted; never below 0."""
        linear = sum(factor * float(getattr(sample, term)) for term, factor in self.coefficients.items())
        return max(0.0, linear + self.constant)


@dataclass(frozen=True, kw_only=True)
class DelayModel:
    """Of one checkpoint on one machine. `t_ex_flops` is SwapNet's, `t_ex` the one to use; None: too few samples."""

    t_in: LinearFit | None
    t_ex: LinearFit | None
    t_ex_flops: LinearFit | None
    t_out: LinearFit | None


def fit_delays(samples: Sequence[BlockSample]) -> DelayModel:
    """Least squares over what was measured; each fit takes two samples more than it has coefficients, or is None."""
    by_flops = _fit(samples, "ex_seconds", ("flops", "depth"))
    better = _fit(samples, "ex_seconds", ("flops", "nbytes", "activation_bytes", "depth"))
    gained = better.r_squared - by_flops.r_squared if better is not None and by_flops is not None else 0.0
    return DelayModel(
        t_in=_fit(samples, "in_seconds", ("nbytes", "depth")),
        t_ex=better if gained > WORTH_MORE_TERMS else by_flops,
        t_ex_flops=by_flops,
        t_out=_fit(samples, "out_seconds", ("nbytes", "depth")),
    )


def _fit(samples: Sequence[BlockSample], target: str, terms: tuple[str, ...]) -> LinearFit | None:
    measured = [sample for sample in samples if getattr(sample, target) is not None]
    varying = tuple(term for term in terms if len({getattr(sample, term) for sample in measured}) > 1)
    if len(measured) < len(varying) + 3:
        return None
    import numpy as np  # where something is fitted: who only reads a profile need not have it in memory

    seconds = np.array([getattr(sample, target) for sample in measured], dtype=float)
    columns = np.array([[getattr(sample, term) for term in varying] for sample in measured], dtype=float)
    scales = np.abs(columns).max(axis=0, initial=1.0)  # bytes and FLOPs beside ones: else they drown the constant
    matrix = np.column_stack([columns / scales, np.ones(len(measured))])
    solution = np.linalg.lstsq(matrix, seconds, rcond=None)[0]
    residual = float(((matrix @ solution - seconds) ** 2).sum())
    variance = float(((seconds - seconds.mean()) ** 2).sum())
    return LinearFit(
        coefficients={
            term: float(value / scale) for term, value, scale in zip(varying, solution, scales, strict=False)
        },
        constant=float(solution[-1]),
        r_squared=1.0 - residual / variance if variance > 0 else 1.0,
        num_samples=len(measured),
    )
