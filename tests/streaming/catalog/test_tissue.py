"""Where tissue lies: thresholds and shares, in arithmetic that gives the same bits everywhere."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.catalog.tissue import otsu, window_fraction
from streaming.vision import cv2


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_windows=st.integers(2, 40),
    extent=st.one_of(st.sampled_from([1.0, 2.0, 4.0, 8.0]), st.floats(0.05, 12)),
)
def test_a_window_has_the_same_share_alone_and_among_others_to_the_bit(
    seed: int, num_windows: int, extent: float
) -> None:
    random = np.random.default_rng(seed)
    rows, columns = random.integers(1, 30, (2, num_windows))
    start = np.cumsum(rows * columns) - rows * columns
    cells = random.integers(0, 256, int((rows * columns).sum()), dtype=np.uint8)
    top, left = random.uniform(-3, 30, (2, num_windows))
    together = window_fraction(cells, start, rows, columns, top, left, extent)
    alone = [
        window_fraction(cells, *(column[i : i + 1] for column in (start, rows, columns, top, left)), extent)
        for i in range(num_windows)
    ]
    assert together.tobytes() == np.concatenate(alone).tobytes()


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    modes=st.integers(1, 12),
    spread=st.floats(0.1, 40),
    shape=st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
def test_otsu_parts_pixels_as_opencv_s_does(seed: int, modes: int, spread: float, shape: tuple[int, int]) -> None:
    random = np.random.default_rng(seed)
    levels = random.uniform(0, 255, modes)[random.integers(0, modes, shape)]
    image = np.clip(random.normal(levels, spread), 0, 255).astype(np.uint8)
    wanted, _ = cv2.threshold(image, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    found = otsu(np.bincount(image.ravel(), minlength=256))
    # Between two levels that no pixel has, it does not matter which.
    assert np.array_equal(image > found, image > wanted)
