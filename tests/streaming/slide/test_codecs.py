"""Blocks to pixels: the first rows of a JPEG are those of the whole, and cost less."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.slide import codecs

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def outcome(read: Callable[[], np.ndarray]) -> np.ndarray | str:
    try:
        return read().copy()
    except ValueError as error:
        return str(error)


@st.composite
def jpeg_blocks(draw) -> tuple[bytes, codecs.BlockFormat, np.random.Generator]:
    """A JPEG of noisy or smooth content with any subsampling, one scan or several, restart markers or none."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    width, height = 16 * draw(st.integers(1, 12)), 16 * draw(st.integers(2, 16))
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
    content = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    options = [
        *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, draw(st.sampled_from([0x111111, 0x211111, 0x121111, 0x221111, 0x411111]))),
        *(cv2.IMWRITE_JPEG_QUALITY, draw(st.integers(30, 95))),
        *(cv2.IMWRITE_JPEG_PROGRESSIVE, draw(st.sampled_from([0, 0, 0, 1]))),
        *(cv2.IMWRITE_JPEG_RST_INTERVAL, draw(st.sampled_from([0, 0, 0, 5]))),
    ]
    block = cv2.imencode(".jpg", content, options)[1].tobytes()
    return block, codecs.BlockFormat("JPEG", width, height, codecs.jpeg_prefix(b"", rgb=False)), rng


@PROPERTY
@given(jpeg_blocks(), st.data())
def test_the_first_rows_of_a_block_are_those_of_the_whole(made, data: st.DataObject) -> None:
    block, form, _ = made
    scale, rows = data.draw(st.sampled_from([1, 2, 4, 8])), data.draw(st.integers(1, form.height))
    whole = codecs.decode(block, form, scale).copy()
    wanted = -(-rows // scale)
    np.testing.assert_array_equal(codecs.decode(block, form, scale, rows)[:wanted], whole[:wanted])


@PROPERTY
@given(jpeg_blocks(), st.data())
def test_the_first_rows_of_a_damaged_block_are_an_error_or_those_of_the_whole_as_far_as_its_damage_shows(
    made, data: st.DataObject
) -> None:
    block, form, rng = made
    rows = data.draw(st.integers(1, form.height // 2))
    start = block.index(b"\xff\xda") + 14
    at = data.draw(st.integers(start, len(block)))
    # Codes of ones alone are none; random bytes hit markers, ends and lengths too.
    junk = data.draw(st.sampled_from([b"\xff\x00" * 16, rng.bytes(40), b"\xff\xd9", b""]))
    damaged = block[:at] + junk + block[at + len(junk) :] if junk else block[:at]
    whole = outcome(lambda: codecs.decode(damaged, form))
    part = outcome(lambda: codecs.decode(damaged, form, 1, rows))
    if not isinstance(whole, str):
        assert not isinstance(part, str)
    if not isinstance(part, str):
        reference = simplejpeg.decode_jpeg(form.prefix + damaged[2:], strict=False)
        np.testing.assert_array_equal(part[:rows], reference[:rows])


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
def test_the_first_rows_of_a_sound_block_are_decoded_alone(
    monkeypatch: pytest.MonkeyPatch, subsampling: str, scale: int
) -> None:
    # Whether decoding may end early is told by the text of a libjpeg's warning: with another text, every block would be
    # decoded a second time, whole, and nothing but the speed would tell.
    content = cv2.resize(np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8), (256, 256))
    block = simplejpeg.encode_jpeg(content, colorsubsampling=subsampling)
    form = codecs.BlockFormat("JPEG", 256, 256, codecs.jpeg_prefix(b"", rgb=False))
    decode_into, heights = codecs._decode_into, list[int]()

    def counted(jpeg: bytes | bytearray, out: np.ndarray, scale: int) -> None:
        heights.append(len(out))
        decode_into(jpeg, out, scale)

    monkeypatch.setattr(codecs, "_decode_into", counted)
    for rows in (1, 100, 200, 256):
        codecs.decode(block, form, scale, rows)
    enough = [-(-(rows + 2 * scale) // 16) * 16 for rows in (1, 100, 200)]
    assert heights == [rows // scale for rows in (*enough, 256)]
