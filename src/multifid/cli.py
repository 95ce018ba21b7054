"""The commands. Each imports what it needs when it is called, so that help and prepare start without torch."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from multifid.readers.formats import FORMATS

app = typer.Typer(
    help="Pre-train graph foundation models for atoms on many inconsistent sources of quantum-mechanical data at once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from multifid import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print it and stop")
    ] = False,
) -> None:
    """Options of the program itself."""


Stores = Annotated[list[Path], typer.Argument(metavar="STORE...", help="prepared stores")]
ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="a trained run, or a model file")]
StructureFiles = Annotated[
    list[Path], typer.Argument(metavar="FILE...", help="files that ASE reads, .aselmdb, or prepared stores")
]
Task = Annotated[str | None, typer.Option(help="whose branch answers; needed where there are several")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: an accelerator if there is one")]
SkipRefused = Annotated[
    bool, typer.Option("--skip-refused", help="leave out what has no prediction, as elements never seen, and count it")
]


@app.command()
def prepare(
    format: Annotated[str, typer.Argument(help=f"{' '.join(FORMATS)} (multifid formats FORMAT: its options)")],
    out: Annotated[Path, typer.Option("--out", help="directory of the new store")],
    inputs: Annotated[
        list[Path] | None, typer.Argument(metavar="[INPUT...]", help="published files, directories or 'patterns'")
    ] = None,
    task: Annotated[str | None, typer.Option(help="name of the task; default: the format's")] = None,
    limit: Annotated[int | None, typer.Option(help="at most so many structures of each file")] = None,
    train: Annotated[list[Path] | None, typer.Option(help="an input that is all training split")] = None,
    validation: Annotated[list[Path] | None, typer.Option(help="an input that is all validation split")] = None,
    test: Annotated[list[Path] | None, typer.Option(help="an input that is all test split")] = None,
    fractions: Annotated[str, typer.Option(help="train,validation,test; 0,0,1 makes only a test set")] = "0.8,0.1,0.1",
    seed: Annotated[int, typer.Option(help="of the split")] = 0,
    level_of_theory: Annotated[str | None, typer.Option(help="for the manifest, where it is not the format's")] = None,
    option: Annotated[list[str] | None, typer.Option(help="key=value of the format, as energy=corrected")] = None,
    workers: Annotated[int, typer.Option(help="processes that read, on each rank; the store is the same for all")] = 1,
    trust_units: Annotated[
        bool, typer.Option("--trust-units", help="make the store though its units look wrong")
    ] = False,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="set structures aside that repeat an earlier one")
    ] = False,
    drop_duplicates_of: Annotated[
        list[Path] | None,
        typer.Option(metavar="STORE", help="set aside what is trained on here and tested on in STORE, or vice versa"),
    ] = None,
) -> None:
    """Turn published files into a store; the same command resumes one that was killed."""
    from multifid.workflows.prepare import prepare as run

    shares = [_float(x, "--fractions") for x in fractions.split(",")]
    if len(shares) != 3:
        raise ValueError(f"--fractions {fractions!r} must be three numbers: train,validation,test")
    run(
        format,
        inputs or [],
        out,
        task=task,
        limit=limit,
        train=train or (),
        validation=validation or (),
        test=test or (),
        fractions=(shares[0], shares[1], shares[2]),
        seed=seed,
        options=dict(_pair(x) for x in option or []),
        level_of_theory=level_of_theory,
        workers=workers,
        trust_units=trust_units,
        drop_duplicates=drop_duplicates,
        drop_duplicates_of=drop_duplicates_of or (),
    )


@app.command()
def formats(
    names: Annotated[list[str] | None, typer.Argument(metavar="[FORMAT...]", help=" ".join(FORMATS))] = None,
) -> None:
    """What prepare reads: all formats, or the options of some."""
    from multifid.workflows.formats import formats as run

    run(names or [])


@app.command()
def init(
    stores: Stores,
    out: Annotated[Path, typer.Option("--out", metavar="CONFIG.yaml", help="the new config")] = Path("config.yaml"),
    run: Annotated[
        str | None,
        typer.Option(
            metavar="RUN", help="directory that the run will write into; default: runs/ and the name of the config"
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(help="length of the run by the clock")] = 20.0,
) -> None:
    """Write a first config for stores, with comments, ready to train. (Not the config key `init`.)"""
    from multifid.workflows.first_config import first_config

    first_config(stores, out, run, minutes)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml|RUN", help="a config, or a run to resume")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="as train.lr=0.001")] = None,
) -> None:
    """Train a model; the same command resumes a run that was stopped."""
    from multifid.config import load_config
    from multifid.parallel.groups import STOPPED
    from multifid.workflows.train import train as run

    if not run(load_config(config, overrides), signals=True).complete:
        raise typer.Exit(STOPPED)


@app.command()
def evaluate(
    runs: Annotated[list[str], typer.Argument(metavar="MODEL...", help="trained runs, or model files (NAME.mfid)")],
    data: Annotated[
        list[str], typer.Option("--data", metavar="[TASK=][FORMAT:]PATH...", help="stores, or files of any format")
    ],
    split: Annotated[str, typer.Option(help="test | validation | train | all")] = "test",
    branch: Annotated[str | None, typer.Option(help="the branch that answers")] = None,
    unseen: Annotated[
        bool, typer.Option("--unseen", help="let structures with elements that the model has not seen into the means")
    ] = False,
    device: Device = None,
    max_edges: Annotated[
        int | None, typer.Option(min=1, help="edges of a batch; default: what the memory allows")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="threads that prepare batches ahead, on each rank")] = 1,
    option: Annotated[list[str] | None, typer.Option(help="key=value of a file's format, as in prepare")] = None,
    trust_units: Annotated[bool, typer.Option("--trust-units", help="though units of a file look wrong")] = False,
    cache: Annotated[Path | None, typer.Option(help="where files become stores; default: ~/.cache/multifid")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="all rows in a file")] = None,
) -> None:
    """Energy, force and stress errors of models on stores and files, as a table and in RUN/evaluation.json."""
    from multifid.workflows.evaluate import evaluate as run

    more = [text for text in runs if _is_data(text)]  # `--data A B`: an option takes one value, B arrives with the runs
    models = [Path(text) for text in runs if text not in more]
    run(
        models,
        [*data, *more],
        split,
        branch,
        unseen=unseen,
        device=device,
        max_edges=max_edges,
        workers=workers,
        options=dict(_pair(x) for x in option or []),
        trust_units=trust_units,
        cache=cache,
        out=out,
    )


@app.command()
def predict(
    model: ModelPath,
    files: StructureFiles,
    out: Annotated[Path, typer.Option("--out", metavar="OUT.xyz", help="extended XYZ with energy, forces, stress")],
    task: Task = None,
    device: Device = None,
    precision: Annotated[str, typer.Option(help="fp32 or fp64")] = "fp32",
    max_edges: Annotated[int | None, typer.Option(min=1, help="edges of a batch; default: 50,000")] = None,
    skip_refused: SkipRefused = False,
) -> None:
    """Energies, forces and stresses of the structures in files, as ASE reads them back."""
    from multifid.apply.predict import predict as run

    run(
        model,
        files,
        out,
        task,
        device=device,
        precision=precision,
        max_edges=max_edges,
        skip=skip_refused,
    )


@app.command()
def relax(
    model: ModelPath,
    files: StructureFiles,
    out: Annotated[Path, typer.Option("--out", metavar="OUT.xyz", help="extended XYZ with the relaxed structures")],
    task: Task = None,
    fmax: Annotated[float, typer.Option(help="the longest force that may be left, eV/angstrom")] = 0.05,
    steps: Annotated[int, typer.Option(min=0, help="at most, of each structure")] = 500,
    cell: Annotated[bool, typer.Option("--cell", help="relax the cells of crystals too")] = False,
    optimizer: Annotated[str, typer.Option(help="fire, lbfgs or bfgs")] = "fire",
    trajectory: Annotated[
        Path | None, typer.Option(metavar="DIRECTORY", help="for one ASE trajectory of each structure")
    ] = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="float32 or float64")] = "float64",
    skip_refused: SkipRefused = False,
) -> None:
    """Relax the structures in files. Exit code 1 where some have not converged; they are named, and written too."""
    from multifid.apply.relax import Settings
    from multifid.apply.relax import relax as run

    settings = Settings(fmax, steps, cell, optimizer, trajectory)
    if not run(model, files, out, task, settings, device=device, dtype=dtype, skip=skip_refused):
        raise typer.Exit(1)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a trained run")],
    out: Annotated[Path, typer.Option("--out", metavar="NAME.mfid", help="the model file")],
    tasks: Annotated[str | None, typer.Option(help="only these tasks and their branches: A,B")] = None,
    weights: Annotated[str, typer.Option(help="best (by validation) or last")] = "best",
) -> None:
    """One file that is the model, with a model card beside it; nothing in it is executed when it is loaded."""
    from multifid.workflows.export import export as run_export

    run_export(run, out, None if tasks is None else tasks.split(","), weights)


@app.command()
def stats(
    stores: Stores,
    figure: Annotated[Path | None, typer.Option(help="periodic-table heat map of element frequencies, as PNG")] = None,
) -> None:
    """What stores hold: counts, label coverage, ranges, fit of the reference energies."""
    from multifid.workflows.stats import stats as run

    run(stores, figure)


@app.command()
def check(stores: Stores) -> None:
    """What is doubtful in the data: units, outliers, duplicates, leakage. Exit code 1 where units are doubtful."""
    from multifid.workflows.check import check as run

    if not run(stores):
        raise typer.Exit(1)


@app.command()
def sample(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="directory for the files")],
    structures: Annotated[int, typer.Option(help="structures of each source")] = 300,
    seed: Annotated[int, typer.Option(help="of everything that is random")] = 0,
    workers: Annotated[int | None, typer.Option(help="processes; default: one for each core")] = None,
) -> None:
    """Five small sources in the five published file formats, made on the spot with real quantum chemistry."""
    from multifid.workflows.sample import sample as run

    run(out, seed=seed, structures=structures, workers=workers)


@app.command()
def study(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="a training config, with a `study` section")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="as study.seeds=[0,1]")
    ] = None,
) -> None:
    """The paper's comparison: one model per dataset, one baseline on all, the two-level model; tables and figures."""
    from multifid.config import load_config
    from multifid.workflows.study import study as run

    run(load_config(config, overrides))


