"""From a URI and its options to bytes: the one seam between object stores and the rest."""

from streaming.storage.addresses import (
    beside,
    canonical,
    folder_of,
    is_local,
    join,
    local_path,
    name_of,
    shortened,
    shown,
)
from streaming.storage.clients import StorageOptions
from streaming.storage.files import Current
from streaming.storage.local_files import whole_file
from streaming.storage.object_info import ObjectInfo, relative_name
from streaming.storage.objects import (
    exists,
    expand,
    list_beside,
    list_files,
    list_names,
    read_bytes,
    read_current,
    reading,
    remove,
    replace,
    stat,
    write_bytes,
    write_stream,
    written_file,
)
from streaming.storage.patience import answer_soon
from streaming.storage.places import BY_SIZE, Place, identified, place_of
from streaming.storage.tables import (
    TableFile,
    open_table,
    parquet_of,
    read_table,
    reading_table,
    table_of,
    update_rows,
    write_table,
)
from streaming.storage.trouble import storage_errors

__all__ = [
    "BY_SIZE",
    "Current",
    "ObjectInfo",
    "Place",
    "StorageOptions",
    "TableFile",
    "answer_soon",
    "beside",
    "canonical",
    "exists",
    "expand",
    "folder_of",
    "identified",
    "is_local",
    "join",
    "list_beside",
    "list_files",
    "list_names",
    "local_path",
    "name_of",
    "open_table",
    "parquet_of",
    "place_of",
    "read_bytes",
    "read_current",
    "read_table",
    "reading",
    "reading_table",
    "relative_name",
    "remove",
    "replace",
    "shortened",
    "shown",
    "stat",
    "storage_errors",
    "table_of",
    "update_rows",
    "whole_file",
    "write_bytes",
    "write_stream",
    "write_table",
    "written_file",
]
