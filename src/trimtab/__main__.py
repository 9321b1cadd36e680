"""`python -m trimtab` is the `trimtab` command."""

import sys

from trimtab.pipelines.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
