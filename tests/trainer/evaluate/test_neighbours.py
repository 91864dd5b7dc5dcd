"""The search in blocks against scikit-learn's, which holds all distances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from trainer.evaluate import neighbours
from trainer.evaluate.neighbours import nearest, nearest_others


@pytest.fixture(autouse=True, params=[(7, 32), (24, 3)], ids=["whole rows", "groups"])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    block, group = request.param
    monkeypatch.setattr(neighbours, "_BLOCK", block)
    monkeypatch.setattr(neighbours, "_GROUP", group)


def drawn(num: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num, 5)).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 80), st.integers(1, 60), st.integers(1, 30), st.integers(0, 9))
def test_neighbours_are_scikit_learns(num: int, num_queries: int, k: int, seed: int) -> None:
    among, queries = drawn(num, seed), drawn(num_queries, seed + 1)
    search = NearestNeighbors(metric="cosine", algorithm="brute").fit(among.astype(np.float64))
    distance, index = search.kneighbors(queries.astype(np.float64), min(k, num))
    found = nearest(among, queries, k)
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_allclose(found.similarity, 1 - distance, atol=1e-6)
    distance, index = search.kneighbors(n_neighbors=min(k, num - 1))
    (others,) = nearest_others(among, [(None, k)])
    np.testing.assert_array_equal(others.index, index)
    np.testing.assert_allclose(others.similarity, 1 - distance, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 80), st.integers(2, 4), st.integers(0, 9))
def test_those_of_the_same_code_are_left_out(num: int, num_codes: int, seed: int) -> None:
    vectors, codes = drawn(num, seed), np.arange(num) % num_codes
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    similarity = np.where(codes[:, None] == codes, -2, unit @ unit.T)
    plain, apart = nearest_others(vectors, [(None, 1), (codes, 1)])
    np.testing.assert_array_equal(apart.index[:, 0], similarity.argmax(axis=1))
    np.testing.assert_array_equal(plain.index[:, 0], (unit @ unit.T - 3 * np.eye(num)).argmax(axis=1))
    asked = np.arange(num)[::2]
    np.testing.assert_array_equal(
        nearest(vectors, vectors[asked], 1, codes=(codes, codes[asked])).index, apart.index[::2]
    )
