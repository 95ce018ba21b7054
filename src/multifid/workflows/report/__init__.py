"""`multifid report RUN|STUDY|SEARCH --out report.html`: what was trained, on what, and how good it is, as one page.

The page needs no network: the plotting library is inside. It is written for people who decide whether to use a model.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

import multifid
from multifid.config import Config, dump_config, load_config
from multifid.evaluation.baselines import no_better
from multifid.evaluation.calibrate import Points, points
from multifid.evaluation.data import Share
from multifid.evaluation.matrix import TWO_LEVEL
from multifid.evaluation.matrix import Row as Errors
from multifid.evaluation.rows import OLD_TASKS, read_rows
from multifid.feed.loader import open_sources
from multifid.model.predictor import Predictor, load
from multifid.model.saved import Description, load_description
from multifid.model.undetermined import stale, without_forces
from multifid.store.store import Store
from multifid.training.diagnosis import NAME
from multifid.training.journal import read_journal
from multifid.workflows.finetune.robustness import checks_of, scans_of
from multifid.workflows.report.sample import TaskErrors, errors_of

STRUCTURES = 1_000  # of each task's test split, unless told
ABOVE = 0.03  # a task whose loss is more than this part above its lowest is told of


@dataclass
class PageContent:
    """What the page is made of."""

    title: str
    run: Path  # the run whose curves and errors are shown in detail
    config: Config
    description: Description
    journal: list[dict[str, Any]]
    rows: list[Errors]  # evaluation.json
    errors: dict[str, TaskErrors]  # task -> errors on a sample of its test split
    stores: dict[str, Store]
    warnings: list[str]
    study: bool
    deviations: dict[str, Points] = field(default_factory=dict)  # of a run that was calibrated, beside its errors
    old_tasks: list[Errors] = field(default_factory=list)  # of a fine-tuned run: rows of `before` and `after`
    checks: list[Errors] = field(default_factory=list)  # the same of data unlike the new ones
    scans: list[tuple[str, list[tuple[str, str, str]]]] = field(default_factory=list)  # of dimers: see `falling`
    measured: list[dict[str, Any]] = field(default_factory=list)  # how tasks pull at the encoder: diagnosis.jsonl


def report(path: Path, out: Path, structures: int = STRUCTURES, console: Console | None = None) -> Path:
    """Write the page about a run's or a study's directory; returns `out`.

    structures: of each task's test split, spread evenly, on which parity, errors by element and size, and outliers are
    computed. ValueError where the directory holds neither, and where plotly is missing. A store that is gone costs its
    task's errors, with a warning on the page.
    """
    from multifid.workflows.report.page import render

    if structures < 1:
        raise ValueError(f"--structures {structures}: at least one structure of each task is needed")
    console = console or Console(stderr=True)
    with console.status("gathering"):
        content = gather(Path(path), structures)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(render(content), encoding="utf-8")
    part.replace(out)
    console.print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)
    return out


def gather(path: Path, structures: int) -> PageContent:
    """All numbers of the page."""
    run, study = _run_of(path)
    config, description = load_config(run / "config.yaml"), load_description(run)
    journal, warnings = read_journal(run), []
    stores: dict[str, Store] = {}
    errors: dict[str, TaskErrors] = {}
    model: Predictor = load(run)
    deviations: dict[str, Points] = {}
    for task, section in config.tasks.items():
        try:
            (source,) = open_sources({task: section})
        except (OSError, ValueError) as error:
            warnings.append(f"Task {task} has no errors here, because its store cannot be read: {error}")
            continue
        stores[task] = source.store
        found = errors_of(model, run.name, task, source, structures)
        if found is None:
            warnings.append(f"Task {task} has no test split: its errors are not shown.")
        else:
            errors[task] = found
            if model.rigidity is not None and task in model.rigidity.tasks:
                deviations[task] = points(model, source, task, model.rigidity, "test", Share())
    warnings += _warnings(journal, description, errors)
    warnings += [line.removeprefix("warning: ") for line in no_better([one.row for one in errors.values()])]
    rows, old = read_rows(path), read_rows(run, OLD_TASKS)
    checks, scans = checks_of(run), scans_of(run)
    return PageContent(
        str(path),
        run,
        config,
        description,
        journal,
        rows,
        errors,
        stores,
        warnings,
        study,
        deviations,
        old,
        checks,
        scans,
        read_journal(run, NAME) if (run / NAME).is_file() else [],
    )


def reproduce(content: PageContent) -> tuple[str, str]:
    """(command, config): what trains this run or study again, in words for a shell, and the file that it takes."""
    if content.study:
        path = Path(content.title) / "config.yaml"
        return "multifid study config.yaml", path.read_text(encoding="utf-8")
    return "multifid train config.yaml run=runs/again", dump_config(content.config)


def version() -> str:
    """That of the package that writes the page."""
    return multifid.__version__


def _run_of(path: Path) -> tuple[Path, bool]:
    """(run, whether the path is a study's): of a study the two-level model of the first seed."""
    if not path.is_dir():
        raise ValueError(f"{path} is no directory: `multifid report` takes a run or a study")
    if (path / "model.json").is_file():
        return path, False
    for seed in sorted(path.glob("seed-*"), key=lambda p: (len(p.name), p.name)):
        if (seed / TWO_LEVEL / "model.json").is_file():
            return seed / TWO_LEVEL, True
    holds = (
        "a run that has no validated weights yet" if (path / "config.yaml").is_file() else "neither a run nor a study"
    )
    raise ValueError(f"{path} holds {holds} (no model.json, no seed-*/{TWO_LEVEL}/model.json): train first")


def _warnings(journal: Sequence[dict[str, Any]], about: Description, errors: dict[str, TaskErrors]) -> list[str]:
    """What a reader should know before trusting the numbers."""
    found = []
    validated = [row for row in journal if row["split"] == "validation" and row.get("objective") is not None]
    values = list({row["step"]: row["objective"] for row in validated}.values())
    if len(values) >= 3 and values[-1] == min(values) and values[-2] - values[-1] > 0.02 * values[-1]:
        found.append("The validation value was still falling by more than 2 % when training ended: train longer.")
    if len(values) >= 3 and values[-1] > 1.1 * min(values):
        found.append("The validation value ended more than 10 % above its best: the model may be overfitted.")
    found += _past_their_best(validated, about["trained"]["steps"])
    skipped = sum(row.get("skipped") or 0 for row in {r["step"]: r for r in validated}.values())
    if skipped:
        found.append(f"{skipped} updates were skipped, because a loss or gradient was not finite.")
    told = [say(task, one) for say in (stale, without_forces) for task, one in about["tasks"].items()]
    found += [text[0].upper() + text[1:] for text in told if text is not None]
    for task, one in errors.items():
        if one.unseen:
            found.append(f"Task {task}: {one.unseen} test structures hold elements that training never saw; left out.")
        if one.nonfinite:
            found.append(f"Task {task}: {one.nonfinite} predictions are not finite; left out.")
        if about["tasks"][task].get("undetermined"):
            found.append(
                f"Task {task}: the training data do not determine all reference energies; total energies of "
                "compositions unlike the training data may be wrong."
            )
    return found


def _past_their_best(validated: Sequence[dict[str, Any]], kept: int) -> list[str]:
    """Tasks that are worse in the weights that are kept, those of a step, than they were before or after it."""
    found: list[str] = []
    losses: dict[str, dict[int, float]] = {}
    for row in validated:
        losses.setdefault(row["task"], {})[row["step"]] = row["loss"]
    for task, by_step in losses.items():
        at, step = by_step.get(kept), min(by_step, key=lambda s: by_step[s])
        if at is not None and at > (1 + ABOVE) * by_step[step]:
            above = 100 * (at / by_step[step] - 1)
            found.append(
                f"Task {task}: its validation loss was lowest at step {step:,} and is {above:.0f} % higher in the "
                "weights that are kept: it has begun to be learnt by heart; give it a smaller weight, or more data."
            )
    return found
