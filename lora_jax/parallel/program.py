"""What XLA is told when it compiles a pack's programs.

Memory: how much a pack may take, and what of the host's is free but not given back.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from ..config.schema import Config
from ..config.types import size_text
from ..errors import OutOfMemory, RunError
from .constraints import on_mesh
from .mesh import replicated

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


_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_MAPPED_FROM = 1024 * 1024  # bytes


def release_freed_memory(*, at_once: bool = False) -> None:
    """Gives memory that was freed back to the system, where the C library would keep it.

    Compiling one step leaves a quarter of a gigabyte of freed blocks with glibc, and loading data a tenth: on a CPU that is room for
    activations. Does nothing where the C library is not glibc.

    Args:
        at_once: where the host is the device, blocks of a megabyte and more go back from now on whenever they are freed. Steps would
            else leave those into which matrices are packed for their products: glibc gives back what is larger than some size, but
            raises that, up to 32 MB, whenever such a block is freed, until it is told one. That saves some 20 MB, and costs a tenth of
            a small model's time, for the system clears every block before it gives it out anew.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            if at_once and jax.default_backend() == "cpu":
                library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM)
            library.malloc_trim(0)


def program_bytes(compiled: Any) -> int | None:
    """What a compiled program takes on a device while it runs: arguments, results and temporaries; None where XLA does not say."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    return found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes


@dataclasses.dataclass(eq=False)
class TraceCounter:
    """Wraps a function to count how often it is traced: under `jax.jit`, how often it is compiled."""

    function: Callable[..., Any]
    count: int = 0

    def __post_init__(self) -> None:
        self.__name__ = getattr(self.function, "__name__", "program")  # JAX calls the compiled program so, in traces and logs

    def __call__(self, *args: Any) -> Any:
        self.count += 1
        return self.function(*args)

    def check_once(self, name: str) -> None:
        """`RunError` if the function was traced more than once: some shape or constant changed between calls."""
        if self.count > 1:
            raise RunError(f"the {name} program was compiled {self.count} times; it must be compiled once per pack")


class Program:
    """A function that is compiled when it is first called, and never again.

    Args:
        function: of arrays and pytrees of them.
        name: what it is called in messages.
        carries: whether its first result takes the place of its first argument in the next call: it then reuses the buffers, and
            comes back in the same layout, which the compiler would else choose anew on a mesh.
        mesh: what it runs on; all other results are then whole on each device. None: wherever its arguments are.
        results: where they lie on the mesh instead.
        limit: bytes that it may take on a device, its arguments included; then what the host frees goes back to the system at once, too.
            None: whatever there is.
        options: of the compiler.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        *,
        carries: bool = False,
        mesh: Mesh | None = None,
        results: NamedSharding | None = None,
        limit: int | None = None,
        options: dict[str, str] | None = None,
    ):
        self.traces = TraceCounter(function)
        self._name = name
        self._carries = carries
        self._mesh = mesh
        self._rest = results or (None if mesh is None else replicated(mesh))
        self.limit = limit
        self._options = options
        self._compiled: Any = None

    def lower(self, *args: Any) -> Any:
        """The lowered program, to look at: its text, its memory analysis. Arguments may be shapes."""
        options = self._options
        with on_mesh(self._mesh):
            if not self._carries:
                return jax.jit(self.traces, out_shardings=self._rest, compiler_options=options).lower(*args)
            layouts = jax.tree.map(lambda a: getattr(a, "sharding", None), args[0])
            return jax.jit(self.traces, donate_argnums=0, out_shardings=(layouts, self._rest), compiler_options=options).lower(*args)

    def compiled_text(self) -> str:
        """The program as compiled, after its first call."""
        return self._compiled.as_text()

    def prepare(self, *args: Any) -> None:
        """Compiles it for such arguments, if it is not compiled yet.

        Raises:
            OutOfMemory: it would take more memory than `limit`.
        """
        if self._compiled is not None:
            return
        compiled = self.lower(*args).compile()
        release_freed_memory(at_once=self.limit is not None)
        needed = program_bytes(compiled)
        if self.limit is not None and needed is not None and needed > self.limit:
            raise OutOfMemory(f"the {self._name} program needs {size_text(needed)} on a device; the limit is {size_text(self.limit)}")
        self._compiled = compiled

    def __call__(self, *args: Any) -> Any:
        """Calls it.

        Raises:
            OutOfMemory: it would take more memory than `limit`.
            RunError: some shape, dtype or sharding is not what it was compiled for.
        """
        self.prepare(*args)
        try:
            return self._compiled(*args)
        except (TypeError, ValueError) as error:
            raise RunError(f"the {self._name} program got arrays unlike those it was compiled for: {error}") from error


def memory_limit(config: Config) -> int | None:
    """Bytes that a pack may take on one device: `sweep.memory_limit`, or what the accelerator has for JAX; None where nobody says."""
    if config.sweep is not None and config.sweep.memory_limit is not None:
        return config.sweep.memory_limit
    known = [(d.memory_stats() or {}).get("bytes_limit") for d in jax.local_devices() if d.platform != "cpu"]
    return min((size for size in known if size), default=None)
