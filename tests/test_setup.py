"""What decides whether an environment has all that the requirements name."""

import re
import subprocess
import sys
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
