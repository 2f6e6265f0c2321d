"""``python -m ubatch``: the same as the command ``ubatch``."""

import sys

from ubatch.cli import main

sys.exit(main())
