"""The report as one HTML page: light and dark, on a phone and on paper, without a network."""

from importlib.resources import files
from typing import Any

import numpy as np

from multifid.evaluation.matrix import Estimate, matrix, quantities
from multifid.evaluation.pulls import gaps, pulls
from multifid.model.saved import forces_said
from multifid.structures.elements import SYMBOLS
from multifid.structures.structure import SPLITS
from multifid.workflows.report import PageContent, reproduce, version

OUTLIERS = 4  # structures of each task that are shown


def render(content: PageContent) -> str:
    """The whole page. ValueError names the extra where plotly is missing."""
    need_plotly("multifid report")
    return filled("multifid.workflows.report", _parts(content))


def need_plotly(command: str) -> None:
    """ValueError names the extra where what pages are made with is missing."""
    try:
        import jinja2
        import plotly.offline  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"`{command}` draws with plotly, which is not installed ({error}): pip install 'multifid[report]'"
        ) from None
    del jinja2


def filled(package: str, parts: dict[str, Any]) -> str:
    """The template `page.html.jinja` of a package with its parts, and with what all pages have in common."""
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    common = files("multifid.workflows.report")
    style, draw = (common.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "draw.js"))
    text = files(package).joinpath("page.html.jinja").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(text)
    return template.render(**parts, style=style, draw=draw, plotly=get_plotlyjs())


def _parts(content: PageContent) -> dict[str, Any]:
    """What the template shows: texts, tables and figures as JSON."""
    from multifid.workflows.report import charts

    of_task, charted = charts.colors(sorted(content.config.tasks)), Charted()
    command, config = reproduce(content)
    counts: dict[int, int] = {}
    for store in {str(s.path): s for s in content.stores.values()}.values():
        for z, n in store.elements.items():
            counts[z] = counts.get(z, 0) + n
    journal = content.journal
    tasks = []
    for task, found in content.errors.items():
        tasks.append(
            {
                "name": task,
                "sample": f"{len(found.structures):,} of {found.of:,} test structures",
                "parity": [
                    (title, charted.add(charts.parity(found, kind, of_task[task])))
                    for kind, title in (("energy", "Energies"), ("forces", "Forces"))
                ],
                "outliers": [
                    {"text": _outlier(s), "figure": charted.add(charts.view(s))} for s in _worst(found.structures)
                ],
            }
        )
    return {
        "title": content.title,
        "version": version(),
        "study": content.study,
        "run": str(content.run),
        "facts": _facts(content),
        "warnings": content.warnings,
        "data": _data_table(content),
        "elements": charted.add(charts.elements(counts)) if counts else None,
        "curves": [
            (title, charted.add(charts.curves(journal, key, unit, 1000.0)))
            for title, key, unit in (
                ("Energy", "energy_mae", "meV/atom"),
                ("Forces", "forces_mae", "meV/Å"),
                ("Stress", "stress_mae", "meV/Å³"),
            )
        ],
        "sharing": _sharing(content),
        "test": _test_table(content),
        "matrices": _matrices(content),
        "old_tasks": _before_and_after(content.old_tasks),
        "checks": _before_and_after(content.checks),
        "scans": content.scans,
        "by_element": charted.add(charts.by_element(content.errors)),
        "by_size": charted.add(charts.by_size(content.errors)),
        "deviations": [
            (title, charted.add(charts.deviations(content.deviations, kind, unit)))
            for title, kind, unit in (
                ("Uncertainty of energies", "energy", "meV/atom"),
                ("Uncertainty of forces", "forces", "meV/Å"),
            )
        ],
        "tasks": tasks,
        "placement": _placement(content),
        "command": command,
        "config": config,
        "figures": charted.figures,
    }


def _sharing(content: PageContent) -> list[dict[str, str]]:
    """How each task pulls at the encoder, and how far training and validation are apart."""
    tasks = list(content.config.tasks)
    found, apart = pulls(content.measured, tasks), gaps(content.journal, tasks)
    rows = []
    for task in tasks if content.measured else []:
        pull, gap = found[task], apart.get(task)
        rows.append(
            {
                "task": task,
                "norm": "-" if pull.norm is None else f"{pull.norm:.3g}",
                "share": "-" if pull.share is None else f"{100 * pull.share:.1f} %",
                "worst": "-" if pull.worst is None else f"{pull.worst[1]:+.2f} with {pull.worst[0]}",
                "gap": "-" if gap is None or gap.ratio is None else f"{gap.ratio:.2f}",
                "above": "-" if gap is None or gap.above_best is None else f"{100 * gap.above_best:.1f} %",
            }
        )
    return rows


class Charted:
    """Figures of the page, numbered: a number stands where each belongs, None where there is nothing to draw."""

    def __init__(self) -> None:
        self.figures: list[str] = []

    def add(self, figure: str | None) -> int | None:
        if figure is None:
            return None
        self.figures.append(figure)
        return len(self.figures) - 1


