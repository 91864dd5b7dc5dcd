"""Random numbers as a pure function of (seed, sample index, view, draw), the same on every device.

No generator and no state: a number depends neither on the rank, the batch or the order in which it is asked for, nor on
a restart. `view` numbers the crops of a sample (0 and 1 global, then local); `draw` what the number is for. Draws below
1,000 belong to the augmentation, the others to the masks.
"""

from __future__ import annotations

from torch import Tensor

_STEP = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: splitmix64's increment


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer: torch has neither arithmetic nor shifts for uint64 on all devices."""
    return (value + 2**63) % 2**64 - 2**63


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)  # torch's >> repeats the sign bit; mask the copies away


def mix(x: Tensor) -> Tensor:
    """Finaliser of splitmix64 on int64 of any shape; multiplication wraps around. Source: prng.di.unimi.it."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def random_bits(seed: int, index: Tensor, view: int | Tensor, draw: int | Tensor) -> Tensor:
    """64 random bits for each sample, view and draw.

    index int64; view (at most 2^31) and draw (below 2^32) are integers or int64 tensors that broadcast with it.
    Returns int64 of the broadcast shape: output `(view << 32) + draw` of a splitmix64 whose state is a hash of the
    sample.
    """
    state = mix(index * _signed(_STEP) + _signed(seed))
    counter = (view << 32) + draw + 1
    return mix(state + (_signed(counter * _STEP) if isinstance(counter, int) else counter * _signed(_STEP)))


def uniform(seed: int, index: Tensor, view: int | Tensor, draw: int | Tensor) -> Tensor:
    """Uniform float32 in [0, 1), multiples of 2^-24; arguments and shape as `random_bits`.

    For an integer n below 2^24, `(n * u).floor()` is below n.
    """
    return _shift_right(random_bits(seed, index, view, draw), 40).float() * 2**-24
