"""`python -m zoo` is the `zoo` command."""

import sys

from zoo.command.cli import main

sys.exit(main())
