"""The warning about slow bfloat16, and how the rate of a matrix product is measured."""

import pytest
import torch

from mmtensorar.training import stopwatch

CPU = torch.device("cpu")


@pytest.mark.parametrize("bf16_rate, warned", [(1e9, True), (49e9, True), (60e9, False)])
def test_slow_bfloat16_names_the_setting(monkeypatch, bf16_rate, warned):
    """On a CPU without AVX-512 bf16 a run took 70 times as long, and no message
    explained why.
    """
    monkeypatch.setattr(stopwatch, "matmul_rate", lambda device, dtype: 100e9)
    warning = stopwatch.slow_bfloat16(CPU, bf16_rate)
    assert (warning is not None) == warned
    assert not warned or "train.precision=fp32" in warning


def test_a_gpu_is_not_compared():
    assert stopwatch.slow_bfloat16(torch.device("cuda"), 1.0) is None


def test_a_slow_processor_is_measured_on_the_small_product(monkeypatch):
    sides = []
    product = torch.mm
    monkeypatch.setattr(stopwatch, "LONG_S", 0.0)
    monkeypatch.setattr(torch, "mm", lambda a, b: (sides.append(len(a)), product(a, b))[1])
    assert stopwatch.matmul_rate(CPU, torch.float32) > 0
    assert set(sides) == {stopwatch.MATRIX_SIDES["cpu"][0]}
