"""How fast the devices at hand multiply matrices."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp


def matmul_rate(rows: int, width: int, hidden: int, dtype: str = "float32", *, seconds: float = 0.5) -> float:
    """FLOP/s of one device at products of the sizes of a layer's: (rows, width) by (width, hidden) and back, in turn.

    The best of as many runs as fit into `seconds` (at least three): what the device can do, not what else it is doing.

    Args:
        rows, width, hidden: of the matrices.
        dtype: of them.
        seconds: how long to measure; compiling comes on top.
    """
    turns = max(1, round(2e9 / (4 * rows * width * hidden)))

    @jax.jit
    def products(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, turns, lambda _, x: (x @ up) @ down, x)

    # Zeros stay zeros: no product overflows, and matrix units take no notice.
    args = [jnp.zeros(shape, dtype) for shape in ((rows, width), (width, hidden), (hidden, width))]
    products(*args).block_until_ready()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        began = time.perf_counter()
        products(*args).block_until_ready()
        times.append(time.perf_counter() - began)
    return turns * 4 * rows * width * hidden / min(times)
