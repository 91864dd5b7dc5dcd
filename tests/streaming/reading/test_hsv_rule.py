"""The HSV rule, which mostly makes no image in HSV: OpenCV's is the oracle."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.reading.hsv_rule import ColourPlanes, HsvRule
from streaming.vision import cv2

EDGES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 59, 60, 61, 102, 103, 104, 127, 128, 179, 180, 204, 205, 238, 239, 254, 255)


def inside(tile: np.ndarray, rule: HsvRule) -> np.ndarray:
    """Which pixels OpenCV has within the bounds."""
    hsv = cv2.cvtColor(tile, cv2.COLOR_RGB2HSV).astype(int)
    low, high = np.array([rule.hue, rule.saturation, rule.value]).T
    return ((hsv >= low) & (hsv <= high)).all(axis=-1)


def check_bounds(tile: np.ndarray, rule: HsvRule) -> None:
    wanted = inside(tile, rule)
    planes = ColourPlanes(tile, rule.saturation[0], rule.value[0])
    assert wanted[planes.surely() > 0].all()
    assert planes.possibly()[wanted].all()


def check_verdicts(tile: np.ndarray, rule: HsvRule) -> None:
    """Where half a pixel less than the tile has is wanted, and half a pixel more."""
    found = inside(tile, rule)
    bounds = {"hue": rule.hue, "saturation": rule.saturation, "value": rule.value}
    for wanted in (found.sum() - 0.5, found.sum() + 0.5):
        if 0 < wanted < found.size:
            share = float(wanted / found.size)
            assert HsvRule(min_share=share, **bounds).accepts(tile) == (wanted < found.sum())


numbers = st.integers(0, 255)
bounds = st.tuples(numbers, numbers).map(lambda pair: (min(pair), max(pair)))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_verdicts_are_those_of_opencv_s_hsv(data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    centre, spread = random.integers(0, 256, 3), data.draw(st.sampled_from([2, 10, 60, 300]))
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    tile = np.clip(centre + random.integers(-spread, spread, (height, width, 3)), 0, 255).astype(np.uint8)
    published = HsvRule()
    rule = HsvRule(
        hue=data.draw(st.one_of(st.just(published.hue), st.just((90, 179)), bounds)),
        saturation=data.draw(st.one_of(st.just(published.saturation), numbers.map(lambda low: (low, 255)), bounds)),
        value=data.draw(st.one_of(st.just(published.value), numbers.map(lambda low: (low, 255)), bounds)),
    )
    check_verdicts(tile, rule)


@settings(max_examples=40, deadline=None)
@given(numbers, numbers)
def test_bounds_on_edge_colours_hold_for_any_saturation_and_value(saturation: int, value: int) -> None:
    colours = np.stack(np.meshgrid(EDGES, EDGES, EDGES), axis=-1).reshape(-1, 1, 3).astype(np.uint8)
    check_bounds(colours, HsvRule(saturation=(saturation, 255), value=(value, 255)))


def test_published_bounds_hold_for_each_colour_that_there_is() -> None:
    green, blue = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    decided = 0.0
    for red in range(256):
        colours = np.stack([np.full_like(green, red), green, blue], axis=-1)
        check_bounds(colours, HsvRule())
        planes = ColourPlanes(colours, 8, 103)
        decided += ((planes.surely() > 0) | (planes.possibly() == 0)).mean() / 256
    # Or else the rule would do its work twice.
    assert decided > 0.95
