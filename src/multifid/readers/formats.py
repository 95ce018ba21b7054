"""The formats that `prepare` reads: name -> the module of its reader, and what it is in a line.

Apart from the readers, so that help lists them without importing what they need.
"""

from typing import NamedTuple


class Format(NamedTuple):
    """reader: its module, see `multifid.readers`. about: a line for people."""

    reader: str
    about: str


FORMATS: dict[str, Format] = {
    "ani1x": Format("multifid.readers.ani1x", "ANI-1x and ANI-1ccx, ani1x-release.h5"),
    "qm7x": Format("multifid.readers.qm7x", "QM7-X, 1000.xz ... 8000.xz"),
    "transition1x": Format("multifid.readers.transition1x", "Transition1x, Transition1x.h5"),
    "mptrj": Format("multifid.readers.mptrj", "MPtrj, MPtrj_2022.9_full.json"),
    "alexandria": Format("multifid.readers.alexandria", "Alexandria entries and trajectories, *.json.bz2"),
    "extxyz": Format("multifid.readers.extxyz", "extended XYZ, as ASE, MACE and others write it"),
    "aselmdb": Format(
        "multifid.readers.aselmdb",
        "ASE databases in LMDB: OMat24, sAlex, OMol25, OPoly26, OMC25, OC25, ODAC25, newer OC20",
    ),
    "pyg_lmdb": Format("multifid.readers.pyg_lmdb", "pickled graphs in LMDB: OC20, OC22, ODAC23 as first published"),
    "optimade": Format("multifid.readers.optimade", "responses and exports of OPTIMADE, with a provider's energies"),
    "qm9": Format("multifid.readers.qm9", "QM9, dsgdb9nsd.xyz.tar.bz2 or the files in it"),
    "gems": Format("multifid.readers.gems", "GEMS and its kin, SQLite databases of general_protein_fragments.db"),
    "adios": Format("multifid.readers.adios", "ADIOS2 files of HydraGNN, NAME-v3.bp"),
    "ase": Format("multifid.readers.ase_files", "ASE trajectories and SQLite databases, VASP's vasprun.xml and OUTCAR"),
    "csv": Format("multifid.readers.csv_table", "properties in a table, beside files of structures that ASE reads"),
    "store": Format("multifid.readers.stores", "prepared stores: merged, or a part of them"),
    "spice": Format("multifid.readers.spice", "SPICE, SPICE-2.0.1.hdf5"),
    "deepmd": Format(
        "multifid.readers.deepmd", "systems of DeePMD-kit: directories with type.raw and set.000/coord.npy"
    ),
    "table": Format(
        "multifid.readers.table",
        "any parquet, CSV, JSON, TFRecord, HDF5 or zarr by a MAPPING.yaml that says what is where",
    ),
}
