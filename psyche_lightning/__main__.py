"""``python -m psyche_lightning``: the ``psyche`` command of this interpreter."""

import sys

from psyche_lightning.cli import main

sys.exit(main())
