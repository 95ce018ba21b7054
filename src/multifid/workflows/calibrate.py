"""`multifid calibrate RUN`: uncertainties of a trained run's energies, forces and stresses, from its own data.

On all ranks of a launch. The result, RUN/uncertainty.safetensors, is found by all that use the run, and is part of the
model files that are exported from it afterwards.
"""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from multifid.config import load_config
from multifid.evaluation.calibrate import Calibrated, Points, calibrate, quality
from multifid.evaluation.calibration import reliability
from multifid.evaluation.data import Data, Share
from multifid.evaluation.figures import save
from multifid.evaluation.fitted import FittedTable
from multifid.feed.loader import open_sources
from multifid.model.model_file import load_model
from multifid.model.predictor import Predictor
from multifid.model.rigidity import SAMPLES
from multifid.model.rigidity_file import NAME, save_rigidity
from multifid.parallel import groups
from multifid.workflows.evaluate import progress


def calibrate_run(
    run: Path,
    *,
    samples: int = SAMPLES,
    figure: Path | None = None,
    device: str | None = None,
    max_edges: int | None = None,
    workers: int = 1,
    console: Console | None = None,
) -> Calibrated:
    """Write RUN/uncertainty.safetensors; returns what is in it, and how it does on the test splits, on every rank.

    samples: last layers that are drawn for forces; figure: an image of deviations beside errors on the test splits.
    ValueError where `run` is no trained run, or its data have changed or are gone.
    """
    if samples < 1:
        raise ValueError(f"--samples {samples}: at least one last layer must be drawn")
    if not run.is_dir():
        raise ValueError(f"{run}: uncertainties are calibrated for the directory of a run; export it again afterwards")
    console = console or Console()
    with groups.world(device) as world:
        with world.together():
            model = Predictor(*load_model(run), world.device)  # whatever was calibrated before
            config = load_config(run / "config.yaml")
            there = [t for t in config.tasks if t in model.description["tasks"]]
            tasks = {t: config.tasks[t] for t in there if model.property_of(t) is None}
            if not tasks:
                raise ValueError(f"{run} has properties only ({', '.join(there)}): uncertainties are of energies")
            data = [Data(t, s.store, name) for s in open_sources(tasks) for t, name in s.tasks.items()]
        structures = sum(d.store.size("train") + d.store.size("validation") + d.store.size("test") for d in data)
        with progress(world, "calibrate", structures, Console(stderr=True)) as advance:
            share = Share(world.rank, world.size, world.group.sum_, workers, max_edges, advance)
            found = calibrate(model, data, samples, share)
        with world.together():
            if world.first:
                save_rigidity(run, found.rigidity)
                if figure is not None and found.test:
                    save(reliability(found.test), figure, dpi=150)
        if world.first:
            console.print(table(found.test))
            console.print(f"{run / NAME}", soft_wrap=True, highlight=False, markup=False)
    return found


def table(test: Mapping[str, Points]) -> FittedTable:
    """How uncertainties do on the test splits."""
    rows = []
    for task, found in test.items():
        for label, pairs in (("energy", found.energy), ("forces", found.forces), ("stress", found.stress)):
            if len(pairs):
                q = quality(pairs)
                error, within = f"{1000 * pairs[:, 1].mean():.3g}", (f"{100 * q[f'within_{k}']:.0f}" for k in (1, 2))
                rows.append(
                    [escape(task), label, f"{len(pairs):,}", error, f"{q['z']:.2f}", *within, f"{q['rank']:.2f}"]
                )
    return FittedTable(
        title="Uncertainties on the test splits",
        names=["task", "label"],
        numbers=["number", "MAE", "z", "≤1σ", "≤2σ", "rank"],
        rows=rows,
        notes=[
            "number: of structures for energies and stresses, of atoms for forces. MAE: meV/atom, meV/Å of an atom, "
            "meV/Å³. z: root mean square of error / deviation σ. ≤1σ, ≤2σ: per cent of the errors (68 and 95 if they "
            "were normal). rank: correlation of deviations and errors."
        ],
    )
