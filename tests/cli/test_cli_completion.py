"""Completion, as click gives it to shells: what is offered, and a real shell that takes it."""

from __future__ import annotations

import importlib
import itertools
import os
import pty
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import click
import pytest

from echo_rt import attention, convolution
from echo_rt.cli.arguments import OPTIONS
from echo_rt.cli.main import COMMANDS
from echo_rt.model import linear_products
from echo_rt.ops.backends import load_ops

HEAVY = "import sys; from echo_rt.cli.main import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("echo-rt ", list(COMMANDS)),
        ("echo-rt ge", ["generate"]),
        ("echo-rt generate --vae-", ["--vae-file", "--vae-dtype", "--vae-tiles"]),
        ("echo-rt generate --recipe longlive-", ["longlive-infinity"]),
        ("echo-rt generate --dtype float", ["float32", "float16", "float8"]),
        ("echo-rt generate --set memory_r", ["memory_reads=unrotated", "memory_reads=rotated"]),
        ("echo-rt generate --set recache_sink=f", ["recache_sink=false"]),
        ("echo-rt generate --set local", ["local_frames="]),
        ("echo-rt generate --attention flash", ["flash-attn-2", "flash-attn-3", "flash-attn-4"]),
        ("echo-rt generate --convolution kernel,ph", ["kernel,phases"]),
        ("echo-rt generate --preset ultra", ["ultrafast"]),
        ("echo-rt generate --codec av1_nvenc --preset ", [f"p{number}" for number in range(1, 8)]),
        ("echo-rt generate --codec none --preset ", []),
        ("echo-rt generate --fit ", ["crop", "pad"]),
        ("echo-rt serve --memory p", ["prior"]),
        ("echo-rt serve --host 0", ["0.0.0.0"]),
        ("echo-rt serve --ray ", ["auto"]),
        ("echo-rt soak --drift o", ["off"]),
        ("echo-rt bench --variants no", ["no-graphs"]),
        ("echo-rt bench --variants evolve,pr", ["evolve,prior"]),
        ("echo-rt generate --checkpoint some", ["file:some"]),
        ("echo-rt generate --prompt-embeds ", ["file:"]),
        ("echo-rt generate --model ", ["file:", "demo"]),
        ("echo-rt generate --vae t", ["file:t", "tiny"]),
        ("echo-rt verify d", ["file:d", "demo"]),
    ],
)
def test_what_is_offered(words: str, expected: list[str]) -> None:
    asked = {"_ECHO_RT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    done = subprocess.run([sys.executable, "-c", HEAVY], env=os.environ | asked, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    offered = ["file," + word[5:] if word.startswith("file:") else f"plain,{word}" for word in expected]
    assert done.stdout.splitlines() == (offered or [""])


# Numbers, prompts, and names that only the user knows.
FREE = """
--lora-alpha --float8-except --lookahead --vae-tiles --prompt --frames --seconds --size --seed --crf --segments
--snapshot-every --block-seconds --megabits --port --token --allow-host --ice --viewers --gateways --snapshot-blocks
--idle --hours --blocks --switch-every --keep --interval --hash-every --warmup-blocks --host-slack --outliers --rounds
"""


def test_every_value_that_can_be_known_is_completed() -> None:
    for name in COMMANDS:
        for option in itertools.chain(*getattr(importlib.import_module(f"echo_rt.cli.{name}"), "OPTIONS", {}).values()):
            if getattr(option, "is_flag", False):
                continue
            context = click.Context(click.Command(name))
            context.params = {"codec": "h264"}
            offered = option.type.shell_complete(context, option, "")
            free = option.opts[0] in FREE.split() and (name, option.opts[0]) != ("bench", "--size")
            assert bool(offered) != free, f"{name} {option.opts[0]}"


def test_the_names_of_implementations_are_those_that_there_are() -> None:
    ops = load_ops("torch")
    for option, there in (
        ("--attention", attention.implementations(ops)),
        ("--linear", linear_products.IMPLEMENTATIONS),
        ("--convolution", convolution.implementations(ops)),
    ):
        names = {one.name for one in there}
        kind = OPTIONS[option].type
        assert {
            one.value for one in kind.shell_complete(click.Context(click.Command("x")), OPTIONS[option], "")
        } == names


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
        os.write(master, b"echo-rt generate --rec\tlongl --preset ultr\t--attention products\t\n")
        typed = os.read(holder, 4096).decode()
    finally:
        timer.cancel()
        running.kill()
        running.wait()
        reader.join()
        os.close(holder)
        os.close(master)
    expected = "generate --recipe longl --preset ultrafast --attention products"
    assert typed.split() == expected.split(), b"".join(seen).decode(errors="replace")
