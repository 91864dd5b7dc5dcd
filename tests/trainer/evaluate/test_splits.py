from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.errors import ConfigError
from trainer.evaluate.annotations import AnnotatedTiles
from trainer.evaluate.datasets import Samples, Tile, read_dataset
from trainer.evaluate.splits import held_out, leak_warning, make_folds

Table = Callable[..., str]


def labelled(labels: list[int], patients: list[int] | None, **more: object) -> Samples:
    names = None if patients is None else np.array([f"p{p}" for p in patients])
    tiles = tuple(Tile(uri=f"{i}.png") for i in range(len(labels)))
    return Samples(source="d.csv", tiles=tiles, classes=("a", "b"), labels=np.array(labels), patients=names, **more)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=30, max_size=80), st.integers(2, 5), st.integers(0, 5))
def test_every_sample_is_scored_once_and_no_patient_is_on_both_sides(
    patients: list[int], num_folds: int, seed: int
) -> None:
    patients = [*range(10), *patients]  # every patient has both classes somewhere
    labels = [0, 1] * len(patients)
    samples = labelled(labels, [p for p in patients for _ in range(2)])
    folds = make_folds(samples, num_folds, seed)
    assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == list(range(len(labels)))
    assert samples.patients is not None
    for fold in folds:
        assert not set(samples.patients[fold.train]) & set(samples.patients[fold.test])
        assert set(np.array(labels)[fold.train]) == {0, 1}


def test_slides_are_kept_together_where_patients_are_not_known() -> None:
    slides = np.array(["s0", "s0", "s1", "s1", "s2", "s2"])
    samples = labelled([0, 1, 0, 1, 0, 1], None, slides=slides)
    assert all(len(set(slides[fold.test])) == len(fold.test) / 2 for fold in make_folds(samples, 3))


def test_there_are_no_more_folds_than_patients_of_the_rarest_class() -> None:
    labels = [0] * 40 + [1] * 40
    patients = [i // 4 for i in range(40)] + [100 + i // 20 for i in range(40)]  # ten of one class, two of the other
    folds = make_folds(labelled(labels, patients), 5)
    assert len(folds) == 2
    assert all(set(np.array(labels)[fold.test]) == {0, 1} for fold in folds)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=20, max_size=40), st.integers(0, 4))
def test_a_threshold_is_chosen_on_patients_neither_learnt_from_nor_scored(patients: list[int], seed: int) -> None:
    samples = labelled([0, 1] * (len(patients) + 7), [p for p in [*range(7), *patients] for _ in range(2)])
    assert samples.patients is not None
    for fold in make_folds(samples, 4, seed):
        held = held_out(samples, fold, seed)
        assert held.val is not None
        sides = [set(samples.patients[part]) for part in (held.train, held.val, held.test)]
        assert all(sides)
        assert sum(map(len, sides)) == len(set.union(*sides))
        assert sorted([*held.train, *held.val]) == sorted(fold.train)


def test_one_patient_to_learn_from_leaves_none_for_a_threshold(table: Table) -> None:
    samples = labelled([0, 1, 0, 1], [0, 0, 1, 1])
    with pytest.raises(ConfigError, match="a threshold must be chosen on another one; add patients"):
        held_out(samples, make_folds(samples)[0])


def test_a_random_split_of_tiles_that_may_be_of_one_slide_is_told() -> None:
    assert "THE SCORES MAY LEAK" in str(leak_warning(labelled([0, 1], None)))
    assert leak_warning(labelled([0, 1], [0, 1])) is None
    assert leak_warning(labelled([0, 1], None, slides=np.array(["a", "b"]))) is None
    assert leak_warning(labelled([0, 1], None, parts=np.array(["train", "test"]))) is None


@pytest.mark.parametrize("kind", ["patient", "slide"])
def test_a_split_with_one_patient_or_slide_on_both_sides_is_refused(table: Table, kind: str) -> None:
    rows = [{"path": f"{i}.png", "label": "ab"[i % 2], kind: f"x{i // 2}", "split": "train"} for i in range(8)]
    for row in (rows[7], rows[6], rows[5]):
        row["split"] = "test"
    uri = table(rows)
    with pytest.raises(ConfigError, match=rf"{kind} x2 is in test and in train \(1 such\)"):
        make_folds(read_dataset(uri, AnnotatedTiles()))


def test_a_file_on_both_sides_is_refused_where_nothing_else_is_known(table: Table) -> None:
    rows = [{"path": f"{i % 3}.png", "label": "ab"[i % 2], "split": ("train", "test")[i // 4]} for i in range(8)]
    with pytest.raises(ConfigError, match=r"file .*0\.png is in test and in train"):
        make_folds(read_dataset(table(rows), AnnotatedTiles()))


def test_a_given_split_is_scored_on_its_test_part(table: Table) -> None:
    parts = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    rows = [{"path": f"{i}.png", "label": "ab"[i % 2], "split": part} for i, part in enumerate(parts)]
    (fold,) = make_folds(read_dataset(table(rows), AnnotatedTiles()))
    assert fold.train.tolist() == [0, 1, 2, 3]
    assert fold.test.tolist() == [6, 7]
    assert fold.val is not None
    assert fold.val.tolist() == [4, 5]


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([("a", "p0"), ("a", "p1"), ("b", "p2"), ("b", "p2")], "class 'b' comes from one patient alone"),
        ([("a", "p0"), ("b", "p0")], "all 2 samples are of one patient or slide"),
    ],
)
def test_too_few_patients_are_told_with_their_class(table: Table, rows: list[tuple[str, str]], named: str) -> None:
    uri = table([{"path": f"{i}.png", "label": a, "patient": b} for i, (a, b) in enumerate(rows)])
    with pytest.raises(ConfigError, match=named):
        make_folds(read_dataset(uri, AnnotatedTiles()))


def test_a_test_class_that_is_not_learnt_is_refused(table: Table) -> None:
    rows = [{"path": f"{i}.png", "label": name, "split": "train"} for i, name in enumerate("abac")]
    rows[3]["split"] = "test"
    with pytest.raises(ConfigError, match="class 'c' is to be scored, and not to be learnt from"):
        make_folds(read_dataset(table(rows), AnnotatedTiles()))


def test_the_same_file_twice_is_on_one_side(table: Table) -> None:
    rows = [{"path": f"{i % 10}.png", "label": "ab"[i % 2]} for i in range(20)]
    samples = read_dataset(table(rows), AnnotatedTiles())
    for fold in make_folds(samples):
        assert not set(fold.train % 10) & set(fold.test % 10)


@pytest.mark.parametrize("kind", ["patient", "slide"])
def test_a_file_of_two_patients_is_refused(table: Table, kind: str) -> None:
    rows = [{"path": f"{i % 10}.png", "label": "ab"[i % 2], kind: f"p{i}"} for i in range(11)]
    with pytest.raises(ConfigError, match=rf"0\.png is of two {kind}s, p0 and p10 \(1 such rows\)"):
        make_folds(read_dataset(table(rows), AnnotatedTiles()))
