"""`multifid export`: a run's model as one file, weights or compiled code, and a page that says what it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from multifid.evaluation.rows import read_rows
from multifid.model.aot import export_package
from multifid.model.model_file import export_model, load_model, with_tasks
from multifid.model.predictor import Predictor
from multifid.model.rigidity_file import load_rigidity, packed
from multifid.model.saved import Description, forces_said, load_description
from multifid.model.task_model import PRECISIONS
from multifid.readers.published import PUBLISHED
from multifid.structures.elements import SYMBOLS
from multifid.workflows.replay_store import export_replay, replay_folder


@dataclass(frozen=True)
class Compilation:
    """What is said of compiled code (pt2); None: nothing."""

    task: str | None = None  # which one answers; may be left out where there is only one
    precision: str | None = None  # fp32 (default) or fp64
    instructions: str | None = None  # of `model.package.INSTRUCTIONS`; default: avx2 where there is such
    threads: str | None = None  # one (default) or all

    def said(self) -> list[str]:
        """The options that were given."""
        return [f"--{name}" for name, value in vars(self).items() if value is not None]


def export(
    run: Path,
    out: Path,
    tasks: Sequence[str] | None = None,
    weights: str = "best",
    format: str | None = None,
    code: Compilation = Compilation(),
    replay: int | None = None,
) -> Path:
    """Write NAME.mfid, or NAME.pt2, and NAME.md; returns the path of the model file.

    replay: of a model file, write NAME.replay too, stores with so many training structures of each task.
    format: mfid or pt2; default: by the ending of `out`. ValueError for options of the other format.
    """
    format = format or ("pt2" if out.suffix == ".pt2" else "mfid")
    if format not in ("mfid", "pt2"):
        raise ValueError(
            f"format {format!r} must be mfid (weights of several tasks) or pt2 (compiled code of one task)"
        )
    console = Console(stderr=True)
    if format == "pt2":
        if replay is not None:
            raise ValueError("--replay N goes with a model file (mfid), which can be fine-tuned; a pt2 file cannot")
        if tasks is not None:
            raise ValueError("a pt2 file has one task: name it by --task, in place of --tasks")
        card = _export_code(run, out, weights, code)
    elif given := code.said():
        raise ValueError(f"{', '.join(given)} is for compiled code only: add --format pt2, or end the name in .pt2")
    else:
        card = model_card(run, with_tasks(load_description(run), tasks), out.name)
        held = load_rigidity(run) if weights == "best" else None  # it was calibrated for the best weights
        folder = replay_folder(out)
        if replay is not None:
            for path in (folder, out):
                if path.exists():
                    raise FileExistsError(f"{path} exists already: remove it or choose another name")
            potential, description = load_model(run, weights)
            export_replay(Predictor(potential, with_tasks(description, tasks)), run, folder, replay, console)
        export_model(run, out, tasks, weights, card, None if held is None else packed(held))
    page = out.with_suffix(".md")
    page.write_text(card, encoding="utf-8")
    console.print(f"{out} ({out.stat().st_size / 1e6:.1f} MB) and {page}", soft_wrap=True)
    return out


def _export_code(run: Path, out: Path, weights: str, code: Compilation) -> str:
    """Write NAME.pt2; returns its card."""
    if out.suffix != ".pt2":
        raise ValueError(f"{out}: compiled code goes into a file that ends in .pt2")
    if code.threads not in (None, "one", "all"):
        raise ValueError(f"--threads {code.threads!r} must be one or all")
    if code.precision not in (None, *PRECISIONS):
        raise ValueError(f"--precision {code.precision!r} must be one of {', '.join(PRECISIONS)}")
    model = Predictor(*load_model(run, weights), dtype=PRECISIONS[code.precision or "fp32"])
    task = model.energy_task(code.task)
    card = model_card(run, with_tasks(model.description, [task]), out.name)
    Console(stderr=True).print(f"compiling {run}, task {task}: this takes a minute or more", soft_wrap=True)
    export_package(model, task, out, level=code.instructions, threaded=code.threads == "all")
    return card


def model_card(run: Path, description: Description, name: str) -> str:
    """What the model is, in Markdown: architecture, data and levels of theory, errors, how to use it."""
    trained, architecture = description.get("trained"), description["architecture"]
    encoder = ", ".join(f"{k} {v}" for k, v in architecture["encoder"].items() if k != "name")
    task = next(iter(description["tasks"]))
    lines = [
        f"# {name}",
        "",
        f"An interatomic potential of {len(description['branches'])} branch(es) on one shared encoder, made by "
        f"multifid {description['multifid']}.",
        "",
        f"* Encoder: {architecture['encoder']['name']} ({encoder}); cutoff {description['cutoff']} angstrom",
        f"* Forces: {forces_said(description)}",
        "* Trained: not by multifid"
        if trained is None
        else f"* Trained: {trained['steps']} steps, {trained['epochs']:.3g} epochs, seed {trained['seed']}, best "
        f"validation value {trained['best']}",
        "",
        "| task | level of theory | training structures | labels | elements |",
        "|---|---|---:|---|---|",
        *(_task(task, about) for task, about in description["tasks"].items()),
        "",
        *training_data(description["tasks"]),
        *_errors(run, set(description["tasks"])),
        "```python",
        "import multifid",
        "",
        f'model = multifid.load("{name}")',
        f'out = model.predict(atoms, task="{task}")   # out.energy (eV), out.forces (eV/angstrom), out.stress',
        "```",
        "",
    ]
    return "\n".join(lines)


def _task(task: str, about: dict[str, Any]) -> str:
    labels = ", ".join(f"{kind} {count}" for kind, count in about["labels"].items() if count)
    symbols = " ".join(SYMBOLS[z] for z in about["elements"])
    task = f"{task} (stale)" if about.get("stale") else task
    if (factor := about.get("forces_factor")) is not None:
        task += f" (forces times {factor:.2g} after training)" if factor else " (no forces)"
    return f"| {task} | {about['level_of_theory'] or 'not stated'} | {about['structures']} | {labels} | {symbols} |"


def training_data(tasks: dict[str, Any]) -> list[str]:
    """Licence and citations of what each task was trained on, where the format is that of a published dataset."""
    lines = ["Training data (state licences and citations where you share this file):", ""]
    for task, about in tasks.items():
        for name in about.get("read_as", []) or [None]:
            one = None if name is None else PUBLISHED.get(name)
            if one is None:
                read = "not recorded" if name is None else f"files read as {name}"
                lines.append(f"* {task}: {read}; licence and citation are those of their source")
                continue
            known = [f"licence {one.licence}" if one.licence else "for the licence see there"]
            known += [f"cite {text}" for text in one.citations]
            said = f"* {task}: files in the format of {name}. If they are the published ones ({one.source}): "
            lines.append(said + "; ".join(known))
    return [*lines, ""]


def _errors(run: Path, tasks: set[str]) -> list[str]:
    """A table of the errors that RUN/evaluation.json holds of these tasks; nothing where there are none."""
    rows = [row for row in read_rows(run) if row["data"] in tasks] if run.is_dir() else []
    if not rows:
        return ["Errors: not evaluated yet (`multifid evaluate RUN --data TASK=STORE`).", ""]
    return [
        "| data | split | structures | energy MAE (meV/atom) | forces MAE (meV/angstrom) |",
        "|---|---|---:|---:|---:|",
        *(
            f"| {row['data']} | {row['split']} | {row['structures']} "
            f"| {_milli(row['energy_mae'])} | {_milli(row['forces_mae'])} |"
            for row in rows
        ),
        "",
    ]


def _milli(value: float | None) -> str:
    return "" if value is None else f"{1000 * value:.4g}"
