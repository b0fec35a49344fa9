"""Serve a live video from a program of your own: the page, the API and the metrics of ``echo-rt serve``.

pip install 'echo-rt[serve]'
python server.py [MODEL [CHECKPOINT]]
"""

import sys
from pathlib import Path

import echo_rt
from echo_rt.serve.app import make_app
from echo_rt.serve.guard import Rules
from echo_rt.serve.live import LiveSession
from echo_rt.serve.server import listen, make_server


def load(memory: str | None, like: echo_rt.Snapshot | None) -> echo_rt.Runtime:
    return echo_rt.Runtime.from_pretrained(model, checkpoint=checkpoint, memory=memory, like=like)


if __name__ == "__main__":
    model, checkpoint = (*sys.argv[1:3], *("demo", None)[len(sys.argv) - 1 :])
    try:
        session = LiveSession(load, Path("echo-rt-live"), "a red ball bouncing in the desert", resume=True)
        print("serving at http://127.0.0.1:8000/ until Ctrl-C", flush=True)
        make_server(make_app({"main": session}, Rules())).run([listen("127.0.0.1", 8000)])
    except KeyboardInterrupt:  # again, after the server has ended in order
        sys.exit(130)
    except echo_rt.EchoError as error:  # one line: what was expected and what was found
        print(f"server.py: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
