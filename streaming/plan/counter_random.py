"""Random numbers and orders as pure functions of what they are for: hashes and a keyed permutation, no generator."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from streaming.plan.decisions import Decision

Indices = NDArray[np.int64]
Words = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: SplitMix64's increment
_ROUNDS = 6


def mix64(values: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers that scatters its input."""
    z = values ^ (values >> np.uint64(30))
    z = z * np.uint64(0xBF58476D1CE4E5B9)
    z = z ^ (z >> np.uint64(27))
    z = z * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hashed(seed: int, *words: Indices | Decision) -> Words:
    """64 random bits for each row of words: a decision, and int64 that broadcast to (n,)."""
    return hashed_further(mix64(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) + _GOLDEN), *words)


def hashed_further(state: Words, *words: Indices | Decision) -> Words:
    """What `hashed` gives for the words that gave this state, and these after them."""
    for word in words:
        state = mix64((state ^ mix64(np.atleast_1d(word).astype(np.uint64) + _GOLDEN)) + _GOLDEN)
    return state


def unit(bits: Words) -> NDArray[np.float64]:
    """64 bits as a number in [0, 1)."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform(seed: int, index: Indices, counter: Indices, decision: Decision) -> NDArray[np.float64]:
    """Independent uniform numbers in [0, 1), float64 (n,), by hashing (seed, index, counter, decision)."""
    return unit(hashed(seed, index, counter, decision))


def evenly(start: Words, step: Indices) -> NDArray[np.float64]:
    """Numbers in [0, 1) that, for step 0, 1, 2, …, fill the interval evenly (Weyl's sequence of the golden ratio)."""
    return unit(start + step.astype(np.uint64) * _GOLDEN)


def text_keys(texts: list[str]) -> Indices:
    """64 bits of a digest of each text, the same in every process and catalog."""
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, dtype="<i8").astype(np.int64)


def permuted(position: Indices, size: Indices, key: Words) -> Indices:
    """Where each position, 0 ≤ position < size, goes in the permutation of 0 … size - 1 that key names; all (n,).

    A Feistel network of two digits of a mixed radix just large enough; what lands past the end is sent on until it
    falls inside (cycle walking; Black and Rogaway 2002), which less than one in √size does.
    """
    position, size, key = np.broadcast_arrays(position, size, key)
    left = np.ceil(np.sqrt(size)).astype(np.int64)
    right = -(-size // left)
    result = position.astype(np.int64)
    outside = np.arange(len(result))
    while len(outside):
        a, b, secret = left[outside], right[outside], key[outside]
        high, low = result[outside] // b, result[outside] % b
        for turn in range(_ROUNDS):
            secret = secret + _GOLDEN
            if turn % 2:
                low = (low + _below(high, secret, b)) % b
            else:
                high = (high + _below(low, secret, a)) % a
        result[outside] = high * b + low
        outside = outside[result[outside] >= size[outside]]
    return result


def _below(value: Indices, secret: Words, limit: Indices) -> Indices:
    return (mix64(mix64(value.astype(np.uint64) + secret) ^ secret) % limit.astype(np.uint64)).astype(np.int64)
