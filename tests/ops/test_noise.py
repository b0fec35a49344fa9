from __future__ import annotations

import math

import pytest
import torch
from naive_noise import naive_noise
from streaming import DEVICES, require

import echo_rt.ops.noise
from echo_rt.errors import ConfigError
from echo_rt.ops import reference
from echo_rt.ops.noise import fill_normal, philox, seed_words
from echo_rt.options import check_seed


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


def fill(seed: int, block: int, step: int, *shape: int, device: str = "cpu") -> torch.Tensor:
    """What the operation makes; of its positions it may read the block alone."""
    out = torch.empty(shape, device=device)
    positions = torch.tensor([block, -1, -1, -1, -1], device=device)
    reference.counter_noise(out, positions, torch.tensor(seed_words(seed), device=device), step)
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
        check_seed(seed)  # type: ignore[arg-type]


def test_largest_seed_works() -> None:
    assert torch.isfinite(fill(2**64 - 1, 10**7, 3, 100)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("seed", "block", "step"),
    [(0, 0, 0), (7, 3, 2), (2**64 - 1, 2**32 - 1, 3), (2**32, 2**32, 0), (2**63 + 5, 5 * 2**32 + 9, 1), (1, 2**62, 4)],
)
def test_noise_is_the_one_defined(seed: int, block: int, step: int, device: str) -> None:
    """On every device; the last bit of a float32 may differ, since each has sines and logarithms of its own."""
    out = fill(seed, block, step, 3, 7, 2, device=require(device))
    expected = torch.tensor(naive_noise(seed, block, step, out.numel()), dtype=torch.float64)
    torch.testing.assert_close(out.flatten().cpu().double(), expected, rtol=2.0**-23, atol=1e-12)


@pytest.mark.parametrize(("seed", "block"), [(3, 5), (2**64 - 1, 2**32 - 1), (2**63, 2**40 + 1)])
def test_a_block_that_the_host_counts_has_the_same_noise(seed: int, block: int) -> None:
    """Bit for bit, or a stream would change with who counts its blocks."""
    out = torch.empty(5, 7)
    fill_normal(out, block, 2, seed_words(seed))
    assert torch.equal(out, fill(seed, block, 2, 5, 7))


@pytest.mark.cuda
def test_words_are_the_same_on_a_gpu() -> None:
    index = torch.arange(100_000, device=require("cuda"))
    counter, key = (3, 2**32 - 1, 5), (2**32 - 1, 77)
    for ours, theirs in zip(philox((index, *counter), key), philox((index.cpu(), *counter), key), strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("word", [0, 2**32 - 1])
def test_extreme_words_give_finite_numbers(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest word is the largest number there can be, the largest word the smallest above zero."""

    def extreme(counter: tuple[torch.Tensor | int, ...], key: tuple[int, int]) -> list[torch.Tensor]:
        return [torch.full_like(torch.as_tensor(counter[0]), word) for _ in range(4)]

    monkeypatch.setattr(echo_rt.ops.noise, "philox", extreme)
    x = fill(0, 0, 0, 8)
    assert torch.isfinite(x).all()
    u = (word + 0.5) / 2**32
    largest = math.sqrt(-2 * math.log(u))
    assert largest > 0
    expected = [largest * math.cos(2 * math.pi * u), largest * math.sin(2 * math.pi * u)] * 4
    torch.testing.assert_close(x, torch.tensor(expected), rtol=1e-6, atol=1e-13)
