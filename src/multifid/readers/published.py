"""Published datasets of the formats that `prepare` reads: where to get them, what they cite, under which licence.

Facts as the datasets' own pages say them (`source`); what no page says is left out. Nothing is downloaded.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """A dataset. prepare: the arguments of `multifid prepare` that read its files."""

    about: str
    where: tuple[str, ...]
    prepare: str
    citations: tuple[str, ...]
    source: str
    licence: str = ""
    size: str = ""
    checksum: str = ""


PUBLISHED: dict[str, Published] = {
    "ani1x": Published(
        "4,956,005 conformations of organic molecules (H C N O), wB97X/6-31G(d) and up to CCSD(T)*/CBS",
        (
            "https://springernature.figshare.com/collections/The_ANI-1ccx_and_ANI-1x_data_sets_coupled-cluster_and_"
            "density_functional_theory_properties_for_molecules/4712477",
        ),
        "ani1x ani1x-release.h5",
        (
            "Smith et al., J. Chem. Phys. 148, 241733 (2018), doi 10.1063/1.5023802",
            "Smith et al., Nat. Commun. 10, 2903 (2019), for the coupled-cluster energies",
        ),
        "https://github.com/aiqm/ANI1x_datasets",
    ),
    "qm7x": Published(
        "about 4.2 million equilibrium and displaced geometries of 6,950 molecules, PBE0+MBD",
        ("https://zenodo.org/record/4288677 (1000.xz ... 8000.xz, DupMols.dat)",),
        "qm7x 1000.xz 2000.xz ... --option duplicates=DupMols.dat",
        ("Hoja et al., Sci. Data 8, 43 (2021)",),
        "https://zenodo.org/record/4288677",
    ),
    "transition1x": Published(
        "9.6 million structures along about 10,000 reactions, wB97x/6-31G(d)",
        ("https://ndownloader.figshare.com/files/36035789 (Transition1x.h5)",),
        "transition1x Transition1x.h5",
        ("Schreiner et al., Sci. Data (2022)",),
        "https://doi.org/10.6084/m9.figshare.19614657",
        size="6.6 GB",
    ),
    "mptrj": Published(
        "1,580,395 relaxation frames of 145,923 materials, PBE and PBE+U",
        ("https://doi.org/10.6084/m9.figshare.23713842 (MPtrj_2022.9_full.json)",),
        "mptrj MPtrj_2022.9_full.json",
        ("Deng et al., Nat. Mach. Intell. 5, 1031 (2023), doi 10.1038/s42256-023-00716-3",),
        "https://github.com/CederGroupHub/chgnet",
        size="11 to 12 GB",
    ),
    "alexandria": Published(
        "relaxed crystals and their relaxation trajectories, PBE",
        ("https://alexandria.icams.rub.de",),
        "alexandria 'alexandria_*.json.bz2' 'alex_go_*.json.bz2'",
        ("Schmidt et al., Adv. Mater. 35, 2210788 (2023), doi 10.1002/adma.202210788",),
        "https://huggingface.co/datasets/atomind/alexandria",
        licence="CC BY 4.0",
    ),
    "omat24": Published(
        "non-equilibrium crystals, PBE and PBE+U; the page also has sAlex (--option dataset=salex)",
        ("https://huggingface.co/datasets/facebook/OMAT24",),
        "aselmdb DIR --option dataset=omat24",
        ("arXiv 2410.12771 (2024)",),
        "https://huggingface.co/datasets/facebook/OMAT24",
        licence="CC BY 4.0",
    ),
    "omol25": Published(
        "molecules with charge and spin, wB97M-V/def2-TZVPD",
        ("https://huggingface.co/facebook/OMol25 (its conditions must be accepted there)",),
        "aselmdb DIR --option dataset=omol25",
        (),
        "https://huggingface.co/datasets/facebook/OMol25",
    ),
    "spice": Published(
        "2,008,628 conformations of molecules, peptides, dimers, ions and water, wB97M-D3BJ/def2-TZVPPD",
        ("https://doi.org/10.5281/zenodo.10975225 (SPICE-2.0.1.hdf5)",),
        "spice SPICE-2.0.1.hdf5",
        (
            "Eastman et al., Sci. Data 10, 11 (2023), doi 10.1038/s41597-022-01882-6",
            "Eastman et al., J. Chem. Theory Comput. 20, 8583 (2024), doi 10.1021/acs.jctc.4c00794",
        ),
        "https://github.com/openmm/spice-dataset",
        licence="CC0",
        size="37.5 GB",
        checksum="md5 bfba2224b6540e1390a579569b475510",
    ),
    "matpes": Published(
        "about 400,000 structures sampled from dynamics at 300 K, PBE and r2SCAN, static calculations",
        (
            "https://huggingface.co/datasets/Materialyze/matpes/resolve/main/MatPES-PBE-2025.2-charges.json",
            "https://huggingface.co/datasets/Materialyze/matpes/resolve/main/MatPES-R2SCAN-2025.2-charges.json",
        ),
        "table MAPPING.yaml (docs/formats.md has one to begin with)",
        ("Kaplan et al., arXiv 2503.04070 (2025)",),
        "https://github.com/materialyzeai/matpes",
    ),
}
