"""An index of the Imaging Data Commons as its package brings one, of made series, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

BUCKET = "s3://idc-open-data"
# All columns of idc_index.parquet 25.
_COLUMNS = (
    *("collection_id", "analysis_result_id", "PatientID", "SeriesInstanceUID", "StudyInstanceUID", "source_DOI"),
    *("PatientAge", "PatientSex", "StudyDate", "StudyDescription", "BodyPartExamined", "Modality", "SOPClassUID"),
    *("sop_class_name", "TransferSyntaxUID", "transfer_syntax_name", "PhotometricInterpretation"),
    *("PixelRepresentation", "Manufacturer", "ManufacturerModelName", "SeriesDate", "SeriesDescription"),
    *("SeriesNumber", "instanceCount", "license_short_name", "series_init_idc_version"),
    *("series_revised_idc_version", "aws_bucket", "crdc_series_uuid", "series_aws_url", "series_size_MB"),
)
_NUMBERS = {
    **{"instanceCount": pa.int64(), "series_init_idc_version": pa.int64(), "series_revised_idc_version": pa.int64()},
    "series_size_MB": pa.float64(),
}
_SCHEMA = pa.schema([(name, _NUMBERS.get(name, pa.large_string())) for name in _COLUMNS])


def series(collection: str | None, patient: str, uuid: str, **others: Any) -> dict[str, Any]:
    """A row of the index: a series of slides, unless told otherwise."""
    return {
        "collection_id": collection,
        "PatientID": patient,
        "SeriesInstanceUID": f"1.2.826.{uuid}",
        "Modality": "SM",
        "SeriesDescription": "FFPE HE TP DX1",
        "license_short_name": "CC BY 3.0",
        "source_DOI": "10.5281/zenodo.12689962",
        "instanceCount": 5,
        "series_size_MB": 500.25,
        "crdc_series_uuid": uuid,
        "series_aws_url": f"{BUCKET}/{uuid}/*",
        **others,
    }


def write_index(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Writes idc_index.parquet; gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=_SCHEMA), folder / "idc_index.parquet")
    return str(folder)


def write_slide_table(folder: Path, organs: dict[str, str]) -> None:
    """Writes sm_index.parquet beside it: the organ of series by their uuid."""
    rows = [
        {
            "SeriesInstanceUID": f"1.2.826.{uuid}",
            "primaryAnatomicStructure_CodeMeaning": organ,
            "ObjectiveLensPower": 40,
            "staining_usingSubstance_CodeMeaning": ["hematoxylin stain", "water soluble eosin stain"],
        }
        for uuid, organ in organs.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "sm_index.parquet")


def write_file_table(folder: Path, files: dict[str, Sequence[tuple[str, int, str]]]) -> None:
    """Writes sm_instance_index.parquet beside it: of series by their uuid, each file's uuid, size and kind."""
    rows = [
        {
            "SeriesInstanceUID": f"1.2.826.{series_uuid}",
            "ImageType": ["ORIGINAL", "PRIMARY", kind, "NONE"],
            "instance_size": size,
            "crdc_instance_uuid": uuid,
        }
        for series_uuid, of_series in files.items()
        for uuid, size, kind in of_series
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "sm_instance_index.parquet")
