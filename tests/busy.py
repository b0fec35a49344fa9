"""Run a command beside busy processes: ``python tests/busy.py COUNT COMMAND...``; exits as the command does."""

from __future__ import annotations

import subprocess
import sys


def main() -> int:
    """Keep COUNT processes busy for as long as the command runs."""
    count, command = int(sys.argv[1]), sys.argv[2:]
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        return subprocess.call(command)
    finally:
        for process in busy:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
