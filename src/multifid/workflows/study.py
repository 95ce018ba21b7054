"""The paper's comparison: one model per dataset, one baseline on all, the two-level model; both tables and the figures.

All models of a study make the same number of steps, and in each step a model sees exactly the structures that the
two-level model sees of its datasets. So they make the same number of passes over each dataset they see, in the same
order, and differ only in what they share.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from multifid.config import Config, StudyConfig, differences, dump_config, load_config, parse_config
from multifid.evaluation.baselines import no_better_in_study
from multifid.evaluation.data import Data, Share
from multifid.evaluation.evaluate import evaluate, references_row
from multifid.evaluation.figures import Parity, convergence, error_matrix, parity, save
from multifid.evaluation.matrix import BASELINE, TWO_LEVEL, Row, own_model, quantities
from multifid.evaluation.parity import ParityCollector
from multifid.evaluation.rows import NAME, add_rows, write_rows
from multifid.evaluation.table import rich_table, write_tables
from multifid.feed.loader import open_sources
from multifid.model.predictor import Predictor
from multifid.model.saved import load_potential
from multifid.parallel import groups
from multifid.parallel.groups import World
from multifid.training.ending import Ending
from multifid.training.journal import read_journal
from multifid.training.resolve import resolve
from multifid.training.run import make_draws, total_steps, train
from multifid.workflows.file_tasks import has_files, with_stores


def study(config: Config, console: Console | None = None) -> Path:
    """Train what is not yet trained, evaluate everything on everything, write tables and figures into config.run.

    Starting it again goes on where it was stopped. The same on every rank of a launch by torchrun or srun: models are
    trained one after the other on all of them. Tasks of files get their stores first, as for a run. ValueError where
    the directory holds a study of another config.
    """
    with groups.world(config.train.device, config.parallel.silence) as world:
        console = (console or Console()) if world.first else Console(quiet=True)
        return _study(with_stores(config, world, console) if has_files(config) else config, world, console)


def _study(config: Config, world: World, console: Console) -> Path:
    settings = config.study or StudyConfig()
    with world.together():
        if settings.processes > 1 and world.size > 1:
            raise ValueError(
                f"study.processes: {settings.processes} is for one process, and {world.size} were launched"
            )
        if config.train.minutes is not None:
            raise ValueError(
                "train.minutes: the models of a study make the same number of steps, which a clock would not give "
                "them; set it to null and give train.steps or train.epochs"
            )
        root = _open(config, world.first)
    runs = [run for seed in settings.seeds for run in models_of(config, seed)]
    _train_all(runs, settings.processes, world, console)
    datasets = _datasets(config)
    rows: list[Row] = [references_row(data) for data in datasets]
    for seed in settings.seeds:
        clouds: dict[str, Parity] = {}
        for run in models_of(config, seed):
            rows += _evaluate(Path(run.run), datasets, seed, clouds, world)
        if world.first:
            save(parity(clouds, f"{TWO_LEVEL}, test split, seed {seed}"), root / f"parity-seed-{seed}.png")
            journals = {Path(r.run).name: read_journal(Path(r.run)) for r in models_of(config, seed)}
            save(convergence(journals), root / f"convergence-seed-{seed}.png")
    if world.first:
        _write(root, rows, console)
    return root


def _write(root: Path, rows: list[Row], console: Console) -> None:
    """Rows, tables and the figure of all seeds."""
    write_rows(root / NAME, rows)
    write_tables(rows, root)
    save(error_matrix(rows), root / "matrix.png")
    for quantity in quantities(rows):
        console.print(rich_table(rows, quantity))
    for line in no_better_in_study(rows):
        console.print(line, highlight=False, markup=False)
    console.print(f"tables and figures: {root}")


def models_of(config: Config, seed: int) -> list[Config]:
    """The configs of one seed's models: each task's own, the baseline, the two-level model."""
    resolved = resolve(config.model_copy(update={"seed": seed}), 1)
    draws = make_draws(resolved, open_sources(resolved.tasks))
    rate = {t: d.rate for d in draws for t in d.tasks}
    steps, per_epoch = total_steps(resolved.train, draws), max(d.pass_steps for d in draws)
    length = {"steps": steps, "epoch_steps": resolved.train.epoch_steps or per_epoch, "patience": None}
    folder = Path(config.run) / f"seed-{seed}"

    def model(name: str, tasks: list[str], branches: str) -> Config:
        chosen = {t: resolved.tasks[t].model_copy(update={"per_step": float(rate[t])}) for t in tasks}
        plain = {} if branches == "per_task" and len(tasks) > 1 else {"balance": "none"}
        shapes = {b: shape for b, shape in resolved.model.branches.items() if branches == "per_task" and b in tasks}
        return resolved.model_copy(
            update={
                "run": str(folder / name),
                "tasks": chosen,
                "branches": branches,
                "model": resolved.model.model_copy(update={"branches": shapes}),
                "train": resolved.train.model_copy(update=length | plain),
                "parallel": resolved.parallel.model_copy(update={"placement": "auto"}),
                "study": None,
            }
        )

    tasks = list(resolved.tasks)
    return [
        *(model(own_model(t), [t], "per_task") for t in tasks),
        model(BASELINE, tasks, "shared"),
        model(TWO_LEVEL, tasks, "per_task"),
    ]


def _open(config: Config, first: bool) -> Path:
    """The study's directory, whose config must be the same if it was begun before; the first rank writes it."""
    root = Path(config.run)
    path = root / "config.yaml"
    if path.exists():
        free = ("study.",)  # more seeds, other numbers of processes
        held = load_config(path)
        changed = differences(config.model_dump(mode="json"), held.model_dump(mode="json"))
        changed = [d for d in changed if not d.startswith(free)]
        if changed:
            raise ValueError(f"{root} holds a study of another config:\n  " + "\n  ".join(changed))
    if first:
        root.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(dump_config(config), encoding="utf-8")
        part.replace(path)
    return root


