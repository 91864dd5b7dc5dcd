"""Pixels → JPEG 2000 codestreams of the kinds that Aperio's slides hold."""

from typing import Any

import imagecodecs

from streaming.synthetic.layout import Pixels
from streaming.vision import cv2

cv: Any = cv2  # its stubs know no images without colours


def jpeg2000_rgb(block: Pixels, psnr_db: int) -> bytes:
    """RGB as a codestream of its own decorrelated colours, by the lossy wavelet (TIFF's compression 33005)."""
    return bytes(imagecodecs.jpeg2k_encode(block, level=psnr_db, codecformat="j2k", mct=True, reversible=False))


def jpeg2000_ycbcr(block: Pixels, subsampling: tuple[int, int], psnr_db: int) -> bytes:
    """RGB as a codestream of Y, Cb and Cr, the latter two subsampled (horizontal, vertical): compression 33003.

    No encoder at hand subsamples: each component is compressed for itself, and their packets are put one after the
    other, which is what the progression component-position-resolution-layer wants (ISO/IEC 15444-1, B.12.1.5).
    """
    y, cr, cb = cv.split(cv.cvtColor(block, cv.COLOR_RGB2YCrCb))
    height, width = block.shape[:2]
    small = (-(-width // subsampling[0]), -(-height // subsampling[1]))
    planes = [y, *(cv.resize(plane, small, interpolation=cv.INTER_AREA) for plane in (cb, cr))]
    heads: list[dict[int, bytes]] = []
    packets = b""
    for plane in planes:
        stream: Any = imagecodecs.jpeg2k_encode(
            plane, level=psnr_db, codecformat="j2k", mct=False, resolutions=4 if min(small) >= 64 else 1
        )
        at, head = 2, dict[int, bytes]()
        while stream[at + 1] != 0x90:  # SOT, the only tile's only part
            end = at + 2 + int.from_bytes(stream[at + 2 : at + 4])
            head[stream[at + 1]] = stream[at:end]
            at = end
        heads.append(head)
        packets += stream[stream.index(b"\xff\x93", at) + 2 : -2]  # from SOD to EOC
    size, style = bytearray(heads[0][0x51][:40]), bytearray(heads[0][0x52])
    size[2:4], size[38:40] = (38 + 3 * 3).to_bytes(2), (3).to_bytes(2)
    assert all(head[kind] == heads[0][kind] for head in heads for kind in (0x52, 0x5C)), "one coding style for all"
    size += bytes([7, 1, 1]) + bytes([7, *subsampling]) * 2
    style[5] = 4  # the progression
    start_of_tile = b"\xff\x90\x00\x0a\x00\x00" + (12 + 2 + len(packets)).to_bytes(4) + b"\x00\x01"
    return b"\xff\x4f" + bytes(size + style) + heads[0][0x5C] + start_of_tile + b"\xff\x93" + packets + b"\xff\xd9"
