"""Commands on files and stores."""

from pathlib import Path
from typing import Annotated

import typer

from multifid.cli.arguments import Properties, Stores, number, options_of
from multifid.cli.program import command
from multifid.readers.formats import FORMATS
from multifid.readers.published import PUBLISHED

PANEL = "Data"


@command(PANEL)
def prepare(
    format: Annotated[
        str,
        typer.Argument(help=f"{' '.join(FORMATS)} (multifid formats FORMAT: its options), or auto: as the input looks"),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="directory of the new store")] = None,
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
    property: Properties = None,
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
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="tell what the first hundred records hold and what is doubtful; write nothing"),
    ] = False,
) -> None:
    """Turn published files into a store; the same command resumes one that was killed."""
    from multifid.workflows.prepare import prepare as run
    from multifid.workflows.prepare import preview

    if dry_run:
        preview(
            format,
            inputs or [],
            task=task,
            train=train or (),
            validation=validation or (),
            test=test or (),
            level_of_theory=level_of_theory,
            options=options_of(option, property),
        )
        return
    if out is None:
        raise ValueError("--out STORE: say where the new store shall be (or --dry-run, which writes none)")
    shares = [number(x, "--fractions") for x in fractions.split(",")]
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
        options=options_of(option, property),
        level_of_theory=level_of_theory,
        workers=workers,
        trust_units=trust_units,
        drop_duplicates=drop_duplicates,
        drop_duplicates_of=drop_duplicates_of or (),
    )


@command(PANEL)
def get(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[DATASET...]", help=f"{' '.join(PUBLISHED)}; none: a list")
    ] = None,
) -> None:
    """Where published datasets are, their size, licence and what to cite; nothing is downloaded."""
    from multifid.workflows.get import get as run

    run(names or [])


@command(PANEL)
def formats(
    names: Annotated[list[str] | None, typer.Argument(metavar="[FORMAT...]", help=" ".join(FORMATS))] = None,
) -> None:
    """What prepare reads: all formats, or the options of some."""
    from multifid.workflows.formats import formats as run

    run(names or [])


@command(PANEL)
def stats(
    stores: Stores,
    figure: Annotated[Path | None, typer.Option(help="periodic-table heat map of element frequencies, as PNG")] = None,
) -> None:
    """What stores hold: counts, label coverage, ranges, fit of the reference energies."""
    from multifid.workflows.stats import stats as run

    run(stores, figure)


@command(PANEL)
def check(stores: Stores) -> None:
    """What is doubtful in the data: units, outliers, duplicates, leakage. Exit code 1 where units are doubtful."""
    from multifid.workflows.check import check as run

    if not run(stores):
        raise typer.Exit(1)


@command(PANEL)
def sample(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="directory for the files")],
    structures: Annotated[int, typer.Option(help="structures of each source")] = 300,
    seed: Annotated[int, typer.Option(help="of everything that is random")] = 0,
    workers: Annotated[int | None, typer.Option(help="processes; default: one for each core")] = None,
    larger: Annotated[
        bool,
        typer.Option("--larger", help="molecules of 9-26 atoms and crystals of 16 and 24 only: to measure speed with"),
    ] = False,
) -> None:
    """Five small sources in the five published file formats, made on the spot with real quantum chemistry."""
    from multifid.workflows.sample import sample as run

    run(out, seed=seed, structures=structures, workers=workers, larger=larger)


@command(PANEL)
def merge(
    stores: Stores,
    out: Annotated[Path, typer.Option("--out", help="directory of the new store")],
    workers: Annotated[int, typer.Option(help="processes; the store is the same for all")] = 1,
) -> None:
    """One store of the structures of several, with the splits that they have there; it knows its parents."""
    from multifid.workflows.derive import merge as run

    run(stores, out, workers)


@command(PANEL)
def subset(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="a prepared store")],
    out: Annotated[Path, typer.Option("--out", help="directory of the new store")],
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="a condition; all must hold: 'atoms <= 50', 'elements in H,C,N,O', 'elements has Fe', 'forces < 20', "
            "'energy_per_atom > -10', also charge, spin and energy"
        ),
    ] = None,
    train: Annotated[int | None, typer.Option(min=0, help="at most so many of the train split, at random")] = None,
    validation: Annotated[int | None, typer.Option(min=0, help="the same of validation")] = None,
    test: Annotated[int | None, typer.Option(min=0, help="the same of test")] = None,
    seed: Annotated[int, typer.Option(min=0, help="which ones; those of fewer are among those of more")] = 0,
    workers: Annotated[int, typer.Option(help="processes; the store is the same for all")] = 1,
) -> None:
    """A store of the structures that satisfy conditions, or of some of each split; it knows its parent."""
    from multifid.workflows.derive import subset as run

    sizes = {name: n for name, n in (("train", train), ("validation", validation), ("test", test)) if n is not None}
    run(store, out, where or [], workers, sizes, seed)


@command(PANEL)
def add(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="a prepared store")],
    inputs: Annotated[
        list[Path] | None, typer.Argument(metavar="[INPUT...]", help="files, directories or 'patterns'")
    ] = None,
    format: Annotated[str, typer.Option(help="of the files; auto: as the first one looks")] = "auto",
    task: Annotated[str | None, typer.Option(help="label set they belong to; default: the only one")] = None,
    train: Annotated[list[Path] | None, typer.Option(help="an input that is all training split")] = None,
    validation: Annotated[list[Path] | None, typer.Option(help="an input that is all validation split")] = None,
    test: Annotated[list[Path] | None, typer.Option(help="an input that is all test split")] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="fit reference energies and scale again, to all; default: they are kept")
    ] = False,
    level_of_theory: Annotated[str | None, typer.Option(help="of the files; it must be the store's")] = None,
    option: Annotated[list[str] | None, typer.Option(help="key=value of the format, as energy=corrected")] = None,
    property: Properties = None,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="set aside what repeats a stored structure or an earlier one")
    ] = False,
    trust_units: Annotated[bool, typer.Option("--trust-units", help="add though the units look wrong")] = False,
    workers: Annotated[int, typer.Option(help="processes that read; the store is the same for all")] = 1,
) -> None:
    """Add files to a store as a new part; runs that began with it go on with what it held then."""
    from multifid.workflows.derive import add as run

    run(
        store,
        inputs or [],
        format=format,
        task=task,
        train=train or (),
        validation=validation or (),
        test=test or (),
        refit=refit,
        level_of_theory=level_of_theory,
        options=options_of(option, property),
        drop_duplicates=drop_duplicates,
        trust_units=trust_units,
        workers=workers,
    )
