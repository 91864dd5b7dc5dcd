"""Hashes and orders without a generator."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.plan.counter_random import evenly, hashed, mix64, permuted, text_keys


def test_mix_gives_the_published_outputs_of_splitmix64() -> None:
    state = (1234567 + np.arange(1, 6, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert mix64(state).tolist() == published


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63 - 1))
def test_a_permutation_has_every_position_once(size: int, key: int) -> None:
    keys = np.full(size, key, dtype=np.uint64)
    found = permuted(np.arange(size), np.full(size, size), keys)
    assert np.array_equal(np.sort(found), np.arange(size))
    one = permuted(np.array([size - 1]), np.array([size]), keys[:1])
    assert one[0] == found[-1]


def test_permutations_of_other_keys_are_independent_and_large_ones_stay_inside() -> None:
    size = 1000
    keys = hashed(0, np.arange(200))
    found = np.array([permuted(np.arange(size), np.full(size, size), np.full(size, key)) for key in keys])
    # Where position 0 goes, over keys; and neighbours, which must not stay neighbours.
    assert len(np.unique(found[:, 0])) > 150
    assert np.abs(np.corrcoef(np.arange(size), found)[0, 1:]).max() < 0.2
    assert np.mean(np.abs(np.diff(found, axis=1)) == 1) == pytest.approx(2 / size, abs=1e-3)
    huge = permuted(np.arange(10**5) * 10**7, np.full(10**5, 10**12 + 39), hashed(1, np.zeros(10**5, np.int64)))
    assert (huge.min() >= 0, huge.max() < 10**12 + 39, len(np.unique(huge))) == (True, True, 10**5)


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(1, 500))
def test_even_numbers_fill_the_interval(start: int, count: int) -> None:
    numbers = np.sort(evenly(np.array([start], np.uint64), np.arange(count)))
    gaps = np.diff(np.concatenate([numbers, numbers[:1] + 1]))
    assert gaps.max() <= 2.7 / count


def test_a_text_s_key_is_its_own() -> None:
    assert text_keys(["a", "b", "a"]).tolist()[0] == text_keys(["a"]).tolist()[0]
    assert len(set(text_keys([f"s3://b/{i}" for i in range(1000)]).tolist())) == 1000
