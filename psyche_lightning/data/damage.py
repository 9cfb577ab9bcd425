"""Tells damage, which stays, from what may pass; reads parquet files without their damaged row groups."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from psyche_lightning.errors import ConfigError

logger = logging.getLogger(__name__)


def is_damage(error: Exception) -> bool:
    """Whether bytes were read but could not be decoded: no attempt will ever succeed.

    The system's errors have a number; those about the content of a file do not.
    """
    return not isinstance(error, (MemoryError, NotImplementedError)) and getattr(error, "errno", None) is None


def sound_rows(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields the rows of parquet files; a warning names each row group that is damaged and left out.

    Raises:
        ConfigError: a file is no parquet file.
        OSError: a file cannot be read.
    """
    from pyarrow import parquet

    for file in files:
        try:
            opened = parquet.ParquetFile(file, page_checksum_verification=True)
        except Exception as error:  # pyarrow raises errors of its own and of the system
            if is_damage(error):
                raise ConfigError(f"{file} is not a readable parquet file: {error}.") from error
            raise
        for group in range(opened.metadata.num_row_groups):
            try:
                table = opened.read_row_group(group)
            except Exception as error:  # as above
                if not is_damage(error):
                    raise
                logger.warning(
                    "row group %d of %s is damaged (%s) and left out for good: %d rows", group, file, error,
                    opened.metadata.row_group(group).num_rows,
                )  # fmt: skip
                continue
            for batch in table.to_batches(max_chunksize=1000):
                yield from batch.to_pylist()
