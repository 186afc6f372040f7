"""Scripts of `experiments/` run by their path: what lies beside them must not take the place of a library's own packages."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[2] / "experiments"


def test_no_script_hides_a_package_that_a_library_asks_for():
    """JAX looks for Python 3.14's `compression` first; a script's own folder is searched before the standard library."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import jax, optax, orbax.checkpoint, matplotlib; print(jax.__version__)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
