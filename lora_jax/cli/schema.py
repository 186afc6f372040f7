"""`lora-jax schema`: the config's JSON schema, for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError


def schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to this file instead of the screen.", show_default=False)
    ] = None,
) -> None:
    """Print the JSON schema of the config.

    Editors use it to complete and check configs. Write it to a file, and name the file in the first line of the YAML:
    # yaml-language-server: $schema=FILE
    """
    from ..config.messages import config_schema

    text = json.dumps(config_schema(), indent=2, ensure_ascii=False) + "\n"
    if output is None:
        print(text, end="")
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output: cannot write '{output}' ({error.strerror}).") from None
    print(f"wrote {output}")