@app.command()
def report(
    path: Annotated[Path, typer.Argument(metavar="RUN|STUDY", help="a run's or a study's directory")],
    out: Annotated[Path, typer.Option(help="the page that is written")] = Path("report.html"),
    structures: Annotated[int, typer.Option(help="of each task's test split, for errors in detail")] = 1_000,
) -> None:
    """One page about a run or a study, for a browser, without a network: data, curves, errors, outliers, speed."""
    from multifid.workflows.report import report as run

    run(path, out, structures)


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the directory of a run")],
    interval: Annotated[float, typer.Option(min=0.1, help="seconds between two looks")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="show what there is and return")] = False,
) -> None:
    """A run in the terminal while it goes on: errors and their curves, speed, time left. Reads its metrics only."""
    from multifid.workflows.watch import watch as run_watch

    run_watch(run, interval, once)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml|RUN", help="a config, or a run")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="as train.batch=64")] = None,
    ranks: Annotated[int, typer.Option(help="how many ranks there will be")] = 1,
    machine: Annotated[
        str | None, typer.Option(help="perlmutter, frontier, aurora, or a YAML file; default: this machine, measured")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON in place of tables")] = False,
) -> None:
    """Placement, memory of a rank, largest batch and time of a step, before anything is run."""
    from multifid.config import load_config
    from multifid.forecast.plan import plan as run

    run(load_config(config, overrides), ranks, machine, json)


