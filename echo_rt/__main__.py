"""The first lines of the command: Ctrl-C while the rest is imported ends it without a traceback."""

import sys


def main() -> int:
    """Run the command line and return its exit code."""
    try:
        from echo_rt.cli.main import main as run
    except KeyboardInterrupt:
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
