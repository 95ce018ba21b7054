"""metrics.jsonl: one object per task and log step or epoch; diagnosis.jsonl: one per task and measured step."""

import json
import math
import os
from pathlib import Path

from multifid.training.record import Row, finite

METRICS = "metrics.jsonl"


class Journal:
    """Appends rows; opening at a step cuts off what was written after it, so that resuming repeats nothing."""

    def __init__(self, run: Path, step: int, name: str = METRICS) -> None:
        self.path = run / name
        self._cut(step)
        self._file = self.path.open("a", encoding="utf-8")

    def _cut(self, step: int) -> None:
        """Keep whole rows up to `step`; a line torn by a kill is dropped."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_bytes().splitlines(keepends=True) if _step_of(line) <= step]
        part = self.path.with_suffix(".part")
        part.write_bytes(b"".join(kept))
        os.replace(part, self.path)

    def write(self, rows: list[Row]) -> None:
        for row in rows:
            plain = {key: finite(value) if isinstance(value, float) else value for key, value in row.items()}
            self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line: bytes) -> float:
    if not line.endswith(b"\n"):
        return math.inf
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def read_journal(run: Path, name: str = METRICS) -> list[Row]:
    """All rows of a run's metrics.jsonl, or of another journal of it."""
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]
