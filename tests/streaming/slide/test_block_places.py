"""Which places of blocks in a file are refused: by an oracle that looks at each pair."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.errors import SlideError
from streaming.slide.block_level import check_places

_FILE_NBYTES = 24


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 4)), max_size=7))
def test_blocks_that_share_bytes_are_refused_unless_they_are_the_same(places: list[tuple[int, int]]) -> None:
    used = {place for place in places if place[1]}
    odd = {one for one in used for other in used if one != other and one[0] < sum(other) and other[0] < sum(one)}
    offsets, nbytes = (np.array([place[i] for place in places], np.int64) for i in (0, 1))
    if not odd:
        check_places("a.svs", offsets, nbytes, _FILE_NBYTES)
        return
    with pytest.raises(SlideError, match="belong to another block too") as caught:
        check_places("a.svs", offsets, nbytes, _FILE_NBYTES)
    block = int(str(caught.value).split("block ")[1].split(":")[0])
    assert places[block] in odd
