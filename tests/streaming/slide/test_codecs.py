"""Blocks to pixels: the first rows of a JPEG are those of the whole and cost less; JPEG 2000 is right at every size."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import imagecodecs
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from streaming.slide import codecs, jpeg2000, openjpeg, resample, ycbcr
from streaming.synthetic.jpeg2000 import jpeg2000_ycbcr
from streaming.vision import cv2
from tests.tiff_files import TiffSlide, encode, level_pixels, restyled

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def outcome(read: Callable[[], np.ndarray]) -> np.ndarray | str:
    try:
        return read().copy()
    except ValueError as error:
        return str(error)


def first(form: codecs.BlockFormat, rows: int) -> tuple[int, int, int, int]:
    """The area of a block's first rows."""
    return 0, 0, form.width, rows


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
    np.testing.assert_array_equal(codecs.decode(block, form, scale, first(form, rows))[:wanted], whole[:wanted])


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
    part = outcome(lambda: codecs.decode(damaged, form, 1, first(form, rows)))
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
        codecs.decode(block, form, scale, first(form, rows))
    enough = [-(-(rows + 2 * scale) // 16) * 16 for rows in (1, 100, 200)]
    assert heights == [rows // scale for rows in (*enough, 256)]


def jpeg2000_block(compression: str, subsampling: tuple[int, int], size: int = 256) -> tuple[np.ndarray, bytes]:
    made = TiffSlide(width=size, height=size, block=(size, size), compression=compression, subsampling=subsampling)
    content = level_pixels(made, 0)
    return content, encode(made, content)


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize(
    ("compression", "subsampling"),
    [("jp2k-rgb", (1, 1)), ("jp2k-ycbcr", (1, 1)), ("jp2k-ycbcr", (2, 1)), ("jp2k-ycbcr", (2, 2))],
)
def test_jpeg_2000_at_a_smaller_size_is_the_average_of_its_pixels_in_their_colours(
    compression, subsampling, scale: int
) -> None:
    content, block = jpeg2000_block(compression, subsampling)
    halvings = jpeg2000.read_header(block).halvings
    assert halvings >= 2
    form = codecs.BlockFormat("JP2K_" + compression.removeprefix("jp2k-").upper(), 256, 256, halvings=halvings)
    got = codecs.decode(block, form, scale).copy()
    if scale > 1:
        resample.centre(got, scale)
    wanted = cv2.resize(content, (256 // scale, 256 // scale), interpolation=cv2.INTER_AREA)
    assert got.shape == wanted.shape
    # Chroma apart: a decoder that converts twice or not at all is off by tens of grey levels in some channel.
    assert np.abs(got.mean(axis=(0, 1)) - wanted.mean(axis=(0, 1))).max() < 1
    off = cv2.cvtColor(got, cv2.COLOR_RGB2GRAY).astype(float) - cv2.cvtColor(wanted, cv2.COLOR_RGB2GRAY)
    assert 10 * np.log10(255**2 / np.mean(off**2)) > {1: 38, 2: 38, 4: 31}[scale]


@lru_cache
def wavelet_block(kind: str, width: int, height: int, code_block: int = 64) -> tuple[bytes, codecs.BlockFormat]:
    """A noisy JPEG 2000: rgb by either wavelet, whole or in tiles, HTJ2K, grey, or YCbCr of a subsampling."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8)
    content = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    if kind in SUBSAMPLINGS:
        block = jpeg2000_ycbcr(content, SUBSAMPLINGS[kind], 44)
    elif kind == "high throughput":
        block = imagecodecs.htj2k_encode(content)
    else:
        file = io.BytesIO()
        options: dict[str, Any] = {"codeblock_size": (code_block,) * 2, "num_resolutions": 4, "no_jp2": True}
        if kind != "reversible":
            options |= {"irreversible": True, "quality_mode": "dB", "quality_layers": (38, 44)}
        if kind == "tiles":
            options["tile_size"] = (128, 128)
        Image.fromarray(content[..., 1] if kind == "grey" else content).save(file, format="JPEG2000", **options)
        block = file.getvalue()
    codec = "JP2K_YCBCR" if kind in SUBSAMPLINGS else "JP2K_RGB"
    halvings = jpeg2000.read_header(block).halvings
    return block, codecs.BlockFormat(codec, width, height, halvings=halvings, samples=1 if kind == "grey" else 3)


SUBSAMPLINGS = {"444": (1, 1), "422": (2, 1), "420": (2, 2)}


@PROPERTY
@given(
    st.sampled_from(["rgb", "reversible", "tiles", "high throughput", "grey", *SUBSAMPLINGS]),
    st.sampled_from([(256, 256), (240, 320), (328, 200), (72, 64)]),
    st.sampled_from([16, 64]),
    st.sampled_from([1, 2, 4, 8]),
    st.data(),
)
def test_an_area_of_a_jpeg_2000_block_is_what_imagecodecs_and_pillow_make_of_the_whole(
    kind: str, size: tuple[int, int], code_block: int, scale: int, data: st.DataObject
) -> None:
    assert openjpeg.library() is not None, "the wheels that are tested with have it"
    block, form = wavelet_block(kind, *size, code_block)
    left, top = (data.draw(st.integers(0, length - 1)) for length in size)
    right, bottom = data.draw(st.integers(left + 1, size[0])), data.draw(st.integers(top + 1, size[1]))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jpeg2000, "decode_planes", lambda *_: None)
        whole = codecs.decode(block, form, scale).copy()
    shown = np.s_[top // scale : -(-bottom // scale), left // scale : -(-right // scale)]
    part = codecs.decode(block, form, scale, (left, top, right, bottom))
    np.testing.assert_array_equal(part[shown], whole[shown])


def test_a_small_area_of_a_jpeg_2000_block_is_decoded_alone() -> None:
    block, form = wavelet_block("rgb", 256, 256)
    for plane in openjpeg.decode_planes(block, 0, (128, 192, 256, 256)):
        assert plane.shape == (64, 128)
    outside = codecs.decode(block, form).copy()
    resample.scratch("block", 256, 256).fill(7)
    part = codecs.decode(block, form, 1, (140, 200, 250, 250))
    assert (part[:190] == 7).all()
    assert (part[192:, 140:250] == outside[192:, 140:250])[8:58].all()


@pytest.mark.parametrize("offsets", ["imagecodecs", "pillow"])
def test_every_pair_of_chroma_has_the_offsets_of_the_library_that_they_are_named_for(offsets: str) -> None:
    red, green, blue = getattr(ycbcr, f"_{offsets}_offsets")()
    chroma = np.arange(256) - 128
    for got, wanted in (
        (red, 1.402 * chroma),
        (green.reshape(256, 256), -0.344136 * chroma[:, None] - 0.714136 * chroma),
        (blue, 1.772 * chroma),
    ):
        assert np.abs(got - wanted).max() <= 1.1


def test_without_openjpeg_itself_blocks_are_decoded_by_imagecodecs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openjpeg, "_INTERFACE", {"opj_of_another_time": (None, ())})
    block, form = wavelet_block("422", 256, 256)
    with_it = codecs.decode(block, form).copy()
    openjpeg.library.cache_clear()
    try:
        assert openjpeg.library() is None
        np.testing.assert_array_equal(codecs.decode(block, form, 1, (0, 0, 9, 9)), with_it)
    finally:
        openjpeg.library.cache_clear()


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (40, 33)])
def test_samples_are_moved_to_the_middle_of_what_they_stand_for(scale: int, size: tuple[int, int]) -> None:
    # On a slope nothing but the place counts, however pixels are interpolated.
    width, height = size
    slope = 4 * np.arange(width)[None, :, None] + 2 * np.arange(height)[:, None, None] + np.zeros(3, int)
    moved = slope.astype(np.uint8)
    resample.centre(moved, scale)
    shift = (scale - 1) / (2 * scale)
    inside = np.s_[1 : max(1, height - 2), 1 : max(1, width - 2)]
    assert np.abs(moved[inside] - (slope + 6 * shift)[inside]).max(initial=0) <= 0.5
    flat = np.full((height, width, 3), 201, np.uint8)
    resample.centre(flat, scale)
    assert (flat == 201).all()


def test_every_ycbcr_becomes_the_rgb_of_pillow_within_one_grey_level() -> None:
    grid = np.arange(0, 256, 3, dtype=np.uint8)
    pixels = np.stack(np.meshgrid(grid, grid, grid), axis=-1).reshape(-1, len(grid), 3)
    wanted = np.asarray(Image.fromarray(pixels, "YCbCr").convert("RGB")).astype(int)
    assert np.abs(ycbcr.rgb_of_ycbcr(pixels) - wanted).max() <= 1


def without_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg2000.imagecodecs, "jpeg2k_decode", None)
    monkeypatch.setattr(jpeg2000, "Jpeg2KImageFile", None)
    monkeypatch.setattr(jpeg2000, "decode_planes", None)


def of_4096_px(block: bytes) -> bytes:
    """A codestream that claims to be of one tile of 4,096 px on a side."""
    sized = bytearray(block)
    for field in (8, 12, 24, 28):
        sized[field : field + 4] = (4096).to_bytes(4)
    return bytes(sized)


def segment(block: bytes, marker: bytes) -> bytes:
    at = block.index(marker)
    return block[at : at + 2 + int.from_bytes(block[at + 2 : at + 4])]


FEW_PARTS = imagecodecs.jpeg2k_encode(np.zeros((64, 64, 3), np.uint8), level=40, codecformat="j2k", resolutions=4)


PLACES = ("header", "tile-part", "second tile-part", "one component")


def with_style(where: str, **claims: int) -> bytes:
    """A block whose coding style claims many parts in one of the places where it may stand (A.6.1 and A.6.2)."""
    restyled_block = restyled(FEW_PARTS, **claims)
    style = segment(restyled_block, b"\xff\x52")
    if where == "header":
        return restyled_block
    if where == "one component":
        content = b"\x02" + style[4:5] + style[9:]
        coc = b"\xff\x53" + (2 + len(content)).to_bytes(2) + content
        return FEW_PARTS.replace(b"\xff\x5c", coc + b"\xff\x5c", 1)
    at, data = FEW_PARTS.index(b"\xff\x90"), FEW_PARTS.index(b"\xff\x93")
    first = b""
    if where == "second tile-part":  # behind one without content, of 14 bytes or the 12 that it may say as well
        first = FEW_PARTS[at : at + 6] + (12).to_bytes(4) + FEW_PARTS[at + 10 : at + 12] + b"\xff\x93"
    last = FEW_PARTS[at : at + 6] + bytes(4) + FEW_PARTS[at + 10 : at + 12]
    return FEW_PARTS[:at] + first + last + style + FEW_PARTS[data:]


@pytest.mark.parametrize("scale", [1, 8])
@pytest.mark.parametrize(
    ("where", "claims", "told"),
    [
        *((where, {"precinct": 2, "code_block": 4}, "it is of 16,7.* precincts") for where in PLACES),
        *((where, {"precinct": 64, "code_block": 4}, "precincts, 3,1.* code-blocks") for where in PLACES),
        # Layers are those of all components.
        *((where, {"precinct": 128, "code_block": 64, "layers": 100}, "and 4.* packets") for where in PLACES[:3]),
    ],
)
def test_a_block_of_more_parts_than_there_is_memory_for_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch, where: str, claims: dict[str, int], told: str, scale: int
) -> None:
    without_decoders(monkeypatch)
    form = codecs.BlockFormat("JP2K_RGB", 4096, 4096, halvings=3)
    with pytest.raises(ValueError, match=told):
        codecs.decode(of_4096_px(with_style(where, **claims)), form, scale)


def test_blocks_of_as_many_parts_as_encoders_write_are_not_refused() -> None:
    for claims in ((128, 64, 10), (256, 16, 20), (2**15, 32, 50)):
        precinct, code_block, layers = claims
        block = restyled(FEW_PARTS, precinct=precinct, code_block=code_block, layers=layers)
        jpeg2000.read_header(of_4096_px(block)).check_parts()


def test_markers_that_openjpeg_would_look_past_and_palettes_are_refused() -> None:
    _, block = jpeg2000_block("jp2k-rgb", (1, 1))
    at = block.index(b"\xff\x5c")
    style = segment(restyled(block, precinct=2, code_block=4), b"\xff\x52")
    unknown = b"\xff\x3f" + (2 + len(style)).to_bytes(2) + style
    form = codecs.BlockFormat("JP2K_RGB", 256, 256, halvings=5)
    with pytest.raises(ValueError, match="marker ff3f"):
        codecs.decode(block[:at] + unknown + block[at:], form)
    boxed = imagecodecs.jpeg2k_encode(np.zeros((256, 256, 3), np.uint8), level=40, codecformat="jp2")
    assert not codecs.decode(boxed, form).any()
    with pytest.raises(ValueError, match="palette"):
        codecs.decode(boxed.replace(b"colr", b"pclr"), form)


def test_a_block_with_fewer_halvings_than_its_level_is_decoded_whole_and_averaged() -> None:
    content, _ = jpeg2000_block("jp2k-rgb", (1, 1))
    block = imagecodecs.jpeg2k_encode(content, level=0, codecformat="j2k", mct=True, resolutions=1)
    assert jpeg2000.read_header(block).halvings == 0
    got = codecs.decode(block, codecs.BlockFormat("JP2K_RGB", 256, 256, halvings=5), 4)
    np.testing.assert_array_equal(got, cv2.resize(content, (64, 64), interpolation=cv2.INTER_AREA))


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize(
    ("at", "lie", "told"),
    [
        (8, (65500).to_bytes(4), "of 65500 × 256 px"),
        (24, (1).to_bytes(4), "65536 tiles"),
        (24, (0).to_bytes(4), "0 tiles"),
        (40, (4).to_bytes(2), "no JPEG 2000 image|components"),
        (42, b"\x0f", "components"),
    ],
    ids=["width", "narrow tiles", "tiles of no pixels", "a fourth component", "16 bits"],
)
def test_a_header_that_lies_is_told_before_anything_is_allocated(
    monkeypatch: pytest.MonkeyPatch, at: int, lie: bytes, told: str, scale: int
) -> None:
    _, block = jpeg2000_block("jp2k-rgb", (1, 1))
    lying = bytearray(block)
    lying[at : at + len(lie)] = lie
    if told == "65536 tiles":
        lying[28:32] = (1).to_bytes(4)
    # No decoder is reached: their memory is not what is to save us.
    without_decoders(monkeypatch)
    with pytest.raises(ValueError, match=told):
        codecs.decode(bytes(lying), codecs.BlockFormat("JP2K_RGB", 256, 256, halvings=5), scale)
