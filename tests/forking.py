"""A program that forks and spawns with runtimes in it: prints, as JSON, what came of each use in a child process.

Run as ``python forking.py MODEL CHECKPOINT``. It is no test: a fork of the test runner would take its pipes along.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable

import torch

import echo_rt

HANG = 30  # seconds


def load() -> echo_rt.Runtime:
    return echo_rt.Runtime.from_pretrained(sys.argv[1], checkpoint=sys.argv[2], device="cpu")


def embeds(runtime: echo_rt.Runtime) -> torch.Tensor:
    return torch.ones(2, runtime.config.transformer.text_dim)


def digest(runtime: echo_rt.Runtime) -> str:
    with runtime.stream(prompt_embeds=embeds(runtime)) as stream:
        return hashlib.sha256(next(stream).frames.numpy().tobytes()).hexdigest()


def loaded_here(_: int = 0) -> str:
    with load() as runtime:
        return digest(runtime)


def one_thread() -> str:
    torch.set_num_threads(1)
    return loaded_here()


def forked(act: Callable[[], object]) -> str:
    """What ``act`` returns in a fork of this process, or its error; ``hung`` if it does neither."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(HANG)
        try:
            answer = str(act())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read().decode()
    os.waitpid(child, 0)
    return answer or "hung"


def main() -> None:
    torch.set_num_threads(2)
    came = {"loaded in a fork": forked(loaded_here)}
    runtime = load()
    came["here"] = digest(runtime)
    came["loaded in a fork of one that has loaded"] = forked(loaded_here)
    came["the same with one thread"] = forked(one_thread)
    stream = runtime.stream(prompt_embeds=embeds(runtime))
    came["next"] = forked(lambda: next(stream))
    came["snapshot"] = forked(stream.snapshot)
    came["set_prompt"] = forked(lambda: stream.set_prompt("a fox"))
    came["encode_prompt"] = forked(lambda: runtime.encode_prompt("a fox"))
    came["runtime.stream"] = forked(lambda: runtime.stream("a fox"))
    loop = iter(stream)
    next(loop)
    came["a loop that goes on"] = forked(lambda: next(loop))
    with stream._lock, runtime._lock:  # as if another thread were amid a block
        forks = threading.Thread(target=lambda: came.update(close=forked(lambda: (stream.close(), runtime.close()))))
        forks.start()
        forks.join()
    stream.close()
    came["here, after all that"] = digest(runtime)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        came["spawned"] = pool.map(loaded_here, [0])[0]
    print(json.dumps(came))


if __name__ == "__main__":
    main()
