"""python -m fastmaml: the same as the command `fastmaml`."""

import sys

from fastmaml.cli.main import main

sys.exit(main())
