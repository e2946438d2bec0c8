"""The delay model: what is linear is found, what is not is said."""

import random

import pytest

from hermes.profile.delays import BlockSample, fit_delays


def block(nbytes, flops, activation_bytes=0, depth=1, **seconds):
    return BlockSample(nbytes=nbytes, flops=flops, activation_bytes=activation_bytes, depth=depth, **seconds)


def test_linear_delays_are_found():
    random_ = random.Random(0)
    samples = []
    for _ in range(20):
        nbytes, flops, depth = (
            random_.randrange(10**6, 10**8),
            random_.randrange(10**8, 10**10),
            random_.randrange(1, 9),
        )
        samples.append(
            block(
                nbytes,
                flops,
                depth=depth,
                in_seconds=nbytes / 2e9 + 1e-4 * depth + 1e-3,
                ex_seconds=flops / 1e11 + 2e-4 * depth,
            )
        )
    model = fit_delays(samples)
    assert model.t_in.r_squared > 0.999
    assert model.t_in.coefficients["nbytes"] == pytest.approx(1 / 2e9, rel=1e-6)
    assert model.t_in.constant == pytest.approx(1e-3, rel=1e-6)
    assert model.t_ex == model.t_ex_flops
    assert model.t_ex.seconds(block(10**7, 5 * 10**9, depth=3)) == pytest.approx(0.0506)
    assert model.t_out is None  # never measured


def test_where_memory_decides_bytes_come_in():
    random_ = random.Random(1)
    samples = []
    for number in range(24):
        nbytes, flops = random_.randrange(10**6, 10**8), random_.randrange(10**8, 10**10)
        if number % 2:  # a matrix times one vector: the bytes decide
            flops = nbytes // 2
        samples.append(block(nbytes, flops, ex_seconds=flops / 1e11 + nbytes / 1e9))
    model = fit_delays(samples)
    assert model.t_ex_flops.r_squared < 0.95 < model.t_ex.r_squared
    assert "nbytes" in model.t_ex.coefficients


def test_too_few_samples_say_nothing():
    assert fit_delays([block(1, 1, in_seconds=1.0, ex_seconds=1.0)] * 2).t_in is None
    same = fit_delays([block(10, 1, in_seconds=0.5)] * 4).t_in  # nothing varies: the mean
    assert same.seconds(block(99, 1)) == pytest.approx(0.5)
