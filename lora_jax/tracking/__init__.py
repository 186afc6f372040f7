"""Where a run's figures go: its directory, TensorBoard, the console, result files."""

from lora_jax.tracking.environment import describe_environment
from lora_jax.tracking.files import read_json, write_atomic, write_json
from lora_jax.tracking.progress import Progress, Track
from lora_jax.tracking.results import MemberResult, read_run, write_results_csv
from lora_jax.tracking.rundir import RunDirectory, differences, holds_run, member_folder, set_aside
from lora_jax.tracking.tensorboard import MemberWriter, NullWriter

__all__ = [
    "MemberResult",
    "MemberWriter",
    "NullWriter",
    "Progress",
    "RunDirectory",
    "Track",
    "describe_environment",
    "differences",
    "holds_run",
    "member_folder",
    "read_json",
    "read_run",
    "set_aside",
    "write_atomic",
    "write_json",
    "write_results_csv",
]
