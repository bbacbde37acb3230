"""``python -m proteinbert_fast``: the command line, for environments without its script."""

import sys

from proteinbert_fast.cli.main import main

sys.exit(main())
