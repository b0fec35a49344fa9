"""Ways for a file to be damaged, by a disk, a transfer, or somebody; each drawn from a seeded generator."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Damage = Callable[[bytes, random.Random], bytes]

_SPECIAL = (0, 1, 7, 8, 9, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53, 2**63 - 1, 2**63, 2**64 - 1)


class Trap:
    """Makes a folder when it is unpickled by anything that runs what a pickle asks for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.folder),)


# -------------------------------------------------------------------- bytes


def _span(content: bytes, dice: random.Random) -> tuple[int, int]:
    """Begin and end of a stretch, near the beginning of the file as often as not: there is what describes the rest."""
    begin = dice.randrange(min(len(content), 4096) if dice.random() < 0.5 else len(content))
    return begin, min(len(content), begin + int(2 ** dice.uniform(0, 12)))


def truncated(content: bytes, dice: random.Random) -> bytes:
    near = dice.randrange(64)
    return content[: dice.choice([near, len(content) - 1 - near, dice.randrange(len(content))])]


def extended(content: bytes, dice: random.Random) -> bytes:
    return content + dice.randbytes(int(2 ** dice.uniform(0, 12)))


def flipped(content: bytes, dice: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(dice.choice([1, 1, 1, 2, 8, 100])):
        damaged[_span(content, dice)[0]] ^= 1 << dice.randrange(8)
    return bytes(damaged)


def overwritten(content: bytes, dice: random.Random) -> bytes:
    begin, end = _span(content, dice)
    filling = dice.choice([bytes(end - begin), b"\xff" * (end - begin), dice.randbytes(end - begin)])
    return content[:begin] + filling + content[end:]


def removed(content: bytes, dice: random.Random) -> bytes:
    begin, end = _span(content, dice)
    return content[:begin] + content[end:]


def repeated(content: bytes, dice: random.Random) -> bytes:
    begin, end = _span(content, dice)
    return content[:end] + content[begin:end] + content[end:]


def moved(content: bytes, dice: random.Random) -> bytes:
    begin, end = _span(content, dice)
    target, _ = _span(content, dice)
    damaged = bytearray(content)
    damaged[target : target + end - begin] = content[begin:end]
    return bytes(damaged)


def numbered(content: bytes, dice: random.Random) -> bytes:
    """Another number where lengths and offsets are, or anywhere."""
    at = dice.choice([0, _span(content, dice)[0]])
    return content[:at] + dice.choice(_SPECIAL).to_bytes(8, "little") + content[at + 8 :]


BYTES: tuple[Damage, ...] = (truncated, extended, flipped, overwritten, removed, repeated, moved, numbered)


# -------------------------------------------------------------------- other files


def other_file(trap: Path) -> Damage:
    """Something else in the file's place, with code in it where it can hold any."""

    def replaced(content: bytes, dice: random.Random) -> bytes:
        buffer = io.BytesIO()
        kind = dice.randrange(7)
        if kind == 0:
            return pickle.dumps({"generator": {"a": Trap(trap)}}, protocol=dice.choice([0, 1, 2, 4]))
        if kind in (1, 2):
            held = {"generator": {"a": torch.ones(2), "b": Trap(trap)}}
            torch.save(held, buffer, _use_new_zipfile_serialization=kind == 1)
        elif kind == 3:
            with zipfile.ZipFile(buffer, "w") as archive:
                archive.writestr("archive/data.pkl", pickle.dumps(Trap(trap), protocol=2))
                archive.writestr("archive/version", "3\n")
        elif kind == 4:
            header = json.dumps(
                {"__metadata__": {"facts": "{}", "format": "echo-rt snapshot", "version": "1"}}
            ).encode()
            return len(header).to_bytes(8, "little") + header
        elif kind == 5:
            text = b"[" * int(2 ** dice.uniform(0, 17))
            return len(text).to_bytes(8, "little") + text
        else:
            return dice.randbytes(int(2 ** dice.uniform(0, 12)))
        return buffer.getvalue()

    return replaced


def pickled_code(trap: Path) -> Damage:
    """A zip of torch's with code put into the pickle that it already has."""

    def poisoned(content: bytes, dice: random.Random) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w") as target:
            for name in source.namelist():
                data = source.read(name)
                if name.endswith("data.pkl"):
                    call = f"cos\nmkdir\n(V{trap}\ntR".encode()  # os.mkdir(trap)
                    at = 2 if dice.random() < 0.5 else dice.randrange(2, len(data))
                    data = data[:at] + call + dice.choice([b"", b"0"]) + data[at:]
                target.writestr(name, data)
        return buffer.getvalue()

    return poisoned


# -------------------------------------------------------------------- headers of safetensors


def _value(dice: random.Random) -> Any:
    nested: Any = 1
    for _ in range(dice.randrange(50)):
        nested = [nested]
    numbers = [-1, 2.5, 10**30, float("nan"), *_SPECIAL]
    lists = [[], [0], [0, 1], [3, -1], [2**62, 4], [0, 2**62, 2**62], [1] * 70, nested]
    return dice.choice([None, True, "", "x", "F32", "U8", "F4", {}, {"a": 1}, *numbers, *lists])


def _edited(node: Any, dice: random.Random) -> Any:
    """``node`` with one of its parts, however deep, replaced, renamed, removed or doubled."""
    if isinstance(node, str) and node.startswith("{"):
        return json.dumps(_edited(json.loads(node), dice))  # the facts, which are JSON in JSON
    if isinstance(node, dict) and node and dice.random() < 0.9:
        # A snapshot has some fifty tensors, and one place for all other facts.
        facts = [key for key in ("__metadata__", "facts") if key in node]
        key, act = dice.choice(facts if facts and dice.random() < 0.6 else list(node)), dice.random()
        rest = {name: value for name, value in node.items() if name != key}
        if act < 0.1:
            return rest
        if act < 0.2:
            return rest | {dice.choice([key + "x", "", "state.", "prompt.-1", "held.0.frames", "\0"]): node[key]}
        return {name: _edited(value, dice) if name == key else value for name, value in node.items()}
    if isinstance(node, list) and node and dice.random() < 0.8:
        place = dice.randrange(len(node))
        return [*node[:place], *dice.choice([[], [node[place]] * 2, [_edited(node[place], dice)]]), *node[place + 1 :]]
    if isinstance(node, int) and not isinstance(node, bool) and dice.random() < 0.5:
        return node + dice.choice([-4, -1, 1, 4, 64])
    return _value(dice)


def header_edited(content: bytes, dice: random.Random) -> bytes:
    """A well-formed file that says something else: wrong keys, dtypes, shapes, offsets that overlap."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for _ in range(dice.choice([1, 1, 2, 5])):
        header = _edited(header, dice)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def as_of_another_version(path: Path, version: str = "3", echo_rt: str = "9.1") -> None:
    """Makes of the snapshot at ``path`` what another echo-rt would have written, in another format version."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] |= {"version": version, "echo_rt": echo_rt}
    text = json.dumps(header).encode()
    path.write_bytes(with_valid_digest(len(text).to_bytes(8, "little") + text + content[8 + length :]))


def with_valid_digest(content: bytes) -> bytes:
    """A snapshot with the checksum that its contents should have, as far as it has a place for one."""
    length = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + length], content[8 + length :]
    try:
        claimed = json.loads(text)["__metadata__"]["sha256"].encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return content
    if len(claimed) != 64 or text.count(claimed) != 1:
        return content
    digest = hashlib.sha256(content[:8] + text.replace(claimed, b"0" * 64) + data).hexdigest().encode()
    return content[:8] + text.replace(claimed, digest) + data


# -------------------------------------------------------------------- weight files


def refusals(path: Path, rounds: int) -> int:
    """Count how often the weight file ``path`` with one to three bytes changed is refused; it may load too."""
    from echo_rt.errors import WeightsError
    from echo_rt.weights.files import open_tensors

    whole, dice, refused = path.read_bytes(), random.Random(7), 0
    for _ in range(rounds):
        damaged = bytearray(whole)
        for _ in range(dice.randrange(1, 4)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        path.write_bytes(damaged)
        try:
            for tensor in open_tensors(path).values():
                tensor.double().sum()
        except WeightsError as error:
            refused += 1
            assert "\n" not in str(error)
    return refused
