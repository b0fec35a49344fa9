"""``python -m echo_rt``: the command line without the installed script."""

import sys

from echo_rt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
