"""What all tests share."""

from hypothesis import settings

# How long an example takes says something about the machine, nothing about the code.
settings.register_profile("torchladder", deadline=None)
settings.load_profile("torchladder")

LONG = {
    f"test_{name}.py"
    for name in "checkpoint_moves convert docs interrupt layouts nodes optim_muon restart torture train".split()
}
"""Files that start processes of several ranks: they begin first, so that no core waits for the last of them."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)
