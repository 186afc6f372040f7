"""What XLA is told when it compiles a pack's programs."""

from __future__ import annotations

import functools

import jax

# On CPUs XLA hands small groups of operations to YNNPACK. In a pack's step that costs: packs of 8 MiniLMs trained 1.2 times as fast
# without it, in an eighth less memory, and what YNNPACK takes for itself is in no memory analysis.
_CPU = {"xla_cpu_experimental_ynn_fusion_type": ""}


def compiler_options() -> dict[str, str]:
    """For `jax.jit`, on the devices at hand; none that this XLA does not know.

    >>> jax.jit(lambda x: 2 * x, compiler_options=compiler_options())(1.5).item()
    3.0
    """
    return dict(_known()) if jax.default_backend() == "cpu" else {}


@functools.cache
def _known() -> tuple[tuple[str, str], ...]:
    try:
        jax.jit(lambda x: x, compiler_options=_CPU).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # an option for experiments: it may go
        return ()
    return tuple(_CPU.items())
