"""`evaluation.json`: the rows of a run or a study on disk. Rows of other data and splits stay when more are added."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from multifid.evaluation.matrix import Row

NAME = "evaluation.json"
OLD_TASKS = "old_tasks.json"  # of a fine-tuned run: errors on data of the start model's tasks, before and after
ROBUSTNESS = "robustness.json"  # of a fine-tuned run: scans of dimers, and errors on other files, before and after
IDENTITY = ("model", "data", "split", "branch", "seed")  # rows that agree in these say the same: the newer one stays


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """A file with exactly these rows, by rename. JSON has no NaN and no infinity: null."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    valid = [{key: None if _not_finite(value) else value for key, value in row.items()} for row in rows]
    part.write_text(json.dumps({"rows": valid}, indent=1, allow_nan=False), encoding="utf-8")
    os.replace(part, path)


def add_rows(directory: Path, rows: Sequence[Row]) -> None:
    """DIRECTORY/evaluation.json with these rows; those of other models, data, splits and branches stay.

    ValueError, and the file as it was, where it is damaged.
    """
    earlier = [row for row in read_rows(directory) if not any(_same(row, new) for new in rows)]
    write_rows(directory / NAME, [*earlier, *rows])


def read_rows(directory: Path, name: str = NAME) -> list[Row]:
    """The rows of DIRECTORY/evaluation.json (or `name` there), none without such a file. ValueError if damaged."""
    path = directory / name
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): move it away, and evaluate again") from None
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"model", "data", "split"} <= set(row) for row in rows
    ):
        raise ValueError(
            f'{path} is damaged (it must be {{"rows": [{{"model", "data", "split", ...}}]}}): move it away'
        )
    return rows


def _not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _same(earlier: Row, new: Row) -> bool:
    """Whether a row is about what another one is about. Rows of versions that named no branch agree with any."""
    return all(key not in earlier or earlier[key] == new.get(key) for key in IDENTITY)
