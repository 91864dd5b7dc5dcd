import numpy as np
import pytest
from sklearn.datasets import make_blobs
from sklearn.linear_model import LogisticRegression

from trainer.evaluate.datasets import Samples, Tile
from trainer.evaluate.probes import linear_probe, logistic, nearest_neighbours
from trainer.evaluate.quality import neighbour_scores, rankme

POINTS, LABELS = make_blobs(300, 8, centers=3, cluster_std=4.0, random_state=0)
POINTS = POINTS.astype(np.float32)
TRAIN, TEST = slice(0, 200), slice(200, 300)


def test_neighbours_vote_by_cosine() -> None:
    predicted = nearest_neighbours(POINTS[TRAIN], LABELS[TRAIN], POINTS[TEST], k=20)
    unit = POINTS / np.linalg.norm(POINTS, axis=1, keepdims=True)
    nearest = (-unit[TEST] @ unit[TRAIN].T).argsort(axis=1)[:, :20]
    votes = np.stack([(LABELS[TRAIN][nearest] == c).sum(axis=1) for c in range(3)], axis=1)
    clear = np.sort(votes, axis=1)[:, -1] > np.sort(votes, axis=1)[:, -2]
    np.testing.assert_array_equal(predicted[clear], votes.argmax(axis=1)[clear])


def test_lengths_of_embeddings_do_not_matter_to_neighbours() -> None:
    lengths = np.random.default_rng(0).uniform(0.1, 10, (200, 1)).astype(np.float32)
    one = nearest_neighbours(POINTS[TRAIN], LABELS[TRAIN], POINTS[TEST], k=5)
    np.testing.assert_array_equal(one, nearest_neighbours(POINTS[TRAIN] * lengths, LABELS[TRAIN], POINTS[TEST], k=5))


def test_fewer_samples_than_neighbours_all_vote() -> None:
    assert nearest_neighbours(POINTS[:3], np.array([1, 1, 0]), POINTS[3:6], k=20).tolist() == [1, 1, 1]


def test_the_linear_probe_finds_what_the_closed_form_finds() -> None:
    predicted = linear_probe(POINTS[TRAIN], LABELS[TRAIN], POINTS[TEST], 3, steps=2000)
    wanted = LogisticRegression(C=1e6, max_iter=5000).fit(POINTS[TRAIN], LABELS[TRAIN]).predict(POINTS[TEST])
    assert (predicted == wanted).mean() > 0.9
    np.testing.assert_array_equal(predicted, linear_probe(POINTS[TRAIN], LABELS[TRAIN], POINTS[TEST], 3, steps=2000))


def test_logistic_regression_does_not_mind_the_scale_of_a_dimension() -> None:
    scale = np.array([1e3, 1, 1e-3, 1, 1, 1, 1, 1], dtype=np.float32)
    one = logistic(POINTS[TRAIN], LABELS[TRAIN], POINTS[TEST])
    np.testing.assert_array_equal(one, logistic(POINTS[TRAIN] * scale, LABELS[TRAIN], POINTS[TEST] * scale))
    assert (one == LABELS[TEST]).mean() > 0.8


def four(site: list[str], patients: list[str]) -> Samples:
    tiles = tuple(Tile(uri=f"{i}") for i in range(4))
    return Samples(
        source="d",
        tiles=tiles,
        classes=("a", "b"),
        labels=np.array([0, 0, 1, 1]),
        sites=np.array(site),
        patients=np.array(patients),
    )


ANGLES = np.deg2rad([0, 10, 90, 100])
PAIRS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32)  # 0 and 1 are neighbours, 2 and 3 too


@pytest.mark.parametrize(
    ("site", "index", "purity"),
    [(["x", "y", "x", "y"], 1.0, 1.0), (["x", "x", "y", "y"], None, 1.0)],
)
def test_the_robustness_index_is_one_where_neighbours_share_biology_across_sites(
    site: list[str], index: float | None, purity: float
) -> None:
    found = {s.metric: s.value for s in neighbour_scores(PAIRS, four(site, list("pqrs")), k=1)}
    assert found["purity by class, k=1"] == purity
    value = found["robustness index, k=1"]
    assert np.isnan(value) if index is None else value == index


def test_the_robustness_index_is_zero_where_neighbours_share_the_site_alone() -> None:
    mixed = PAIRS[[0, 2, 1, 3]]  # neighbours are now 0 and 2, 1 and 3: of different classes
    found = {s.metric: s.value for s in neighbour_scores(mixed, four(["x", "y", "x", "y"], list("pqpq")), k=1)}
    assert found["robustness index, k=1"] == 0
    assert found["purity by class, k=1"] == 0
    assert found["purity by patient, k=1"] == 1
    assert found["retrieval, top 1 of other patients"] == 0.5


def test_rankme_is_the_exponential_of_the_singular_values_entropy() -> None:
    values = np.linalg.svd(POINTS, compute_uv=False)
    shares = values / values.sum()
    assert rankme(POINTS).value == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
