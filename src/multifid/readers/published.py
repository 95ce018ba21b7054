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


FAIRCHEM = "https://github.com/facebookresearch/fairchem"
OPEN_CATALYST = "https://dl.fbaipublicfiles.com/opencatalystproject/data"

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
    "oc20": Published(
        "adsorbates on slabs along relaxations, RPBE: 133,934,018 training frames, validation and test beside them",
        (
            f"{OPEN_CATALYST}/s2ef_train_all.tar (also s2ef_train_2M.tar, s2ef_val_id.tar, ...; N.extxyz.xz in them)",
            f"{OPEN_CATALYST}/is2res_train_val_test_lmdbs.tar.gz (pyg_lmdb DIR --option dataset=oc20)",
        ),
        "extxyz 's2ef_train_all/**/*.extxyz.xz'",
        ("Chanussot et al., ACS Catal. (2021), doi 10.1021/acscatal.0c04525",),
        f"{FAIRCHEM} docs on OC20",
        licence="CC BY 4.0",
        size="225 GB, 1.1 TB unpacked (s2ef_train_all.tar)",
        checksum="md5 12a7087bfd189a06ccbec9bc7add2bcd (s2ef_train_all.tar)",
    ),
    "oc22": Published(
        "adsorbates on oxides, about 62,000 systems along relaxations, total energies, PBE+U",
        (f"{OPEN_CATALYST}/oc22/s2ef_total_train_val_test_lmdbs.tar.gz",),
        "pyg_lmdb DIR --option dataset=oc22",
        ("Tran et al., ACS Catal. (2023), The Open Catalyst 2022 (OC22) dataset",),
        f"{FAIRCHEM} docs on OC22",
        licence="CC BY 4.0",
        size="20 GB, 71 GB unpacked",
        checksum="md5 ebea523c6f8d61248a37b4dd660b11e6",
    ),
    "oc25": Published(
        "nearly 8 million structures of solid-liquid interfaces, 144 atoms on average, RPBE+D3",
        ("https://huggingface.co/facebook/OC25 (its conditions must be accepted there)",),
        "aselmdb DIR --option dataset=oc25",
        (),
        f"{FAIRCHEM} docs on OC25",
        licence="CC BY 4.0",
    ),
    "odac23": Published(
        "carbon dioxide and water in metal-organic frameworks along relaxations, PBE+D3",
        (
            "https://dl.fbaipublicfiles.com/large_objects/dac/datasets/extxyz_train.tar.gz",
            "https://dl.fbaipublicfiles.com/dac/datasets/extxyz_val.tar.gz",
        ),
        "extxyz 'train/**/*.extxyz'",
        ("Sriram et al., arXiv 2311.00341 (2023)",),
        "https://pypi.org/project/fairchem-data-odac; addresses as HydraGNN's example has them",
    ),
    "odac25": Published(
        "nearly 70 million structures of metal-organic frameworks with carbon dioxide, water, nitrogen, oxygen, PBE+D3",
        ("https://huggingface.co/facebook/ODAC25 (its conditions must be accepted there)",),
        "aselmdb DIR --option dataset=odac25",
        ("Sriram et al., arXiv 2508.03162 (2025)",),
        "https://huggingface.co/facebook/ODAC25",
        licence="CC BY 4.0",
    ),
    "salex": Published(
        "10,447,765 frames of Alexandria's relaxations for training, 553,218 for validation, PBE and PBE+U",
        (
            f"{OPEN_CATALYST}/omat/241018/sAlex/train.tar.gz",
            f"{OPEN_CATALYST}/omat/241018/sAlex/val.tar.gz",
        ),
        "aselmdb --train train --validation val --option dataset=salex",
        (
            "arXiv 2410.12771 (2024)",
            "Schmidt et al., Adv. Mater. 35, 2210788 (2023), doi 10.1002/adma.202210788",
        ),
        f"{FAIRCHEM} docs on OMat24",
        licence="CC BY 4.0",
        size="7.6 GB and 408 MB",
    ),
    "opoly26": Published(
        "6.57 million clusters cut out of polymers, with charge and spin, wB97M-V/def2-TZVPD",
        ("https://huggingface.co/facebook/OMol25 (its conditions must be accepted there)",),
        "aselmdb DIR --option dataset=opoly26",
        ("Levine et al., arXiv 2512.23117 (2025)",),
        "https://huggingface.co/facebook/OMol25",
    ),
    "omc25": Published(
        "more than 25 million structures of organic molecular crystals along relaxations, PBE+D3",
        ("https://huggingface.co/facebook/OMC25 (access is applied for there)",),
        "aselmdb DIR --option dataset=omc25",
        ("Gharakhanyan et al., Open Molecular Crystals 2025 (OMC25)",),
        f"{FAIRCHEM} docs on OMC25",
        licence="CC BY 4.0",
    ),
    "mad": Published(
        "Massive Atomic Diversity: crystals, surfaces, clusters and molecules far from equilibrium, one setting of DFT",
        (
            "https://huggingface.co/datasets/colabfit/Massive_Atomic_Diversity_MAD_train (co/*.parquet)",
            "the authors' extended XYZ (format extxyz): see the paper",
        ),
        "table 'co/*.parquet' --option mapping=colabfit",
        ("Mazitov et al., arXiv 2506.19674 (2025)",),
        "https://huggingface.co/colabfit",
    ),
    "qcml": Published(
        "33.5 million calculations of small molecules, many charged or with open shells, PBE0",
        ("gs://qcml-datasets/tfds/qcml/dft_force_field/1.0.0 (gcloud storage cp -r)",),
        "table 'dft_force_field/1.0.0/*.tfrecord-*' --option mapping=qcml",
        ("Ganscha et al., Sci. Data 12, 406 (2025), doi 10.1038/s41597-025-04720-7",),
        "https://doi.org/10.1038/s41597-025-04720-7",
    ),
    "qm9": Published(
        "133,885 small organic molecules (H C N O F) at their minima, B3LYP/6-31G(2df,p); energies without forces",
        (
            "https://springernature.figshare.com/ndownloader/files/3195389 (dsgdb9nsd.xyz.tar.bz2)",
            "https://springernature.figshare.com/ndownloader/files/3195404 (uncharacterized.txt)",
        ),
        "qm9 dsgdb9nsd.xyz.tar.bz2 --option uncharacterized=uncharacterized.txt",
        ("Ramakrishnan et al., Sci. Data 1, 140022 (2014), doi 10.1038/sdata.2014.22",),
        "https://doi.org/10.6084/m9.figshare.c.978904.v5",
    ),
    "gems": Published(
        "fragments of proteins in water, bottom up and top down, PBE0+MBD",
        ("https://zenodo.org/records/10720941 (general_protein_fragments.db and others)",),
        "gems general_protein_fragments.db",
        ("Unke et al., Sci. Adv. (2024), Biomolecular dynamics with machine-learned quantum-mechanical force fields",),
        "https://zenodo.org/records/10720941",
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
        "table MatPES-PBE-2025.2-charges.json --option mapping=matpes-pbe",
        ("Kaplan et al., arXiv 2503.04070 (2025)",),
        "https://github.com/materialyzeai/matpes",
    ),
}
