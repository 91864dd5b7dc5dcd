"""Small whole-slide images in DICOM, for tests."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage, generate_uid


def write_level(
    path: Path, pixels: NDArray[np.uint8], mpp: float, series: str, *, original: bool, tile: int = 256
) -> None:
    """Writes a level of a slide, uint8 (h, w, 3), as one instance of a series; h and w are multiples of the tile."""
    height, width, _ = pixels.shape
    corners = [(y, x) for y in range(0, height, tile) for x in range(0, width, tile)]
    frames = [_jpeg(pixels[y : y + tile, x : x + tile]) for y, x in corners]
    spacing, groups, optical, instance = Dataset(), Dataset(), Dataset(), Dataset()
    spacing.PixelSpacing = [mpp / 1000, mpp / 1000]
    groups.PixelMeasuresSequence = [spacing]
    optical.OpticalPathIdentifier = "1"
    instance.file_meta = meta = FileMetaDataset()
    meta.TransferSyntaxUID = JPEGBaseline8Bit
    meta.MediaStorageSOPClassUID = instance.SOPClassUID = VLWholeSlideMicroscopyImageStorage
    meta.MediaStorageSOPInstanceUID = instance.SOPInstanceUID = generate_uid()
    values = {
        "StudyInstanceUID": series,
        "SeriesInstanceUID": series,
        "Modality": "SM",
        "ImageType": ["ORIGINAL" if original else "DERIVED", "PRIMARY", "VOLUME", "NONE" if original else "RESAMPLED"],
        "Rows": tile,
        "Columns": tile,
        "TotalPixelMatrixRows": height,
        "TotalPixelMatrixColumns": width,
        "TotalPixelMatrixFocalPlanes": 1,
        "NumberOfFrames": len(frames),
        "NumberOfOpticalPaths": 1,
        "DimensionOrganizationType": "TILED_FULL",
        "SamplesPerPixel": 3,
        "PhotometricInterpretation": "YBR_FULL_422",
        "PlanarConfiguration": 0,
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelRepresentation": 0,
        "SharedFunctionalGroupsSequence": [groups],
        "OpticalPathSequence": [optical],
        "PixelData": encapsulate(frames),
    }
    for name, value in values.items():
        setattr(instance, name, value)
    instance["PixelData"].is_undefined_length = True
    dcmwrite(path, instance, enforce_file_format=True)


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90, subsampling=0)
    return out.getvalue()
