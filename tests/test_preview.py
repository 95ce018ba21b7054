"""`prepare --dry-run`: what is told of the first records, that no more are read, and that nothing is written."""

import re

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from multifid.cli import app
from multifid.preparation.preview import preview
from multifid.readers import deepmd
from multifid.readers.contract import Skip
from multifid.readers.first_records import FirstRecords
from multifid.readers.formats import FORMATS
from multifid.readers.published import PUBLISHED
from test_hostile import frames


def told(*arguments) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["prepare", *map(str, arguments)], env={"COLUMNS": "200"})
    return found.exit_code, found.output


def test_labels_keys_and_doubts_are_told_and_nothing_is_written(tmp_path):
    path = tmp_path / "in.xyz"
    text = frames(150, extra="mace_energy=-1")
    path.write_text(re.sub(r" energy=(-[\d.]+)", lambda m: f" energy={float(m[1]) / 27.2114}", text))  # hartree
    before = path.read_bytes()
    code, text = told("auto", path, "--dry-run")
    text = " ".join(text.replace("│", " ").split())
    assert code == 0, text
    assert "format extxyz: 1 files; of each up to 100 records: in.xyz" in text and "energy 100, forces 100" in text
    assert "mace_energy looks like an energy (--option energy_key=mace_energy)" in text
    assert "100: no charge stated: taken as neutral" in text
    assert "doubtful: " in text and "prepare refuses these units without --trust-units" in text
    assert [p.name for p in tmp_path.iterdir()] == ["in.xyz"] and path.read_bytes() == before


def test_without_a_usable_record_the_error_says_what_the_records_hold(tmp_path):
    (tmp_path / "in.xyz").write_text("1\nProperties=species:S:1:pos:R:3 e_tot_x=1\nH 0 0 0\n")
    with pytest.raises(ValueError, match=r"no structure can be used\n(.|\n)*e_tot_x = 1"):
        preview("extxyz", [tmp_path / "in.xyz"], {}, {}, Console(quiet=True))
    with pytest.raises(ValueError, match="--out STORE"):
        raise told_error("extxyz", tmp_path / "in.xyz")
    assert [p.name for p in tmp_path.iterdir()] == ["in.xyz"]


def told_error(*arguments) -> BaseException:
    return CliRunner().invoke(app, ["prepare", *map(str, arguments)]).exception


def test_a_reader_of_blocks_ends_after_so_many_records(tmp_path):
    (tmp_path / "set.000").mkdir()
    (tmp_path / "type.raw").write_text("0")
    (tmp_path / "type_map.raw").write_text("H")
    (tmp_path / "nopbc").touch()
    np.save(tmp_path / "set.000" / "coord.npy", np.zeros((1000, 3)))
    np.save(tmp_path / "set.000" / "energy.npy", np.zeros(1000))
    few = FirstRecords(deepmd, 7)
    (block,) = few.read(tmp_path, few.Options(), lambda far: None)
    assert len(block) == 7 and block.sources[-1] == "set.000/6" and not isinstance(block, Skip)


def test_get_prints_where_a_dataset_is_and_only_formats_that_are_read():
    assert {one.prepare.split()[0] for one in PUBLISHED.values()} <= set(FORMATS)
    found = CliRunner().invoke(app, ["get", "spice"])
    for text in ("zenodo.10975225", "licence   CC0", "Sci. Data 10, 11 (2023)", "prepare spice SPICE-2.0.1.hdf5 --out"):
        assert text in found.output
    assert all(f"{name}: " in CliRunner().invoke(app, ["get"]).output for name in PUBLISHED)
    assert "there are ani1x" in str(CliRunner().invoke(app, ["get", "spicy"]).exception)
