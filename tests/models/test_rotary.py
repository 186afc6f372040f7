"""Rotary positions against their formulas."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import positions as rotary
from lora_jax.models.positions import Rotary


def test_rotation_is_by_position_times_frequency():
    positions = jnp.array([[0, 1, 5]])
    cos, sin = rotary.rotary_angles(positions, Rotary(4, 100.0))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 3, 1, 4)), jnp.float32)
    out = np.asarray(rotary.rotate(x, (cos, sin)))[0, :, 0]
    for t, p in enumerate((0, 1, 5)):
        for k in range(2):  # the k-th pair lies half a head apart
            angle = p * 100.0 ** (-2 * k / 4)
            u, v = float(x[0, t, 0, k]), float(x[0, t, 0, k + 2])
            assert out[t, k] == pytest.approx(u * math.cos(angle) - v * math.sin(angle), abs=1e-5)
            assert out[t, k + 2] == pytest.approx(u * math.sin(angle) + v * math.cos(angle), abs=1e-5)
