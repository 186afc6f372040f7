"""The installation's parts agree with one another."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def constraints():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_the_tested_versions_are_versions_that_are_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pins = constraints()
    for text in project["dependencies"] + extras["dev"] + extras["interop"] + extras["rl"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_no_pin_names_a_local_build():
    assert [name for name, version in constraints().items() if "+" in version] == []


def test_assets_are_pinned_by_hash():
    lines = [line for line in (ROOT / "requirements-assets.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) == 8
    assert all(re.fullmatch(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)


def find_python(folder, **pythons):
    """Runs the search with only these stand-ins on the path: name -> (version, whether it can make environments)."""
    for name, (version, can_make) in pythons.items():
        major, minor = version.split(".")
        old = int((int(major), int(minor)) < (3, 11))
        stand_in = folder / name.replace("_", ".")
        stand_in.write_text(
            "#!/bin/sh\n"
            f'case "$2" in *print*) echo {version};; *version_info*) exit {old};; *ensurepip*) exit {0 if can_make else 1};; esac\n'
        )
        stand_in.chmod(0o755)
    command = ["/bin/sh", str(ROOT / ".ci/find_python.sh")]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": str(folder)})


def test_the_first_python_that_will_do_is_taken(tmp_path):
    done = find_python(tmp_path, python3=("3.9", True), python3_12=("3.12", False), python3_11=("3.11", True))
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "python3.11")), done.stderr


@pytest.mark.parametrize(
    ("pythons", "told"),
    [
        ({}, "none of them"),
        ({"python3": ("3.9", True)}, "python3 is 3.9"),
        ({"python3": ("3.12", False)}, "apt install python3-venv"),
    ],
)
def test_a_machine_without_one_is_told_what_to_do(tmp_path, pythons, told):
    done = find_python(tmp_path, **pythons)
    assert done.returncode == 2
    assert "needs Python 3.11 or newer" in done.stderr and told in done.stderr


def test_the_package_says_its_version_and_that_it_is_typed():
    import lora_jax

    assert lora_jax.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (ROOT / "lora_jax" / "py.typed").is_file()
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["package-data"]["lora_jax"] == ["py.typed"]


def test_the_last_line_of_make_install_says_how_to_activate(tmp_path):
    command = ["make", "--no-print-directory", "-n", "install"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert ". .venv/bin/activate" in told[-1] and ". .venv/bin/activate" in (ROOT / "README.md").read_text()


def test_the_python_of_the_readme_that_needs_no_run_runs_and_trains():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    imports = "".join(line + "\n" for line in blocks[0].splitlines() if line.startswith(("import ", "from ")))
    space: dict[str, Any] = {}
    exec(imports + "\n".join(blocks[1:]), space)
    x, y, before = space["x"], space["y"], space["loss"]
    first = space["step"](space["adapted"], space["optimizer"], x, y)
    assert float(space["step"](space["adapted"], space["optimizer"], x, y)) < float(first)
    members, arrays = space["members"], space["arrays"]
    for number in range(3):
        own = [{name: array[number] for name, array in part.items()} for part in (members.trainable, arrays, members.settings)]
        assert float(before(own[1], own[2])) < 0.5 * float(before(own[0], own[2]))
    logits = space["best"](x)
    assert float((logits.argmax(-1) == y).mean()) > 0.9
