"""Opening a run: the config is resolved once, at the first start, and later starts must say the same."""

import os
from fractions import Fraction
from pathlib import Path

from multifid.config import Config, differences, dump_config, load_config
from multifid.parallel.layout import place
from multifid.train.settings import NEUTRAL

DEFAULT_BATCH = 32


def resolve(config: Config, ranks: int) -> Config:
    """The config with what depends on the first start written out: `train.batch` and the placement."""
    train = config.train
    batch = train.batch or DEFAULT_BATCH
    if train.local_batch is not None:
        batch = float(Fraction(train.local_batch * ranks, len(config.tasks)))
    placement = place(list(config.tasks), config.parallel.placement, ranks)
    return config.model_copy(
        update={
            "train": train.model_copy(update={"batch": batch, "local_batch": None}),
            "parallel": config.parallel.model_copy(update={"placement": placement}),
        }
    )


def open_run(config: Config, ranks: int) -> tuple[Config, Path]:
    """The resolved config and the directory of a run, new or gone on with.

    ValueError with the differences where the directory holds a run of another config. Keys that change neither the
    mathematics nor the order of data (`NEUTRAL`) may differ, and the new ones count.
    """
    run = Path(config.run)
    config = resolve(config, ranks)
    path = run / "config.yaml"
    if path.exists():
        held = load_config(path)
        changed = [d for d in _compare(config, held) if d.split(":")[0] not in {f"train.{k}" for k in NEUTRAL}]
        if changed:
            raise ValueError(
                f"{run} holds a run of another config:\n  " + "\n  ".join(changed) + "\n"
                "Give the run another directory (run=...), or go on with the run's own config: multifid train "
                + str(run)
            )
    elif run.exists() and any(run.iterdir()):
        raise ValueError(f"{run} exists, is not empty and holds no config.yaml: choose another directory for the run")
    run.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(dump_config(config), encoding="utf-8")
    os.replace(part, path)
    return config, run


def _compare(config: Config, held: Config) -> list[str]:
    return differences(config.model_dump(mode="json"), held.model_dump(mode="json"))