@app.command()
def scaling(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml|RUN", help="a config, or a run")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="as train.workers=0")] = None,
    out: Annotated[Path, typer.Option(help="directory for figure, JSON and the description of this machine")] = Path(
        "scaling"
    ),
    ranks: Annotated[
        str, typer.Option(help="launch and measure so many here: 1,2,4; none: take what OUT holds")
    ] = "1,2",
    local_batch: Annotated[float | None, typer.Option(min=1, help="structures of a rank, weak scaling")] = None,
    global_batch: Annotated[float | None, typer.Option(min=1, help="structures of a step, strong scaling")] = None,
    forecast_batch: Annotated[float | None, typer.Option(min=1, help="structures of a rank in forecasts")] = None,
    epoch_steps: Annotated[int, typer.Option(min=1, help="steps of an epoch; there are three of every point")] = 10,
    here: Annotated[
        bool, typer.Option("--here", help="only measure, on the ranks of this launch (srun, torchrun)")
    ] = False,
    epoch: Annotated[
        int | None, typer.Option(min=0, help="with --here: only this epoch, beside those that OUT holds")
    ] = None,
) -> None:
    """Weak and strong scaling: measured on the ranks at hand, forecast for Perlmutter, Frontier and Aurora."""
    from multifid.config import load_config
    from multifid.forecast.scaling import EPOCHS, launch, report, scaling_here

    if epoch is not None and not here:
        raise ValueError(f"--epoch {epoch} is for measuring by hand, with --here; without it all epochs are measured")
    loaded = load_config(config, overrides)
    numbers = [] if ranks == "none" else [_count(text, "--ranks") for text in ranks.split(",")]
    local = local_batch or loaded.train.local_batch or (loaded.train.batch or 32)
    whole = global_batch or local * max([*numbers, 1])
    out.mkdir(parents=True, exist_ok=True)
    if here:
        scaling_here(loaded, out, local, whole, epoch_steps, epoch)
        return
    told = [f"--out={out}", f"--local-batch={local}", f"--global-batch={whole}", f"--epoch-steps={epoch_steps}"]
    for turn in range(EPOCHS):  # the pace of a shared machine changes: all points meet the same
        for number in numbers:
            launch([str(config), *(overrides or []), *told, f"--epoch={turn}"], number)
    report(loaded, out, local, forecast_batch=forecast_batch)


def _is_data(text: str) -> bool:
    """Whether an argument names a store or file ([TASK=][FORMAT:]PATH) and not a model: a directory, or NAME.mfid."""
    path = Path(text)
    if path.is_dir():
        return (path / "manifest.json").exists()
    if path.suffix == ".mfid" and "=" not in text:
        return False
    return path.is_file() or "=" in text or ":" in text


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option {text!r} must have the form key=value")
    return key, value


def _float(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{where}: {text!r} is not a number") from None


def _count(text: str, where: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"{where}: {text!r} must be a whole number of at least 1")
    return int(text)


def _console():
    from rich.console import Console

    return Console()


def main() -> None:
    """Entry point: the user's errors are one message and exit code 1, ours keep their traceback."""
    try:
        app()
    except RuntimeError as error:
        from multifid.parallel.launch import OtherRankFailed

        if not isinstance(error, OtherRankFailed):
            raise
        sys.exit(1)  # the other rank says why: one message is read and not many
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"multifid: error: {error}", file=sys.stderr)
        sys.exit(1)
