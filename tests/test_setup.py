"""setup.sh: whether an environment has what the requirements name, and which one is installed into."""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = re.search(r"<<'PY'\n(.*?)\nPY\n", (ROOT / "setup.sh").read_text(), flags=re.DOTALL)[1]


@pytest.mark.parametrize(
    ("lines", "has"),
    [
        ("pytest==1.0  # any version will do\n\n# a comment", True),
        ("no-such-package==1.0", False),
        ('no-such-package==1.0; python_version < "3.10"', True),
        ('no-such-package==1.0; python_version >= "3.10"', False),
        ("-r more.txt", False),
    ],
)
def test_requirements_are_looked_for(tmp_path, lines, has):
    (tmp_path / "all.txt").write_text(lines)
    (tmp_path / "more.txt").write_text("pytest\nno-such-package\n")
    found = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "all.txt")], cwd=ROOT, capture_output=True)
    assert (found.returncode == 0) is has, found.stderr


def set_up(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Sources a copy of setup.sh with requirements that no environment has."""
    shutil.copy(ROOT / "setup.sh", folder)
    (folder / "pyproject.toml").touch()
    (folder / "requirements.txt").write_text("torch==1.0\nno-such-package==1.0\n")
    environment = {**os.environ, "PYTHON": sys.executable} | environment
    command = ["bash", "-euo", "pipefail", "-c", "source setup.sh requirements.txt"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("damage", ["a link to another python", "no pip", "half made", "a file"])
def test_only_an_environment_of_its_own_with_pip_is_installed_into(tmp_path, damage):
    folder = tmp_path / ".venv"
    if damage == "no pip":
        venv.create(folder, symlinks=True)
    elif damage == "a file":
        folder.touch()
    else:
        (folder / "bin").mkdir(parents=True)
    if damage == "a link to another python":
        os.symlink(sys.executable, folder / "bin" / "python")
    result = set_up(tmp_path)
    assert result.returncode == 2
    assert result.stderr == (
        f"torchladder: {folder} is not a virtual environment with pip. Remove it and run this again.\n"
    )


def test_its_own_environment_is_used(tmp_path):
    venv.create(tmp_path / ".venv", symlinks=True)
    (packages,) = (tmp_path / ".venv" / "lib").glob("python*/site-packages")
    (packages / "pip").mkdir()
    (packages / "pip" / "__init__.py").touch()
    (packages / "pip" / "__main__.py").write_text("import sys; print(sys.prefix, *sys.argv[1:])")
    result = set_up(tmp_path)
    assert result.returncode == 0, result.stderr
    installed = result.stdout.splitlines()[-2:]
    assert [line.split()[0] for line in installed] == [str(tmp_path / ".venv")] * 2
    assert installed[0].endswith("-r " + str(tmp_path / "requirements.txt"))


def test_a_python_that_does_not_exist_is_named(tmp_path):
    result = set_up(tmp_path, PYTHON="no-such-python")
    assert result.returncode == 2
    assert result.stderr == ("torchladder: there is no program 'no-such-python'. Set PYTHON to Python 3.10 or newer.\n")
    assert not (tmp_path / ".venv").exists()
