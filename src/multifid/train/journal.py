"""metrics.jsonl: one object per task and log step or epoch, and the same to TensorBoard where asked for."""

import json
import math
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity: None (null) in their place."""
    return value if math.isfinite(value) else None


class Journal:
    """Appends rows; opening at a step cuts off what was written after it, so that resuming repeats nothing."""

    def __init__(self, run: Path, step: int, tensorboard: bool = False) -> None:
        self.path = run / "metrics.jsonl"
        self._cut(step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError("train.tensorboard: install it with pip install 'multifid[tensorboard]'") from error
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

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
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            if self._board is not None:
                for key in ("loss", "energy_mae", "forces_mae"):
                    if row[key] is not None:
                        self._board.add_scalar(f"{key}/{row['split']}/{row['task']}", row[key], row["step"])
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _step_of(line: bytes) -> float:
    if not line.endswith(b"\n"):
        return math.inf
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def read_journal(run: Path) -> list[Row]:
    """All rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