def _facts(content: PageContent) -> list[tuple[str, str]]:
    about, trained = content.description["architecture"], content.description["trained"]
    encoder = ", ".join(f"{k} {v}" for k, v in about["encoder"].items() if k != "name")
    best = trained["best"]
    return [
        ("encoder", f"{about['encoder']['name']} ({encoder}), cutoff {about['cutoff']} Å"),
        ("branches", f"{len(content.description['branches'])}; forces: {forces_said(content.description)}"),
        ("trained", f"{trained['steps']:,} steps, {trained['epochs']:.3g} epochs, seed {trained['seed']}"),
        ("best validation value", "none" if best is None else f"{best:.4g}"),
        ("made by", f"multifid {content.description['multifid']}"),
    ]


def _data_table(content: PageContent) -> list[dict[str, Any]]:
    rows = []
    for task, about in content.description["tasks"].items():
        store = content.stores.get(task)
        sizes = "store not readable" if store is None else " / ".join(f"{store.size(s):,}" for s in SPLITS[:3])
        rows.append(
            {
                "task": task,
                "theory": about["level_of_theory"],
                "sizes": sizes,
                "labels": ", ".join(f"{kind} {n:,}" for kind, n in about["labels"].items() if n),
                "elements": [SYMBOLS[z] for z in about["elements"]],
                "store": str(content.config.tasks[task].store) if task in content.config.tasks else "",
            }
        )
    return rows


def _test_table(content: PageContent) -> list[dict[str, str]]:
    """Errors on the sample of each task's own test split, and those of reference energies and zero forces on it."""
    return [
        {
            "task": task,
            "structures": f"{found.row['counted_structures']:,}",
            **{
                f"{nothing}{quantity}": _milli(found.row.get(f"{nothing}{quantity}_mae"))
                for quantity in ("energy", "forces", "stress")
                for nothing in ("", "zero_")
            },
        }
        for task, found in content.errors.items()
    ]


def _before_and_after(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Errors of the start model and of the fine-tuned one, a line for each dataset (and each new task that answers)."""
    before = {row["data"]: row for row in rows if row["model"] == "before"}
    return [
        {
            "task": row["data"] + row["model"].removeprefix("after"),
            "structures": f"{row['counted_structures']:,}",
            **{
                f"{quantity}_{when}": _milli(both.get(f"{quantity}_mae"))
                for when, both in (("before", before.get(row["data"], {})), ("after", row))
                for quantity in ("energy", "forces")
            },
        }
        for row in rows
        if row["model"].startswith("after")
    ]


def _matrices(content: PageContent) -> list[dict[str, Any]]:
    """The tables models x datasets of a study, on the test split."""
    rows = [row for row in content.rows if row["split"] == "test"]
    if not content.study or not rows:
        return []
    found = []
    for quantity in quantities(rows):
        m = matrix(rows, quantity)
        lines = [(model, [_estimate(m.estimate(model, data)) for data in m.columns]) for model in m.models]
        unit = {"energy": "meV/atom", "forces": "meV/Å", "stress": "meV/Å³"}[quantity]
        found.append({"title": f"{quantity.capitalize()} MAE, {unit}", "datasets": m.columns, "lines": lines})
    return found


def _estimate(found: Estimate | None) -> str:
    if found is None:
        return "-"
    return _milli(found.mean) + ("" if found.spread is None else f" ± {_milli(found.spread)}")


def _placement(content: PageContent) -> list[tuple[str, str]]:
    rows = [row for row in content.journal if row["split"] == "validation"]
    last = rows[-1] if rows else {}
    parallel = content.config.parallel
    speed, memory = last.get("structures_per_second"), last.get("memory")
    return [
        ("placement", str(parallel.placement)),
        ("precision", content.config.train.precision),
        ("optimizer", content.config.train.optimizer),
        ("structures per second", "unknown" if speed is None else f"{speed:,.0f}"),
        ("memory of a rank", "unknown" if memory is None else f"{memory / 2**30:.2f} GiB"),
        ("wall time", "unknown" if not last else f"{last['seconds'] / 60:,.1f} min"),
    ]


def _worst(structures: list[Any]) -> list[Any]:
    """Those with the largest force errors; where there are no force labels, with the largest energy errors."""
    forces = np.array([s.forces_error for s in structures])
    energy = np.array([s.energy_error for s in structures])
    errors = forces if np.isfinite(forces).any() else energy
    return [structures[k] for k in np.argsort(-np.nan_to_num(errors, nan=-1.0), kind="stable")[:OUTLIERS]]


def _outlier(s: Any) -> str:
    from multifid.workflows.report.charts import formula

    return f"{formula(s.numbers)}: energy {_milli(s.energy_error)} meV/atom, forces {_milli(s.forces_error)} meV/Å"


def _milli(value: float | None) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{1000 * value:,.4g}"
