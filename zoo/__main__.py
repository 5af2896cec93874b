"""`python -m zoo` is the `zoo` command."""

import os
import sys

if sys.path[0] in ("", os.getcwd()) and os.getcwd() not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    import zoo  # may itself lie in the working folder, but nothing else is imported from there

    assert zoo.__path__
    del sys.path[0]

from zoo.command.cli import main

sys.exit(main())
