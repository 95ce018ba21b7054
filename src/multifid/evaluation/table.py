"""The paper's two tables: energy MAE (eV/atom) and forces MAE (eV/angstrom), models as rows and datasets as columns.

All functions take the rows of `evaluation.json` and return text; only `write_tables` touches the disk. Files keep the
units of the paper (eV); the table for the terminal is in meV.
"""

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from multifid.evaluation.fitted import FittedTable
from multifid.evaluation.matrix import (
    BASELINE,
    GEOMETRIC_MEAN,
    REFERENCES,
    TWO_LEVEL,
    UNITS,
    Estimate,
    Matrix,
    Row,
    matrix,
    own_model,
    quantities,
)

_TITLES = {
    "energy": "Table 1. Energy MAE",
    "forces": "Table 2. Forces MAE, by component",
    "stress": "Table 3. Stress MAE, by component",
}
_NONE = "–"
UNSEEN, NONFINITE = "†", "‡"  # signs behind a number


def write_tables(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Write tables.md, tables.json and table-energy.csv, -forces and -stress, each by temporary file and rename."""
    files = {
        "tables.md": markdown(rows),
        **{f"table-{quantity}.csv": csv_table(rows, quantity) for quantity in quantities(rows)},
        "tables.json": json.dumps(tables(rows), indent=2, allow_nan=False) + "\n",
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        temporary = directory / f".{name}.part"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, directory / name)
    return [directory / name for name in files]


def markdown(rows: Sequence[Row]) -> str:
    """Both tables, the ratios of the study and the footnotes, as Markdown. The two best of each column are bold."""
    parts = []
    for quantity in quantities(rows):
        m = matrix(rows, quantity)
        if m.datasets:
            parts += [f"**{_TITLES[quantity]} ({UNITS[quantity]})**", _markdown_matrix(m, _signs(rows, quantity))]
    compared = ratios(rows)
    if compared:
        parts += ["**How the models compare (ratio of errors)**", _markdown_ratios(compared, _datasets(rows))]
    parts.append("\n".join(_footnotes(rows)))
    return "\n\n".join(parts) + "\n"


def csv_table(rows: Sequence[Row], quantity: str) -> str:
    """One table as CSV in eV/atom, eV/angstrom or eV/angstrom^3, full precision; empty = no value.

    With several seeds each column is followed by its spread.
    """
    m = matrix(rows, quantity)
    columns = m.columns
    spread = any(e is not None and e.spread is not None for e in (m.estimate(x, d) for x in m.models for d in columns))
    names = [name for c in columns for name in ([c, f"{c} spread"] if spread else [c])]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", *names])
    for model in m.models:
        cells: list[float | str] = []
        for estimate in (m.estimate(model, c) for c in columns):
            pair = (None, None) if estimate is None else (estimate.mean, estimate.spread)
            cells += ["" if x is None else x for x in (pair if spread else pair[:1])]
        writer.writerow([model, *cells])
    return text.getvalue()


def tables(rows: Sequence[Row]) -> dict:
    """Both tables, the ratios and the rows they come from, for JSON. null = no value (or one that is not finite)."""
    out: dict = {"datasets": {d: _counts(rows, d) for d in _datasets(rows)}}
    for quantity in quantities(rows):
        m = matrix(rows, quantity)
        columns = m.columns
        models = {model: {c: _plain(m.estimate(model, c)) for c in columns} for model in m.models}
        out[quantity] = {"unit": UNITS[quantity].replace("Å", "angstrom"), "mae": models}
    out["ratios"] = {
        name: {q: {c: _plain(e) for c, e in columns.items()} for q, columns in compared.items()}
        for name, compared in ratios(rows).items()
    }
    out["rows"] = [{k: _finite(v) for k, v in row.items()} for row in rows]
    return out


def ratios(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Estimate | None]]]:
    """Comparison -> quantity -> dataset (and the geometric mean over them) -> ratio of errors.

    The two-level model over the one-level baseline; the two-level model over each dataset's own model; "reference
    energies and zero forces" over each dataset's own model. Comparisons whose models are not in the rows are left out.
    """
    names = {row["model"] for row in rows}
    matrices = {quantity: matrix(rows, quantity) for quantity in quantities(rows)}
    own = {quantity: [own_model(d) for d in m.datasets] for quantity, m in matrices.items()}
    has_own = any(own_model(d) in names for d in _datasets(rows))
    out: dict[str, dict[str, dict[str, Estimate | None]]] = {}
    if {TWO_LEVEL, BASELINE} <= names:
        out[f"{TWO_LEVEL} / {BASELINE}"] = {
            q: m.ratio([TWO_LEVEL] * len(m.datasets), [BASELINE] * len(m.datasets)) for q, m in matrices.items()
        }
    if TWO_LEVEL in names and has_own:
        out[f"{TWO_LEVEL} / own model"] = {
            q: m.ratio([TWO_LEVEL] * len(m.datasets), own[q]) for q, m in matrices.items()
        }
    if REFERENCES in names and has_own:
        out[f"{REFERENCES} / own model"] = {
            q: m.ratio([REFERENCES] * len(m.datasets), own[q]) for q, m in matrices.items()
        }
    return out


def rich_table(rows: Sequence[Row], quantity: str) -> FittedTable:
    """One table for the terminal, in meV/atom, meV/angstrom or meV/angstrom^3, with its footnotes."""
    m, signs, decimals = matrix(rows, quantity), _signs(rows, quantity), _decimals(matrix(rows, quantity), 1000.0)

    def cells(model: str) -> list[str]:
        return [_cell(m, model, c, signs, decimals, bold=("[bold]", "[/bold]"), factor=1000.0) for c in m.columns]

    unseen = [f"{UNSEEN} {_how(rows)} structures of elements that are new to the model{_how_many(rows)}."]
    return FittedTable(
        title=f"{quantity.capitalize()} MAE (m{UNITS[quantity]})",
        names=["model"],
        numbers=m.columns,
        rows=[[escape(model), *cells(model)] for model in m.models],
        notes=[
            escape(note)
            for note in [*_over(rows), *(unseen if _counted(rows, "unseen_structures") else []), *_nonfinite(rows)]
        ],
    )


def _markdown_matrix(m: Matrix, signs: dict[tuple[str, str], str]) -> str:
    columns = m.columns
    decimals = _decimals(m)
    lines = [_line(["model", *columns]), _line(["---", *["---:"] * len(columns)])]
    for model in m.models:
        lines.append(_line([model, *(_cell(m, model, c, signs, decimals) for c in columns)]))
    return "\n".join(lines)


def _markdown_ratios(compared: dict[str, dict[str, dict[str, Estimate | None]]], datasets: Sequence[str]) -> str:
    columns = [*datasets, GEOMETRIC_MEAN]
    lines = [_line(["ratio", "of", *columns]), _line(["---", "---", *["---:"] * len(columns)])]
    for name, of_quantities in compared.items():
        for quantity, values in of_quantities.items():
            if any(values.get(c) is not None for c in columns):
                lines.append(_line([name, quantity, *(_text(values.get(c), 2) for c in columns)]))
    return "\n".join(lines)


def _cell(
    m: Matrix,
    model: str,
    column: str,
    signs: dict[tuple[str, str], str],
    decimals: int,
    bold: tuple[str, str] = ("**", "**"),
    factor: float = 1.0,
) -> str:
    text = _text(m.estimate(model, column), decimals, factor)
    if text != _NONE and model in m.best(column):
        text = text.join(bold)
    return text + signs.get((model, column), "")


def _text(estimate: Estimate | None, decimals: int, factor: float = 1.0) -> str:
    if estimate is None:
        return _NONE
    text = f"{estimate.mean * factor:.{decimals}f}"
    return text if estimate.spread is None else f"{text} ± {estimate.spread * factor:.{decimals}f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _decimals(m: Matrix, factor: float = 1.0) -> int:
    """As many for the whole table that its smallest number has three digits, but no more than five."""
    values = [v * factor for cell in m.cells.values() for v in cell.values() if math.isfinite(v) and v > 0.0]
    return min(5, max(0, 2 - math.floor(math.log10(min(values))))) if values else 0


def _footnotes(rows: Sequence[Row]) -> list[str]:
    """Of the tables in files: what the errors are over, and which structures a model did not know or answer."""
    unseen = _counted(rows, "unseen_structures")
    listed = ", ".join(f"{model} on {data} {n} of {_structures(rows, data)}" for (model, data), n in unseen.items())
    told = f"{UNSEEN} {_how(rows)} structures that hold an element the model has not seen in training: {listed}."
    return [*_over(rows), *([told] if unseen else []), *_nonfinite(rows)]


def _over(rows: Sequence[Row]) -> list[str]:
    """What the errors are over."""
    datasets = _datasets(rows)
    seeds = max((sum(r["model"] == row["model"] and r["data"] == row["data"] for r in rows) for row in rows), default=0)
    counted = ", ".join(f"{d} {_structures(rows, d)}" for d in datasets)
    notes = [f"Split {', '.join(sorted({str(r['split']) for r in rows}))}; structures: {counted}."]
    return [*notes, f"Mean ± sample standard deviation over up to {seeds} seeds."] if seeds > 1 else notes


def _how(rows: Sequence[Row]) -> str:
    """Whether structures of elements that a model has not seen enter its errors."""
    left_out = all(row.get("unseen") == "excluded" for row in rows if row.get("unseen_structures"))
    return "Without" if left_out else "With"


def _how_many(rows: Sequence[Row]) -> str:
    """How many structures are of unseen elements, where one row has any; files count them for each."""
    unseen = _counted(rows, "unseen_structures")
    if len(unseen) != 1:
        return ""
    ((_, data), n), *_ = unseen.items()
    return f": {n} of {_structures(rows, data)}"


def _nonfinite(rows: Sequence[Row]) -> list[str]:
    """Predictions that are no numbers, and the first structure of each."""
    nonfinite = _counted(rows, "nonfinite_structures")
    first = {(row["model"], row["data"]): row["nonfinite"] for row in rows if row.get("nonfinite")}
    listed = "; ".join(
        f"{model} on {data} {n} of {_structures(rows, data)}, first {_named(first.get((model, data)))}"
        for (model, data), n in nonfinite.items()
    )
    return [f"{NONFINITE} Without structures whose prediction is not finite: {listed}."] if nonfinite else []


def _named(structures: Sequence[dict] | None) -> str:
    """The first of some structures: where it lies in the store, and where it came from."""
    return f"structure {structures[0]['index']} ({structures[0]['source']})" if structures else "unknown"


def _datasets(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["data"] for row in rows))


def _counts(rows: Sequence[Row], data: str) -> dict[str, int]:
    row = next(row for row in rows if row["data"] == data)
    return {"structures": row["structures"], "atoms": row["atoms"]}


def _structures(rows: Sequence[Row], data: str) -> str:
    """How many structures of a dataset there are; seeds may have other splits."""
    return _range([row["structures"] for row in rows if row["data"] == data])


def _counted(rows: Sequence[Row], key: str) -> dict[tuple[str, str], str]:
    """Model and data of rows that count something, with how many, which may differ between seeds."""
    found: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        found.setdefault((row["model"], row["data"]), []).append(row.get(key) or 0)
    return {place: _range(counts) for place, counts in found.items() if any(counts)}


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def _signs(all_rows: Sequence[Row], quantity: str) -> dict[tuple[str, str], str]:
    """What stands behind the number of a model on a dataset, or in place of a mean over nothing; see the footnotes."""
    rows = [r for r in all_rows if r.get(f"{quantity}_mae") is not None or not r.get("counted_structures", 1)]
    signs = dict.fromkeys(_counted(rows, "unseen_structures"), f" {UNSEEN}")
    for place in _counted(rows, "nonfinite_structures"):
        signs[place] = f"{signs.get(place, ' ')}{NONFINITE}"
    return signs


def _plain(estimate: Estimate | None) -> dict | None:
    if estimate is None:
        return None
    return {"mean": _finite(estimate.mean), "spread": _finite(estimate.spread), "seeds": estimate.seeds}


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
