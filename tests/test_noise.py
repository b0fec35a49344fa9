from __future__ import annotations

import pytest
import torch

from echo_rt.errors import ConfigError
from echo_rt.noise import CounterNoise, philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers published with Random123 for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    words = philox(tuple(torch.tensor([c]) for c in counter), key)  # type: ignore[arg-type]
    assert tuple(int(word) for word in words) == expected


def fill(seed: int, block: int, step: int, *shape: int) -> torch.Tensor:
    out = torch.empty(shape)
    CounterNoise(seed).fill(out, block, step)
    return out


def test_noise_is_standard_normal() -> None:
    x = fill(7, 3, 1, 400_000).double()
    assert abs(float(x.mean())) < 0.006
    assert abs(float(x.std()) - 1) < 0.005
    assert abs(float((x**3).mean())) < 0.02
    assert abs(float((x**4).mean()) - 3) < 0.06
    for distance in range(1, 9):  # neighbours, within a group of four words and across groups
        assert abs(float((x[distance:] * x[:-distance]).mean())) < 0.006


def test_noise_depends_on_seed_block_and_step_only() -> None:
    base = fill(1, 2, 3, 1000)
    assert torch.equal(base, fill(1, 2, 3, 1000))
    others = [fill(0, 2, 3, 1000), fill(1, 1, 3, 1000), fill(1, 2, 2, 1000), fill(1 + 2**32, 2, 3, 1000)]
    others.append(fill(1, 2 + 2**32, 3, 1000))
    for other in others:
        assert abs(float((base * other).mean())) < 0.15
    # A longer fill begins with the shorter one, so the shape plays no part either.
    assert torch.equal(fill(1, 2, 3, 7, 13).flatten(), fill(1, 2, 3, 91))
    assert torch.equal(fill(1, 2, 3, 91), base[:91])


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7", True])
def test_bad_seeds_are_refused(seed: object) -> None:
    with pytest.raises(ConfigError, match="seed must be an integer"):
        CounterNoise(seed)  # type: ignore[arg-type]


def test_largest_seed_works() -> None:
    assert torch.isfinite(fill(2**64 - 1, 10**7, 3, 100)).all()
