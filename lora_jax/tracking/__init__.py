"""Where a run's figures go: its directory, TensorBoard, the console, result files."""

from .files import read_json, write_atomic, write_json
from .progress import Progress, Track
from .results import MemberResult, read_run, write_results_csv
from .rundir import RunDirectory, describe_environment, differences, holds_run, member_folder, set_aside
from .state import RunState, read_state, update_state
from .tensorboard import MemberWriter, NullWriter

__all__ = [
    "MemberResult",
    "MemberWriter",
    "NullWriter",
    "Progress",
    "RunDirectory",
    "RunState",
    "Track",
    "describe_environment",
    "differences",
    "holds_run",
    "member_folder",
    "read_json",
    "read_run",
    "read_state",
    "set_aside",
    "update_state",
    "write_atomic",
    "write_json",
    "write_results_csv",
]
