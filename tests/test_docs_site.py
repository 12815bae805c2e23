"""The documentation site: every page and docstring renders, links and anchors lead somewhere, the notebook runs."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from sphinx.cmd.build import main as sphinx_build

from torchladder.metrics import read_jsonl

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOK = DOCS / "ladder.ipynb"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")  # of extensions
def test_the_site_builds_without_a_warning(tmp_path, capsys):
    """A page that docs/index.md does not list, a broken link and a docstring that does not render are warnings."""
    code = sphinx_build(["-q", "-W", "--keep-going", "-d", str(tmp_path / "doctrees"), str(DOCS), str(tmp_path)])
    assert code == 0, capsys.readouterr().err
    home, masks = ((tmp_path / name).read_text() for name in ("index.html", "reference/mask.html"))
    assert 'src="_images/masks.png"' in home
    assert 'href="data.html#from-your-own-text-to-a-run"' in home
    assert 'id="torchladder.mask.block_mask"' in masks


def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    constant, ladder = (read_jsonl(tmp_path / "outputs" / name / "metrics.jsonl") for name in ("constant", "doubling"))
    assert constant[-2]["step"] == ladder[-2]["step"] == 150
    assert ladder[-2]["flops"] < 0.82 * constant[-2]["flops"]
    assert ladder[-1]["validation_loss"] < 3
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "document + chunk   36 pairs" in printed
    assert "19% saved" in printed
    assert printed.count("def main(") == 1


def test_the_notebook_is_stored_as_it_has_run():
    notebook = json.loads(NOTEBOOK.read_text())
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert NOTEBOOK.stat().st_size < 200_000
