"""Commands on configs and runs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from multifid.cli.arguments import ModelPath, Properties, Stores, count, is_override, number, options_of
from multifid.cli.program import command

PANEL = "Runs"


@command(PANEL)
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


@command(PANEL)
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


@command(PANEL)
def finetune(
    model: ModelPath,
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA... [key=value]...", help="[TASK=]STORE or [TASK=][FORMAT:]FILE; config keys"),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="directory of the new run")],
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="BRANCH|scratch", help="what new branches begin with; default: the nearest"),
    ] = None,
    replay: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK=STORE|DIR|auto",
            help="old tasks to train on too, not to forget them; auto: their stores",
        ),
    ] = None,
    distil: Annotated[
        str | None,
        typer.Option(metavar="new|PATH", help="old tasks are kept by what the model predicts of these structures"),
    ] = None,
    check: Annotated[
        list[str] | None,
        typer.Option(metavar="[FORMAT:]PATH", help="labelled data unlike the new ones: errors before and after"),
    ] = None,
    references: Annotated[
        bool, typer.Option("--references", help="only fit reference energies to the data, in seconds; no training")
    ] = False,
    sizes: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...", help="a learning curve: fine-tune to so many structures, and train from scratch; or all"
        ),
    ] = None,
    repeat: Annotated[int, typer.Option(help="with --sizes: so many times, each with other structures")] = 1,
    test: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="with --sizes: what is tested on, a file or a store")
    ] = None,
    scratch: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="with --sizes: a key of the config for runs from scratch alone"),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="cross-validation: N runs, one part of the data tested in each"),
    ] = None,
    no_new_elements: Annotated[
        bool, typer.Option("--no-new-elements", help="refuse elements that the model has never seen")
    ] = False,
    property: Properties = None,
    fractions: Annotated[str, typer.Option(help="of files: train,validation,test")] = "0.8,0.1,0.1",
    option: Annotated[list[str] | None, typer.Option(help="key=value: how files are read, as in prepare")] = None,
    trust_units: Annotated[
        bool, typer.Option("--trust-units", help="take files though their units look wrong")
    ] = False,
    cache: Annotated[Path | None, typer.Option(help="where files become stores; default: ~/.cache/multifid")] = None,
) -> None:
    """Adapt a trained model to new data; the same command resumes a run that was stopped."""
    from multifid.parallel.groups import STOPPED
    from multifid.workflows.finetune import finetune as run
    from multifid.workflows.finetune import refit_references

    overrides = [text for text in data if is_override(text)]
    asked = [text for text in data if not is_override(text)]
    if not asked:
        raise ValueError("finetune needs data: multifid finetune MODEL DATA... --out RUN")
    options = options_of(option, property)
    if sizes is None and (repeat != 1 or test or scratch):
        raise ValueError("--repeat, --test and --scratch are for learning curves: say --sizes too")
    if references:
        if len(asked) != 1 or overrides or replay or distil or sizes is not None or folds is not None:
            raise ValueError(
                "--references takes one dataset, no keys of the config, no --replay, --distil, --sizes or --folds"
            )
        refit_references(model, asked[0], out, start=start, options=options, trust_units=trust_units, cache=cache)
        return
    shares = [number(x, "--fractions") for x in fractions.split(",")]
    if len(shares) != 3:
        raise ValueError(f"--fractions {fractions!r} must be three numbers: train,validation,test")
    how: dict[str, Any] = {
        "replay": replay or (),
        "new_elements": not no_new_elements,
        "fractions": (shares[0], shares[1], shares[2]),
        "start": start,
        "options": options,
        "trust_units": trust_units,
        "cache": cache,
        "signals": True,
    }
    if folds is not None:
        if sizes is not None:
            raise ValueError("--folds and --sizes are two ways to test: give one of them")
        from multifid.workflows.finetune.folds import cross_validate

        more: dict[str, Any] = {"distil": distil, "check": check or ()}
        complete = cross_validate(model, asked, out, overrides, folds=folds, **more, **how) is not None
    elif sizes is None:
        complete = run(model, asked, out, overrides, distil=distil, check=check or (), **how).complete
    elif distil is not None or check:
        raise ValueError("--distil and --check are for one run: a learning curve (--sizes) takes --replay and --test")
    elif len(asked) > 1:
        raise ValueError(f"--sizes takes one dataset, not {len(asked)}: {', '.join(asked)}")
    else:
        from multifid.workflows.finetune.curve import learning_curve

        curve: dict[str, Any] = {
            "sizes": sizes.split(","),
            "repeat": repeat,
            "tests": test or (),
            "scratch": scratch or (),
        }
        complete = learning_curve(model, asked[0], out, overrides, **curve, **how) is not None
    if not complete:
        raise typer.Exit(STOPPED)


@command(PANEL)
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


@command(PANEL)
def tune(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="a training config, with a `tune` section")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="as tune.trials=30")] = None,
) -> None:
    """Search keys of a config for the best model; the same command goes on, and joins in from other jobs."""
    from multifid.config import load_config
    from multifid.parallel.groups import STOPPED
    from multifid.workflows.tune.search import tune as run

    if not run(load_config(config, overrides), signals=True).complete:
        raise typer.Exit(STOPPED)


@command(PANEL)
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
    from rich.console import Console

    from multifid.config import load_config
    from multifid.forecast.plan import plan as run
    from multifid.workflows.file_tasks import alone_with_stores

    run(alone_with_stores(load_config(config, overrides), Console(stderr=True)), ranks, machine, json)


@command(PANEL)
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
    numbers = [] if ranks == "none" else [count(text, "--ranks") for text in ranks.split(",")]
    local = local_batch or loaded.train.local_batch or (loaded.train.batch or 32)
    whole = global_batch or local * max([*numbers, 1])
    out.mkdir(parents=True, exist_ok=True)
    if here:
        scaling_here(loaded, out, local, whole, epoch_steps, epoch)
        return
    told = [f"--out={out}", f"--local-batch={local}", f"--global-batch={whole}", f"--epoch-steps={epoch_steps}"]
    for turn in range(EPOCHS):  # the pace of a shared machine changes: all points meet the same
        for n in numbers:
            launch([str(config), *(overrides or []), *told, f"--epoch={turn}"], n)
    report(loaded, out, local, forecast_batch=forecast_batch)


@command(PANEL)
def report(
    path: Annotated[Path, typer.Argument(metavar="RUN|STUDY|SEARCH", help="the directory of a run, study or search")],
    out: Annotated[Path, typer.Option(help="the page that is written")] = Path("report.html"),
    structures: Annotated[int, typer.Option(help="of each task's test split, for errors in detail")] = 1_000,
) -> None:
    """One page about a run, study or search, for a browser, without a network: data, curves, errors, speed."""
    from multifid.workflows.report import report as run
    from multifid.workflows.tune.report import is_search
    from multifid.workflows.tune.report import report as of_search

    if is_search(path):
        of_search(path, out)
    else:
        run(path, out, structures)


@command(PANEL)
def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the directory of a run")],
    interval: Annotated[float, typer.Option(min=0.1, help="seconds between two looks")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="show what there is and return")] = False,
) -> None:
    """A run in the terminal while it goes on: errors and their curves, speed, time left. Reads its metrics only."""
    from multifid.workflows.watch import watch as run_watch

    run_watch(run, interval, once)


@command(PANEL)
def diagnose(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the directory of a run")],
    out: Annotated[
        Path | None, typer.Option(metavar="FIGURE", help="the figure that is drawn; default: RUN/diagnosis.png")
    ] = None,
) -> None:
    """How the tasks of a run pull at its encoder, whether they agree, and which of them it learns by heart."""
    from multifid.workflows.diagnose import diagnose as run_diagnose

    run_diagnose(run, out)
