"""Completion, as click gives it to shells: what is offered, and a real shell that takes it."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from echo_rt.cli.main import COMMANDS

HEAVY = "import sys; from echo_rt.cli.main import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("echo-rt ", list(COMMANDS)),
        ("echo-rt ge", ["generate"]),
        ("echo-rt generate --vae-", ["--vae-file", "--vae-dtype", "--vae-tiles"]),
        ("echo-rt generate --recipe longlive-", ["longlive-infinity"]),
        ("echo-rt generate --dtype float", ["float32", "float16", "float8"]),
        ("echo-rt generate --set memory_r", ["memory_reads="]),
        ("echo-rt soak --drift o", ["off"]),
        ("echo-rt bench --variants no", ["no-graphs"]),
        ("echo-rt generate --checkpoint some", ["some"]),
    ],
)
def test_what_is_offered(words: str, expected: list[str]) -> None:
    asked = {"_ECHO_RT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    done = subprocess.run([sys.executable, "-c", HEAVY], env=os.environ | asked, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    kind = "file" if expected == ["some"] else "plain"
    assert done.stdout.splitlines() == [f"{kind},{word}" for word in expected]


SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], 'eval "$(_ECHO_RT_COMPLETE=bash_source echo-rt)"'),
    "zsh": (["zsh", "-f", "-i"], 'autoload -U compinit; compinit -u; eval "$(_ECHO_RT_COMPLETE=zsh_source echo-rt)"'),
    "fish": (["fish", "--no-config", "-i"], "_ECHO_RT_COMPLETE=fish_source echo-rt | source"),
}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_what_is_typed(shell: str, tmp_path: Path) -> None:
    """With the line that docs/options.md has for it: ``echo-rt generate --rec<TAB>`` runs with ``--recipe``."""
    command, setup = SHELLS[shell]
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    result, program = tmp_path / "result", tmp_path / "echo-rt"
    os.mkfifo(result)
    program.write_text(
        f"""#!/bin/sh
[ -n "$_ECHO_RT_COMPLETE" ] && exec '{sys.executable}' -m echo_rt
printf '%s\\n' "$*" > '{result}'
"""
    )
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "TERM": "dumb"}
    master, slave = pty.openpty()
    owner = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
    running = subprocess.Popen(
        [sys.executable, "-c", owner, *command],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
        cwd=tmp_path,
        start_new_session=True,
    )
    os.close(slave)
    seen: list[bytes] = []

    def drain() -> None:  # or the shell would wait for us
        try:
            while text := os.read(master, 4096):
                seen.append(text)
        except OSError:
            pass  # the shell is gone

    reader = threading.Thread(target=drain)
    reader.start()
    holder = os.open(result, os.O_RDWR)  # so that opening to read does not wait for a writer
    timer = threading.Timer(120, os.write, (holder, b"nothing"))
    timer.start()
    try:
        os.write(master, f"{setup}\n".encode())
        os.write(master, b"echo-rt generate --rec\tlongl\n")
        typed = os.read(holder, 4096).decode()
    finally:
        timer.cancel()
        running.kill()
        running.wait()
        reader.join()
        os.close(holder)
        os.close(master)
    assert typed == "generate --recipe longl\n", b"".join(seen).decode(errors="replace")
