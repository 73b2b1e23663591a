"""`python -m allo_lib align ...` and `python -m allo_lib merge ...`."""

import sys

from allo_lib.cli.align_cli import main

sys.exit(main())
