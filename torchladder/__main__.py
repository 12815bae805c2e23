"""Makes ``python -m torchladder <command>`` equivalent to ``torchladder <command>``."""

import sys

from torchladder.commands import main

sys.exit(main())
