import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from trainer.evaluate.scores import auroc, balanced_accuracy, bootstrap, f1, match_points

RANDOM = np.random.default_rng(0)


def drawn(num: int = 400, num_classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    labels = RANDOM.integers(0, num_classes, num)
    return labels, np.where(RANDOM.random(num) < 0.7, labels, RANDOM.integers(0, num_classes, num))


def test_balanced_accuracy_is_scikit_learns() -> None:
    labels, predicted = drawn()
    score = balanced_accuracy("knn", labels, predicted, None, 3)
    assert score.value == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert np.isnan(score.low)
    assert score.n == 400


def test_an_interval_is_the_percentiles_of_resampled_patients() -> None:
    labels, predicted = drawn()
    groups = np.arange(400) // 20
    score = balanced_accuracy("knn", labels, predicted, groups, 3)
    random, values = np.random.default_rng(7), []
    for _ in range(1000):
        chosen = np.concatenate([np.flatnonzero(groups == g) for g in random.integers(0, 20, 20)])
        values.append(balanced_accuracy_score(labels[chosen], predicted[chosen]))
    assert (score.low, score.high) == pytest.approx(tuple(np.quantile(values, (0.025, 0.975))), abs=0.01)
    assert score.groups == 20


def test_tiles_of_one_patient_are_no_independent_evidence() -> None:
    right = np.repeat(np.random.default_rng(1).random(10) < 0.5, 100).astype(np.int64)
    labels = np.tile([0, 1], 500)
    predicted = np.where(right, labels, 1 - labels)
    by_patient = balanced_accuracy("knn", labels, predicted, np.repeat(np.arange(10), 100), 2)
    as_if_tiles = balanced_accuracy("knn", labels, predicted, np.arange(1000), 2)
    assert by_patient.high - by_patient.low > 5 * (as_if_tiles.high - as_if_tiles.low)


@pytest.mark.parametrize(("num_groups", "known"), [(1, False), (9, False), (10, True)])
def test_below_ten_patients_there_is_no_interval(num_groups: int, known: bool) -> None:
    labels, predicted = drawn()
    groups = np.arange(400) % num_groups
    for score in (
        balanced_accuracy("knn", labels, predicted, groups, 3),
        auroc("slide", labels, np.eye(3)[predicted], groups, np.zeros(400, np.int64)),
    ):
        assert np.isfinite(score.value)
        assert np.isfinite([score.low, score.high]).all() == known
        assert score.groups == num_groups


def test_a_resample_without_a_class_does_not_shift_the_interval() -> None:
    # One patient of twenty alone has the class that is never recognised: the score is 2/3 with it, and 1 without.
    labels = np.append(np.tile([0, 1], 19), [2, 2])
    groups = np.arange(40) // 2
    score = balanced_accuracy("knn", labels, labels * (labels < 2), groups, 3)
    assert (score.value, score.low, score.high) == pytest.approx((2 / 3,) * 3)


def test_dice_of_sums_is_scikit_learns_f1() -> None:
    labels, predicted = drawn()
    onehot = [np.eye(3)[labels], np.eye(3)[predicted]]
    hit = onehot[0] * onehot[1]
    parts = np.stack([hit, onehot[1] - hit, onehot[0] - hit], axis=2)
    score = bootstrap("segmentation", "Dice", parts, None, f1)
    assert score.value == pytest.approx(f1_score(labels, predicted, average="macro"))


@pytest.mark.parametrize("num_classes", [2, 3])
def test_area_under_the_curve_is_scikit_learns(num_classes: int) -> None:
    labels = RANDOM.integers(0, num_classes, 60)
    scores = RANDOM.random((60, num_classes)) + np.eye(num_classes)[labels] * 0.5
    scores /= scores.sum(axis=1, keepdims=True)
    wanted = roc_auc_score(labels, scores[:, 1] if num_classes == 2 else scores, multi_class="ovr")
    score = auroc("slide", labels, scores, np.arange(60), np.zeros(60, np.int64))
    assert score.value == pytest.approx(wanted)
    assert score.low < score.value < score.high


@pytest.mark.parametrize("num_classes", [2, 3])
def test_area_is_the_mean_of_those_within_folds(num_classes: int) -> None:
    labels, folds = np.arange(90) % num_classes, np.arange(90) // 30
    scores = RANDOM.integers(0, 6, (90, num_classes)) / 5 + folds[:, None] * labels[:, None]  # never to be mixed
    scores /= scores.sum(axis=1, keepdims=True).clip(1e-9)

    def area(fold: int) -> float:
        own, truth = scores[folds == fold], labels[folds == fold]
        columns = [1] if num_classes == 2 else range(num_classes)
        return float(np.mean([roc_auc_score(truth == k, own[:, k]) for k in columns]))

    score = auroc("slide", labels, scores, None, folds)
    assert score.value == pytest.approx(np.mean([area(fold) for fold in range(3)]))
    assert np.isnan(score.low)


def test_without_any_signal_the_area_is_a_half() -> None:
    # Each fold's model says what share of the class it has seen, and noise: it saw less where its test has more.
    values, random = list[float](), np.random.default_rng(4)
    for _ in range(40):
        labels, folds = (random.random(60) < 0.4).astype(np.int64), np.arange(60) % 5
        seen = np.array([labels[folds != fold].mean() for fold in range(5)])[folds]
        said = seen + random.normal(scale=0.001, size=60)
        values.append(auroc("slide", labels, np.stack([1 - said, said], axis=1), None, folds).value)
    assert np.mean(values) == pytest.approx(0.5, abs=3 * np.std(values) / 40**0.5)


def test_an_area_s_interval_is_the_percentiles_of_scikit_learns_weighted_areas() -> None:
    labels, groups, folds = np.arange(72) % 2, np.arange(72) // 4, np.arange(72) // 36
    said = RANDOM.integers(0, 8, 72) / 8 + 0.2 * labels  # ties, too
    score = auroc("slide", labels, np.stack([-said, said], axis=1), groups, folds, seed=3)
    random, values = np.random.default_rng(8), list[float]()
    for _ in range(1000):
        weight = np.bincount(random.integers(0, 18, 18), minlength=18)[groups]
        values.append(
            np.mean([roc_auc_score(labels[f], said[f], sample_weight=weight[f]) for f in (folds == 0, folds == 1)])
        )
    assert (score.low, score.high) == pytest.approx(tuple(np.quantile(values, (0.025, 0.975))), abs=0.015)


def counts(truth: np.ndarray, found: np.ndarray, radius: float) -> tuple[int, int, int]:
    hit, right = match_points(truth, found, radius)
    assert hit.sum() == right.sum()
    return int(hit.sum()), int((~right).sum()), int((~hit).sum())


def test_points_match_once_each_and_within_the_radius() -> None:
    truth = np.array([[0.0, 0], [10, 0]])
    assert counts(truth, np.array([[1.0, 0], [2, 0]]), 3) == (1, 1, 1)
    assert counts(truth, np.array([[3.0, 0], [13, 0]]), 3) == (2, 0, 0)
    assert counts(truth, np.zeros((0, 2)), 3) == (0, 0, 2)
    assert counts(np.zeros((0, 2)), truth, 3) == (0, 2, 0)
    hit, right = match_points(truth, np.array([[13.0, 0], [50, 0]]), 3)
    assert hit.tolist() == [False, True]
    assert right.tolist() == [True, False]


def test_points_are_paired_so_that_most_match_even_where_the_nearest_pair_would_block_others() -> None:
    truth, found = np.array([[0.0, 0], [4, 0]]), np.array([[3.0, 0], [7, 0]])
    assert counts(truth, found, 3) == (2, 0, 0)  # the pair (4, 3) is the nearest, and leaves nothing for 0


POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=5)


@settings(max_examples=60, deadline=None)
@given(POINTS, POINTS, st.integers(1, 4))
def test_hits_are_the_largest_matching(truth: list, found: list, radius: int) -> None:
    near = [[np.hypot(a[0] - b[0], a[1] - b[1]) <= radius for b in found] for a in truth]

    def largest(row: int, used: frozenset[int]) -> int:
        if row == len(truth):
            return 0
        free = [j for j in range(len(found)) if near[row][j] and j not in used]
        return max([largest(row + 1, used), *(1 + largest(row + 1, used | {j}) for j in free)])

    a, b = (np.array(points, dtype=float).reshape(-1, 2) for points in (truth, found))
    hits, false, missed = counts(a, b, radius)
    assert hits == largest(0, frozenset())
    assert (hits + missed, hits + false) == (len(truth), len(found))
