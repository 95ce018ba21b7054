"""A study on several splits of the same data, as one table: mean and spread over splits and weights.

    OMP_NUM_THREADS=1 python benchmarks/splits.py CONFIG.yaml [key=value ...] --stores runs/split-{seed}
        [--seeds 0 1 2 3 4] [--out runs/splits]

Each seed is one `multifid study` of CONFIG, whose tasks read the stores --stores/TASK with the seed in place of
{seed} (prepared with `--seed`, so that each has another split), and whose weights and order of data are drawn from that
seed too. The rows of all are written to OUT as the tables of one study. What is there already is not made again.
"""

import argparse
import os
from pathlib import Path

from multifid.config import load_config, parse_config
from multifid.evaluation.baselines import no_better_in_study
from multifid.evaluation.figures import error_matrix, save
from multifid.evaluation.matrix import REFERENCES, Row
from multifid.evaluation.rows import read_rows
from multifid.evaluation.table import markdown, write_tables
from multifid.workflows.study import study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--stores", required=True, help="directory of a seed's stores, with {seed} in it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/splits"))
    args = parser.parse_intermixed_args()
    if "{seed}" not in args.stores:
        parser.error(f"--stores {args.stores}: must have {{seed}} in it, for one directory of stores per split")
    rows: list[Row] = []
    for seed in args.seeds:
        rows += of_split(args.config, args.overrides, Path(args.stores.format(seed=seed)), seed, args.out)
    write_tables(rows, args.out)
    save(error_matrix(rows), args.out / "matrix.png")
    print(markdown(rows))
    for line in no_better_in_study(rows):
        print(line)


def of_split(path: Path, overrides: list[str], stores: Path, seed: int, out: Path) -> list[Row]:
    """The rows of one split's study, each with its seed, also those of reference energies."""
    values = load_config(path, overrides).model_dump(mode="json", exclude_unset=True)
    values["run"] = str(out / f"split-{seed}")
    for task, given in values["tasks"].items():
        given["store"] = str(stores / task)
    values["study"] = (values.get("study") or {}) | {"seeds": [seed]}
    root = study(parse_config(values, str(path)))
    return [row | {"seed": seed} if row["model"] == REFERENCES else row for row in read_rows(root)]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
