"""``python -m torchladder <command>``: the same as ``torchladder <command>``."""

import sys

from torchladder.commands import main

sys.exit(main())
