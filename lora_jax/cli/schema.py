"""`lora-jax schema`: the config's JSON schema, for editors."""

from __future__ import annotations

import json
from pathlib import Path

from ..config.messages import config_schema
from ..errors import InputError


def schema_command(output: Path | None) -> None:
    """Print the schema, or write it to `output` (which is replaced)."""
    text = json.dumps(config_schema(), indent=2, ensure_ascii=False) + "\n"
    if output is None:
        print(text, end="")
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output: cannot write '{output}' ({error.strerror}).") from None
    print(f"wrote {output}")
