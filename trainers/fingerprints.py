"""Hashes of weights and of data, by which results that are out of date are recognised."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import torch
from torch import nn

from trainers.rows import column_names, sample_id


def weights_hash(module: nn.Module) -> str:
    """A hash of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def rows_hash(rows) -> str:
    """
    A hash of a data set: the ids in their order, its content, and size and time of files that it only names.

    Args:
        rows: A `datasets` data set, a sequence of rows, or a stream, of which only the column names are hashed.
    """
    digest = hashlib.sha256()
    if not hasattr(rows, "__len__"):
        digest.update(repr(column_names(rows)).encode())
        return digest.hexdigest()
    if hasattr(rows, "select_columns"):
        digest.update(rows._fingerprint.encode())  # of the content, whatever transforms it went through
        ids = rows["id"] if "id" in rows.column_names else range(len(rows))
    else:
        ids = [sample_id(rows[index] | {"index": index}) for index in range(len(rows))]
    digest.update("\n".join(map(str, ids)).encode())
    for path in sorted(set(_media_files(rows))):
        if Path(path).is_file():
            state = Path(path).stat()
            digest.update(f"{path} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()


def _media_files(rows) -> Iterator[str]:
    """Paths of the files that a data set refers to but does not contain."""
    table = getattr(rows, "data", None)
    for name in ("audio", "image", "frames"):
        if table is None or name not in table.column_names:
            continue
        for cells in table.column(name).chunks:
            while pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type):
                cells = cells.flatten()
            if pa.types.is_struct(cells.type) and "path" in [field.name for field in cells.type]:
                inside = [field.name for field in cells.type if field.name in ("bytes", "array")]
                paths = cells.field("path")
                cells = paths.filter(cells.field(inside[0]).is_null()) if inside else paths
            if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
                yield from (path for path in cells.to_pylist() if path)
