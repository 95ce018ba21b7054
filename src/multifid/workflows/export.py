"""`multifid export`: a run's model as one file, and a page that says what it is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from multifid.evaluation.rows import read_rows
from multifid.model.model_file import export_model, with_tasks
from multifid.model.saved import Description, load_description
from multifid.structures.elements import SYMBOLS


def export(run: Path, out: Path, tasks: Sequence[str] | None = None, weights: str = "best") -> Path:
    """Write NAME.mfid and NAME.md; returns the path of the model file."""
    card = model_card(run, with_tasks(load_description(run), tasks), out.name)
    export_model(run, out, tasks, weights, card)
    page = out.with_suffix(".md")
    page.write_text(card, encoding="utf-8")
    Console(stderr=True).print(f"{out} ({out.stat().st_size / 1e6:.1f} MB) and {page}", soft_wrap=True)
    return out


def model_card(run: Path, description: Description, name: str) -> str:
    """What the model is, in Markdown: architecture, data and levels of theory, errors, how to use it."""
    trained, architecture = description["trained"], description["architecture"]
    encoder = ", ".join(f"{k} {v}" for k, v in architecture["encoder"].items() if k != "name")
    task = next(iter(description["tasks"]))
    lines = [
        f"# {name}",
        "",
        f"An interatomic potential of {len(description['branches'])} branch(es) on one shared encoder, made by "
        f"multifid {description['multifid']}.",
        "",
        f"* Encoder: {architecture['encoder']['name']} ({encoder}); cutoff {description['cutoff']} angstrom",
        f"* Forces: {architecture['branch']['forces']}",
        f"* Trained: {trained['steps']} steps, {trained['epochs']:.3g} epochs, seed {trained['seed']}, best validation "
        f"value {trained['best']}",
        "",
        "| task | level of theory | training structures | labels | elements |",
        "|---|---|---:|---|---|",
        *(_task(task, about) for task, about in description["tasks"].items()),
        "",
        "Licences and citations of the training data are those of their sources; state them where you share this file.",
        "",
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
    return f"| {task} | {about['level_of_theory'] or 'not stated'} | {about['structures']} | {labels} | {symbols} |"


def _errors(run: Path, tasks: set[str]) -> list[str]:
    """A table of the errors that RUN/evaluation.json holds of these tasks; nothing where there are none."""
    rows = [row for row in read_rows(run) if row["data"] in tasks]
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
