"""TensorBoard and Weights & Biases: the numbers of a run's rows, under names.

Both are extras: one that is asked for and not installed is an error before anything else is done.
"""

import uuid
from importlib import import_module
from pathlib import Path
from typing import Any

from multifid.training.record import Recorder, Row, scalars


class TensorBoard:
    """RUN/tensorboard; what an earlier start wrote after `step` is marked as void."""

    def __init__(self, run: Path, step: int) -> None:
        writer = _library("torch.utils.tensorboard", "train.tensorboard", "tensorboard").SummaryWriter
        self._writer = writer(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, rows: list[Row]) -> None:
        for name, value in scalars(rows).items():
            self._writer.add_scalar(name, value, rows[0]["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, which goes on where this run goes on: its id is in RUN/wandb-id.

    Steps that an earlier start has sent are dropped by the service; they are the same numbers. ValueError where the
    service does not begin (nobody is logged in, for example).
    """

    def __init__(self, run: Path, project: str, config: dict[str, Any]) -> None:
        library = _library("wandb", "train.wandb", "wandb")
        path = run / "wandb-id"
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        identity = path.read_text(encoding="utf-8").strip()
        try:
            self._run = library.init(
                project=project, name=run.name, id=identity, resume="allow", dir=str(run), config=config
            )
        except library.Error as error:
            raise ValueError(f"train.wandb: {error}") from error

    def write(self, rows: list[Row]) -> None:
        self._run.log(scalars(rows) | {"epoch": rows[0]["epoch"]}, step=rows[0]["step"])

    def close(self) -> None:
        self._run.finish()


def find_boards(tensorboard: bool, wandb: str | None) -> None:
    """ValueError where a board is asked for and not installed; it names what to install."""
    if tensorboard:
        _library("torch.utils.tensorboard", "train.tensorboard", "tensorboard")
    if wandb is not None:
        _library("wandb", "train.wandb", "wandb")


def open_boards(run: Path, step: int, tensorboard: bool, wandb: str | None, config: dict[str, Any]) -> list[Recorder]:
    """The boards that are asked for, where a run goes on at `step`. `config` is shown beside the curves."""
    boards: list[Recorder] = []
    if tensorboard:
        boards.append(TensorBoard(run, step))
    if wandb is not None:
        boards.append(WandB(run, wandb, config))
    return boards


def _library(name: str, key: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f"{key}: install it with pip install 'multifid[{extra}]' ({error})") from error
