"""Sources of text that is installed with Python."""

import sysconfig

import pytest

from torchladder.data.text import installed_text
from torchladder.data.text.installed_text import Docstrings, InstalledFiles

DOCUMENTED = '''
"""What the module is for."""
def f():
    r"""What f does: \\d."""
    x = """no docstring"""
class C:
    async def g(self):
        "What g does."
'''


def test_python_stdlib_is_large_and_ordered():
    source = installed_text.python_stdlib()
    documents = list(source.documents())
    names = [document.identity for document in documents]
    assert len(documents) > 500  # Debian keeps the tests of the library apart
    assert names == sorted(names)
    assert source.size() > 10_000_000
    assert {"json/decoder.py", "textwrap.py"} <= set(names)
    assert not any("site-packages" in name or "__pycache__" in name for name in names)
    assert names == [document.identity for document in installed_text.python_stdlib().documents()]


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A standard library of two modules, and packages with a copy, a docstring and a file that is not Python."""
    files = {
        "lib/a.py": "print(1)",
        "lib/site-packages/own/b.py": DOCUMENTED,
        "lib/site-packages/vendored/a.py": "print(1)",
        "lib/site-packages/template.py": "def {{ name }}():",
        "lib/site-packages/own/__pycache__/c.py": "cached",
        "lib/b.py": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    paths = {"stdlib": str(tmp_path / "lib"), "purelib": str(tmp_path / "lib/site-packages")}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)


def test_python_packages_have_each_text_once(packages):
    found = {document.identity: document.text for document in installed_text.python_packages().documents()}
    assert list(found) == ["a.py", "site-packages/own/b.py", "site-packages/template.py"]
    assert found["a.py"] == "print(1)"


def test_python_docs_are_the_docstrings(packages, monkeypatch):
    monkeypatch.setattr(installed_text, "MIN_PROSE", 10)
    documents = list(installed_text.python_docs().documents())
    assert [(one.identity, one.text) for one in documents] == [
        ("site-packages/own/b.py", "What the module is for.\n\nWhat f does: \\d.\n\nWhat g does.")
    ]
    assert documents[0].size == len(DOCUMENTED)
    monkeypatch.setattr(installed_text, "MIN_PROSE", 100)
    assert list(installed_text.python_docs().documents()) == []


def test_sources_of_the_same_files_do_not_share_a_cache(packages):
    code, docs = installed_text.python_packages(), installed_text.python_docs()
    assert isinstance(code, InstalledFiles)
    assert isinstance(docs, Docstrings)
    assert code.files == docs.files
    assert code.stamp() != docs.stamp()
    assert code.fingerprint() != docs.fingerprint()
