"""`multifid finetune ... --folds N`: cross-validation, one run for each of N parts that is the test split.

    OUT/fold-0 ... OUT/fold-(N-1)     runs, as `multifid finetune` makes them
    OUT/folds.json                    errors of all that are complete, on their own test splits

Parts are cut by relatives. The same command goes on where it was stopped, run by run.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.markup import escape

from multifid.config import load_config
from multifid.evaluation.fitted import FittedTable
from multifid.evaluation.matrix import Row
from multifid.evaluation.rows import write_rows
from multifid.parallel.launch import launch
from multifid.workflows.evaluate import evaluate
from multifid.workflows.finetune import finetune

ROWS = "folds.json"
SHOWN = {
    "energy_mae": ("energy MAE (meV/atom)", 1000.0),
    "forces_mae": ("forces MAE (meV/Å)", 1000.0),
    "property_mae": ("MAE", 1.0),
    "property_rmse": ("RMSE", 1.0),
    "r2": ("R2", 1.0),
    "accuracy": ("accuracy", 1.0),
    "roc_auc": ("ROC-AUC", 1.0),
}


def cross_validate(
    model: Path | str,
    data: Path | str | Sequence[Path | str],
    out: Path | str,
    overrides: Sequence[str] = (),
    *,
    folds: int = 5,
    quiet: bool = False,
    **how: Any,
) -> list[Row] | None:
    """Fine-tune a model `folds` times, each part of the data being the test split once; or go on with that.

    The same on every rank of a launch by torchrun or srun.

    Args:
        model, data, out, overrides: as `finetune`.
        folds: number of parts, at least 2.
        quiet: print nothing.
        how: further arguments of `finetune`; of `fractions` the first two say how the rest of each fold is divided.

    Returns:
        A row, as of `evaluate`, for each fold and new task, with `fold`; None where a run was stopped by a signal.

    Raises:
        ValueError: for what a user can mend.
    """
    if folds < 2:
        raise ValueError(f"--folds {folds}: there are at least 2 parts")
    rows: list[Row] = []
    for k in range(folds):
        place = Path(out) / f"fold-{k}"
        if not finetune(model, data, place, overrides, fold=(k, folds), quiet=quiet, **how).complete:
            return None
        config = load_config(place)
        assert config.finetune is not None
        asked = {task: config.tasks[task].store for task in config.finetune.branches}
        device = config.train.device
        rows += [{**row, "fold": k} for row in evaluate(place, asked, device=device, quiet=True)]
        if launch().rank == 0:
            write_rows(Path(out) / ROWS, rows)
    if launch().rank == 0 and not quiet:
        Console().print(table(rows))
    return rows


def table(rows: Sequence[Row]) -> FittedTable:
    """Mean and sample standard deviation over the folds, of each task."""
    shown = [key for key in SHOWN if any(row.get(key) is not None for row in rows)]
    lines = []
    for task in dict.fromkeys(row["data"] for row in rows):
        own = [row for row in rows if row["data"] == task]
        tested = sum(row["counted_structures"] for row in own)
        lines.append([escape(task), str(tested), *(_spread(own, key) for key in shown)])
    folds = len({row["fold"] for row in rows})
    return FittedTable(
        title=f"Test errors over {folds} folds",
        names=["task"],
        numbers=["structures", *(SHOWN[key][0] for key in shown)],
        rows=lines,
        notes=["Mean ± sample standard deviation; each structure is tested once."],
    )


def _spread(rows: Sequence[Row], key: str) -> str:
    values = [SHOWN[key][1] * row[key] for row in rows if row.get(key) is not None]
    if not values:
        return "–"
    return f"{fmean(values):.4g} ± {stdev(values):.2g}" if len(values) > 1 else f"{values[0]:.4g}"
