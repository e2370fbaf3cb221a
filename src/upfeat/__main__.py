"""Entry point of ``python -m upfeat``."""

import sys

from upfeat.cli import main

sys.exit(main())
