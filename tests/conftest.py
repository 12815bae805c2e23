"""What all tests share."""

from hypothesis import settings

# How long an example takes says something about the machine, nothing about the code.
settings.register_profile("torchladder", deadline=None)
settings.load_profile("torchladder")

LONG = {
    *("test_checkpoint_moves.py", "test_convert.py", "test_docs.py", "test_interrupt.py", "test_layouts.py"),
    *("test_nodes.py", "test_optim_muon.py", "test_pipeline.py", "test_probe_scores.py", "test_restart.py"),
    *("test_torture.py", "test_train.py"),
}
"""Files that start processes of several ranks: they begin first, so that no core waits for the last of them."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)
