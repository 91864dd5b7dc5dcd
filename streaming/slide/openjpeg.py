"""OpenJPEG asked directly, for no more of a JPEG 2000 codestream than a tile shows, and without a change of colours.

imagecodecs and Pillow decode whole blocks, and convert subsampled colours pixel by pixel. Of the four blocks that a
tile touches it shows a quarter each; of the code-blocks that they are made of (64 px of a wavelet's band) half are
enough. It is the library that imagecodecs is linked with, so the samples are the same to the bit. What is called here
is OpenJPEG's documented interface (openjpeg.h), whose functions and structures are those of libopenjp2.so.7 since 2014.
"""

from __future__ import annotations

import ctypes
import importlib
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.uint8]

_J2K = 0  # OPJ_CODEC_J2K: a codestream without the boxes of a JP2 file
# More than opj_dparameters_t has. It begins with how often the size is to be halved (cp_reduce, 32 bits).
_PARAMETERS_NBYTES = 2**14
_NO_MORE = ctypes.c_size_t(-1).value


class _Component(ctypes.Structure):
    """opj_image_comp_t."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("dx", "dy", "w", "h", "x0", "y0", "prec", "bpp", "sgnd")),
        *((name, ctypes.c_uint32) for name in ("resno_decoded", "factor")),
        ("data", ctypes.c_void_p),  # int32, row after row
        ("alpha", ctypes.c_uint16),
    )


class _Image(ctypes.Structure):
    """opj_image_t, as far as it is looked at."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("x0", "y0", "x1", "y1", "numcomps")),
        ("color_space", ctypes.c_int),
        ("comps", ctypes.POINTER(_Component)),
    )


_Read = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_Skip = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
_Seek = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.c_void_p)
_Pointer, _ImagePointer = ctypes.c_void_p, ctypes.POINTER(_Image)
# By function: what it gives, and what it takes.
_INTERFACE: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "opj_version": (ctypes.c_char_p, ()),
    "opj_stream_create": (_Pointer, (ctypes.c_size_t, ctypes.c_int)),
    "opj_stream_set_read_function": (None, (_Pointer, _Read)),
    "opj_stream_set_skip_function": (None, (_Pointer, _Skip)),
    "opj_stream_set_seek_function": (None, (_Pointer, _Seek)),
    "opj_stream_set_user_data_length": (None, (_Pointer, ctypes.c_uint64)),
    "opj_stream_destroy": (None, (_Pointer,)),
    "opj_create_decompress": (_Pointer, (ctypes.c_int,)),
    "opj_set_default_decoder_parameters": (None, (_Pointer,)),
    "opj_setup_decoder": (ctypes.c_int, (_Pointer, _Pointer)),
    "opj_read_header": (ctypes.c_int, (_Pointer, _Pointer, ctypes.POINTER(_ImagePointer))),
    "opj_set_decode_area": (ctypes.c_int, (_Pointer, _ImagePointer, *(ctypes.c_int32,) * 4)),
    "opj_decode": (ctypes.c_int, (_Pointer, _Pointer, _ImagePointer)),
    "opj_destroy_codec": (None, (_Pointer,)),
    "opj_image_destroy": (None, (_ImagePointer,)),
}


@lru_cache(maxsize=1)
def library() -> Any:
    """The OpenJPEG that imagecodecs is linked with; None where it can't be reached or is no version 2."""
    try:
        # The wheel's own copy has a name of its own. A library is asked for what those that it needs have, too.
        found = ctypes.CDLL(cast(str, importlib.import_module("imagecodecs._jpeg2k").__file__))
        for name, (gives, takes) in _INTERFACE.items():
            function = getattr(found, name)
            function.restype, function.argtypes = gives, takes
    except (ImportError, OSError, AttributeError):
        return None
    return found if found.opj_version().startswith(b"2.") else None


def decode_planes(data: bytes, halvings: int, area: tuple[int, int, int, int] | None) -> list[Plane] | None:
    """The samples of each component of a codestream, uint8 (height, width), halved so often; subsampled ones are fewer.

    area is left, top, right and bottom in the image's pixels, which must be counted from 0; None: all of it. Outside of
    it nothing is decoded, so damage there may go unseen. None where OpenJPEG can't be reached or refuses it, or a
    component is not of 8 bits.
    """
    openjpeg = library()
    if openjpeg is None:
        return None
    start, at = cast(int, ctypes.cast(ctypes.c_char_p(data), _Pointer).value), 0

    def read(buffer: int, wanted: int, _: object) -> int:
        nonlocal at
        nbytes = min(wanted, len(data) - at)
        if nbytes <= 0:
            return _NO_MORE
        ctypes.memmove(buffer, start + at, nbytes)
        at += nbytes
        return nbytes

    def skip(nbytes: int, _: object) -> int:
        nonlocal at
        at = max(0, at + nbytes)
        return nbytes

    def seek(to: int, _: object) -> int:
        nonlocal at
        at = max(0, to)
        return 1

    calls = _Read(read), _Skip(skip), _Seek(seek)  # they must live as long as the stream
    parameters = ctypes.create_string_buffer(_PARAMETERS_NBYTES)
    image = _ImagePointer()
    stream, codec = openjpeg.opj_stream_create(len(data), 1), openjpeg.opj_create_decompress(_J2K)
    try:
        openjpeg.opj_stream_set_read_function(stream, calls[0])
        openjpeg.opj_stream_set_skip_function(stream, calls[1])
        openjpeg.opj_stream_set_seek_function(stream, calls[2])
        openjpeg.opj_stream_set_user_data_length(stream, len(data))
        openjpeg.opj_set_default_decoder_parameters(parameters)
        ctypes.c_uint32.from_buffer(parameters).value = halvings
        decoded = (
            openjpeg.opj_setup_decoder(codec, parameters)
            and openjpeg.opj_read_header(stream, codec, ctypes.byref(image))
            and (area is None or openjpeg.opj_set_decode_area(codec, image, *area))
            and openjpeg.opj_decode(codec, stream, image)
        )
        if not decoded:
            return None
        components = [image.contents.comps[i] for i in range(image.contents.numcomps)]
        if not all(each.data and each.prec == 8 and not each.sgnd and each.w and each.h for each in components):
            return None
        return [_samples(each) for each in components]
    finally:
        openjpeg.opj_destroy_codec(codec)
        openjpeg.opj_stream_destroy(stream)
        openjpeg.opj_image_destroy(image)


def _samples(component: _Component) -> Plane:
    """A copy of a component's samples; OpenJPEG has cut them to what 8 bits hold."""
    # Of a pointer numpy would make a type a shape, and keep it for good.
    place = {"data": (component.data, True), "shape": (component.h, component.w), "typestr": "=i4", "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__=place)).astype(np.uint8)
