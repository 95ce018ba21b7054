"""Tables fit the console and nothing in them is cut, however long names are."""

import io
import re

import pytest
from rich.console import Console

from multifid.config import parse_config
from multifid.evaluation.fitted import FittedTable
from multifid.evaluation.table import rich_table
from multifid.forecast.plan import make_plan, tables
from multifid.store.statistics import statistics
from multifid.store.store import Store
from multifid.workflows.stats import tables as tables_of_stores
from test_plan import SLOW
from test_train import config_of

LONG = "oc20-adsorbates-relaxed-2M"


def shown(table, width: int | None) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def assert_whole(text: str, width: int, *cells: str) -> None:
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    assert all(cell in text for cell in cells), [cell for cell in cells if cell not in text]


def evaluated() -> list[dict]:
    """Rows of a study of eight datasets, two seeds."""
    data = ["alexandria", "ani1x", "mptrj", "transition1x", "qm7x", "omat24", "omol25", LONG]
    models = [*(f"Model-{d}" for d in data), "GFM-Baseline-All", "GFM-MTL-All"]
    rows = []
    for i, model in enumerate(models):
        for j, name in enumerate(data):
            for seed in (0, 1):
                errors = {"energy_mae": 0.01 * (1 + i + seed), "forces_mae": 0.1 * (1 + j + i)}
                unseen = {"unseen_structures": 3 * (i == j + 1), "unseen": "excluded"}
                about = {"model": model, "data": name, "split": "test", "structures": 1000, "atoms": 9000, "seed": seed}
                rows.append(about | errors | unseen)
    return rows


@pytest.mark.parametrize("width", [80, 60, None])  # None: no terminal, and no COLUMNS
def test_every_table_fits_and_shows_every_name_and_number(stores, tmp_path, width, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    most = width or 80
    text = shown(rich_table(evaluated(), "forces"), width)
    numbers = [f"{100.0 * (1 + j + i):.0f} ± 0" for i in range(10) for j in range(8)]
    assert_whole(text, most, f"Model-{LONG}", "transition1x", *numbers)
    explained = [line for line in text.splitlines() if line.startswith("†")]
    assert explained == ["† Without structures of elements that are new to the model."] and re.search(
        r"± \d+ † *\n", text
    )
    values = config_of({f"{LONG}-{task}": store for task, store in stores.items()}, tmp_path / "run")
    for table in tables(make_plan(parse_config(values, "test"), 4, SLOW)):
        assert_whole(shown(table, width), most)
    found = statistics(Store(stores["apple"]))
    found.structures, found.atoms, found.name = 24_000_000, 1_234_567_890, LONG
    text = "".join(shown(table, width) for table in tables_of_stores([found]))
    assert_whole(text, most, LONG, "24,000,000", "1,234,567,890", "validation", "determined")


def test_columns_stay_beside_each_other_as_far_as_there_is_room():
    table = FittedTable(
        "title", ["name"], ["geometric mean", "b", "c"], [["x", "1", "2", "3", "words"]], "text", ["a note"]
    )
    wide = FittedTable("title", ["name"], ["a" * 30, "b" * 30], [["n" * 90, "1" * 30, "2" * 30]])
    assert len(re.findall("name", shown(table, 80))) == 1 and re.search("geometric +\n.*mean", shown(table, 80))
    assert len(re.findall("name", shown(table, 18))) == 3
    folded = shown(wide, 60)
    assert_whole(folded, 60, "1" * 30, "2" * 30)
    assert folded.count("n") == 2 * 91, "a name that leaves no room is folded, not cut"