def _train_all(runs: list[Config], processes: int, world: World, console: Console) -> None:
    """Longest first, so that side-by-side training ends together."""
    longest_first = sorted(runs, key=lambda r: -len(r.tasks))
    if processes == 1:
        for run in longest_first:
            console.print(f"training {run.run}")
            with world.apart(run.run):
                _finished(train(run, console, world, signals=True))
        return
    threads = max(1, torch.get_num_threads() // processes)
    console.print(f"training {processes} models at a time; each says how it goes in its train.log")
    context = get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(processes):
        numbers.put(number)
    with ProcessPoolExecutor(processes, context, initializer=_number, initargs=(numbers,)) as pool:
        jobs = [pool.submit(_train_one, dump_config(run), threads) for run in longest_first]
        for job, run in zip(jobs, longest_first, strict=True):
            job.result()
            console.print(f"trained {run.run} ({run.run}/train.log)")


def _number(numbers: Any) -> None:
    """One of the numbers for this process, which decides over its accelerator."""
    groups.side_by_side(numbers.get())


def _train_one(text: str, threads: int) -> None:
    torch.set_num_threads(threads)
    config = parse_config(yaml.safe_load(text), "study")
    _finished(train(config, Console(quiet=True), signals=True))  # quiet: lines of several would be mixed


def _finished(result: Ending) -> None:
    """The study ends where one of its models was told to stop."""
    if not result.complete:
        raise SystemExit(groups.STOPPED)


def _datasets(config: Config) -> list[Data]:
    return [Data(t, s.store, s.tasks[t]) for t in config.tasks for s in open_sources(config.tasks) if t in s.tasks]


def _evaluate(run: Path, datasets: list[Data], seed: int, clouds: dict[str, Parity], world: World) -> list[Row]:
    """Rows of one model on all datasets; the two-level model's points go to the parity plot too.

    Elements that a model has not seen enter the means: the paper asks every model about every dataset.
    """
    model = Predictor(*load_potential(run), world.device)
    rows: list[Row] = []
    share = Share(world.rank, world.size, world.group.sum_)
    for data in datasets:
        collector = ParityCollector(share)
        rows.append(evaluate(model, run.name, data, collect=collector, unseen=True, share=share) | {"seed": seed})
        if run.name == TWO_LEVEL:
            clouds[data.name] = collector.parity()
    if world.first:
        add_rows(run, rows)
    return rows
