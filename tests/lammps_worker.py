"""What a rank of LAMMPS does in tests: `mpiexec -n N python lammps_worker.py FOLDER`. Rank 0 writes what came out.

FOLDER has the model files that `test_lammps.folder` makes.
"""

import json
import os
import pickle
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lammps_models import SYMBOLS, crystal
from multifid.apply import lammps

FOLDER = Path(sys.argv[1])
VOIGT = ("pxx", "pyy", "pzz", "pyz", "pxz", "pxy")  # of ASE
BAR = 1 / 1.6021765e6  # eV/angstrom^3, as LAMMPS has it in units metal


def started(atoms=None, pair=("a.mfid", "a"), options="dtype float64", coeff="H C O", setup=(), style="multifid {}"):
    """LAMMPS with a crystal and a pair style."""
    atoms = crystal() if atoms is None else atoms
    lmp = lammps.start("-screen", "none", "-log", "none", "-nocite")
    for line in ("units metal", "atom_style atomic", "atom_modify map array", "boundary p p p", *setup):
        lmp.command(line)
    a = atoms.cell.array
    lmp.command(
        f"region box prism 0 {a[0, 0]:.17g} 0 {a[1, 1]:.17g} 0 {a[2, 2]:.17g} "
        f"{a[1, 0]:.17g} {a[2, 0]:.17g} {a[2, 1]:.17g} units box"
    )
    lmp.command("create_box 3 box")
    types = [1 + SYMBOLS.index(s) for s in atoms.get_chemical_symbols()]
    lmp.create_atoms(len(atoms), list(range(1, len(atoms) + 1)), types, atoms.positions.ravel().tolist())
    for k, mass in enumerate((1.008, 12.011, 15.999)):
        lmp.command(f"mass {k + 1} {mass}")
    model = " ".join([str(FOLDER / pair[0]), *pair[1:], options])
    lmp.command(f"pair_style {style.format(model)}")
    lmp.command(f"pair_coeff * * {coeff}")
    return lmp


def long_box():
    atoms = crystal()
    atoms.cell[0] *= 4
    return atoms


def measured(lmp) -> dict:
    """Energy, forces and stress as the calculator says them, energies of atoms, atoms of every rank."""
    lmp.command("compute each all pe/atom")
    lmp.command("compute of_atoms all stress/atom NULL virial")
    lmp.command("compute virial all pressure NULL virial")
    lmp.command("compute total all reduce sum c_of_atoms[1] c_of_atoms[2] c_of_atoms[3] c_of_atoms[4]")
    lmp.command("thermo_style custom step pe c_virial[*] c_total[*]")
    lmp.command("run 0")
    return state(lmp) | {
        "energies": gathered(lmp, "c_each", 1),
        "virial": [lmp.extract_compute("virial", 0, 1)[k] * -BAR for k in (0, 1, 2, 5, 4, 3)],
        "virial of atoms": [lmp.extract_compute("total", 0, 1)[k] * BAR for k in range(4)],
        "ranks": lmp.extract_setting("world_size"),
    }


def gathered(lmp, name, width) -> list:
    """Of all atoms, by their number."""
    return np.array(lmp.gather(name, 1, width)).reshape(-1, width).tolist()


def state(lmp) -> dict:
    return {
        "energy": lmp.get_thermo("pe"),
        "positions": gathered(lmp, "x", 3),
        "forces": gathered(lmp, "f", 3),
        "box": lmp.extract_box()[:5],
    }


def single():
    with rows_of_passes() as rows:
        return measured(started()) | {"rows": rows}


def one_sided():
    """All atoms in one corner of a long box: at least one of several ranks has none."""
    lmp = started(long_box(), setup=["processors * 1 1"])
    lmp.command("run 0")
    local = lmp.extract_global("nlocal")
    (FOLDER / f"local-{lmp.extract_setting('world_size')}-{lmp.extract_setting('world_rank')}").write_text(str(local))
    return measured(lmp)


def painn():
    return measured(started(pair=("painn.mfid", "b")))


def direct():
    return measured(started(pair=("direct.mfid", "a")))


def single_precision():
    return measured(started(options=""))


def committee():
    lmp = started(options=f"dtype float64 committee {FOLDER / 'second.mfid'}")
    lmp.command("fix apart all pair 1 multifid deviation 1")
    return measured(lmp) | {"deviation": gathered(lmp, "f_apart", 1)}


def overlay():
    """Beside another style, which adds a repulsion."""
    lmp = started(style="hybrid/overlay zbl 2.5 4.0 multifid {}", coeff="multifid H C O", setup=["suffix off"])
    for a, za in enumerate((1, 6, 8)):
        for b, zb in enumerate((1, 6, 8)):
            if b >= a:
                lmp.command(f"pair_coeff {a + 1} {b + 1} zbl {za}.0 {zb}.0")
    lmp.command("run 0")
    both = np.array(gathered(lmp, "f", 3)), lmp.get_thermo("pe")
    lmp.command("pair_style zbl 2.5 4.0")
    for a, za in enumerate((1, 6, 8)):
        for b, zb in enumerate((1, 6, 8)):
            if b >= a:
                lmp.command(f"pair_coeff {a + 1} {b + 1} {za}.0 {zb}.0")
    lmp.command("run 0")
    alone = np.array(gathered(lmp, "f", 3)), lmp.get_thermo("pe")
    return {"forces": (both[0] - alone[0]).tolist(), "energy": both[1] - alone[1], "zbl": alone[1]}


def hybrid():
    """Oxygen belongs to another style: the model sees hydrogen and carbon only."""
    lmp = started(style="hybrid multifid {} zero 2.0", coeff="multifid H C NULL")
    lmp.command("pair_coeff * 3 zero")
    lmp.command("run 0")
    return state(lmp)


def real():
    lmp = started(setup=["units real"])
    lmp.command("run 0")
    return state(lmp)


def dynamics():
    """NVE, twice, with a restart between, and minimisation after it."""
    lmp = started()
    lmp.command("velocity all create 300 4928 loop geom")
    lmp.command("fix move all nve")
    lmp.command("timestep 0.0002")
    lmp.command("thermo_style custom step pe etotal press")
    lmp.command("run 0")
    first = state(lmp) | {"total": lmp.get_thermo("etotal")}
    lmp.command("run 10")
    lmp.command(f"write_restart {FOLDER}/restart")
    lmp.command("run 10")
    last = state(lmp) | {"total": lmp.get_thermo("etotal")}
    lmp.command("clear")
    for line in (f"read_restart {FOLDER}/restart", f"pair_style multifid {FOLDER}/a.mfid a dtype float64"):
        lmp.command(line)
    for line in ("pair_coeff * * H C O", "fix move all nve", "timestep 0.0002", "thermo_style custom step pe etotal"):
        lmp.command(line)
    lmp.command("run 10")
    again = state(lmp)
    lmp.command("unfix move")
    lmp.command("minimize 0.0 1e-3 60 200")
    return {"first": first, "last": last, "again": again, "minimised": state(lmp)}


def pressure():
    """NPT: the box follows the virial."""
    lmp = started()
    lmp.command("velocity all create 300 4928 loop geom")
    lmp.command("fix move all npt temp 300 300 0.02 tri 0 0 0.2")
    lmp.command("timestep 0.0002")
    lmp.command("run 5")
    return state(lmp)


def refused_briefly():
    """What two mistakes are answered with."""
    return refused("wrong task", "few types")


def refused(*names):
    """What each mistake is answered with."""
    a = FOLDER / "a.mfid"

    def coincide(lmp):
        lmp.command("create_atoms 1 single 1.0 1.0 1.0 units box")
        lmp.command("create_atoms 1 single 1.0001 1.0 1.0 units box")
        lmp.command("run 0")

    def again(lmp):
        lmp.command(f"pair_style multifid {a} a")
        lmp.command("run 0")

    def npt(lmp):
        lmp.command("fix move all npt temp 300 300 0.02 iso 0 0 0.2")
        lmp.command("run 0")

    cases = {
        "no model": lambda: started(pair=("none.mfid", "a")),
        "no task": lambda: started(pair=("a.mfid",), options=""),
        "wrong task": lambda: started(pair=("a.mfid", "z")),
        "option": lambda: started(options="dtyp float64"),
        "dtype": lambda: started(options="dtype half"),
        "few types": lambda: started(coeff="H C"),
        "no element": lambda: started(coeff="H C Q"),
        "unseen": lambda: started(coeff="H C Fe"),
        "all null": lambda: started(coeff="NULL NULL NULL"),
        "newton": lambda: started(setup=["newton off"]).command("run 0"),
        "triplets": lambda: started(pair=("angular.mfid", "a")),
        "coincident": lambda: coincide(started()),
        "direct pressure": lambda: npt(started(pair=("direct.mfid", "a"))),
        "hidden bonds": lambda: started(setup=["atom_style bond"]).command("run 0"),
        "no types": lambda: again(started()),
        "units": lambda: started(setup=["units lj"]).command("run 0"),
    }
    said = {}
    for name in names or cases:
        case = cases[name]
        try:
            case()
            said[name] = "nothing"
        except Exception as error:
            said[name] = str(error)
    return said


def one_rank_fails():
    """The last rank fails in the middle of a pass, while others wait for its rows."""
    from multifid.apply.lammps import pair

    lmp = started()
    lmp.command("run 0")
    rank, ranks = lmp.extract_setting("world_rank"), lmp.extract_setting("world_size")
    exchange, calls = pair.PluginLink._exchange, []

    def fails(self, rows, backward):
        calls.append(backward)
        if rank == ranks - 1 and backward:
            raise RuntimeError("planted")
        return exchange(self, rows, backward)

    pair.PluginLink._exchange = fails
    try:
        lmp.command("run 1")
        said = "nothing"
    except Exception as error:
        said = str(error)
    finally:
        pair.PluginLink._exchange = exchange
    (FOLDER / f"failed-{ranks}-{rank}").write_text(said)
    return measured(started())


class MLIAPData:
    """What ML-IAP with KOKKOS hands to an object, made of what the pair style hands to Python."""

    def __init__(self, bridge, nlocal, nall, types, pairs, i, j, r):
        def array(pointer, n):
            return np.ctypeslib.as_array(pointer, (n,)) if n else np.zeros(0, int)

        self.bridge, self.nlocal, self.ntotal, self.npairs = bridge, nlocal, nall, pairs
        self.elems = array(types, nall) - 1
        mixed = np.random.default_rng(0).permutation(pairs)  # ML-IAP promises no order
        self.mixed, self.pair_i, self.pair_j = mixed, array(i, pairs)[mixed], array(j, pairs)[mixed]
        self.rij = np.array(array(r, 3 * pairs), float).reshape(-1, 3)[mixed]
        self.eatoms, self.energy = np.zeros(nlocal), 0.0

    def _travel(self, source, target, width, backward):
        rows = source.double().clone()
        if self.bridge.exchange(self.bridge.pair, backward, rows.data_ptr(), width):
            raise RuntimeError("another rank")
        target.copy_(rows)

    def forward_exchange(self, source, target, width):
        self._travel(source, target, width, 0)

    def reverse_exchange(self, source, target, width):
        self._travel(source, target, width, 1)

    def update_pair_forces_gpu(self, forces):
        self.forces = np.zeros((self.npairs, 3))
        self.forces[self.mixed] = forces.numpy()


@contextmanager
def rows_of_passes():
    """Rows of atoms, those of other ranks included, that the model is given in each pass."""
    from multifid.apply.lammps import rank

    rows, plain = [], rank.share_of

    def share_of(potential, task, graph, own):
        rows.append(graph.atoms)
        return plain(potential, task, graph, own)

    rank.share_of = share_of
    try:
        yield rows
    finally:
        rank.share_of = plain


@contextmanager
def computed_by(made):
    """The pair style asks an ML-IAP object in place of its own model: its pairs and exchange feed the object."""
    from multifid.apply.lammps import pair

    def compute(self, nlocal, nall, types, nown, own, npairs, i, j, r, energies, slopes, forces, deviations):
        data = MLIAPData(self.bridge, nlocal, nall, types, npairs, i, j, r)
        made.compute_forces(data)
        assert abs(data.energy - data.eatoms.sum()) < 1e-9
        if nown:
            np.ctypeslib.as_array(energies, (nown,))[:] = data.eatoms
        if npairs:
            np.ctypeslib.as_array(slopes, (3 * npairs,))[:] = data.forces.ravel()

    plain = pair.Style.compute
    pair.Style.compute = compute
    try:
        yield
    finally:
        pair.Style.compute = plain


def mliap():
    """The ML-IAP object, pickled and read again, over ranks."""
    from multifid.apply.lammps import mliap as module

    made = pickle.loads(pickle.dumps(module.MLIAP(FOLDER / "a.mfid", "a", SYMBOLS, "float64")))
    with computed_by(made):
        lmp = started(long_box(), setup=["processors * 1 1"])
        said = ""
        try:
            module.load_into(lmp, made)
        except ValueError as error:
            said = str(error)
        return measured(lmp) | {"too old": said}


def external():
    """fix external in place of a pair style; dynamics too."""
    import multifid
    from multifid.apply.lammps.external import attach

    lmp = started(style="zero 4.0", coeff="")
    lmp.command("fix model all external pf/callback 1 1")
    lmp.command("fix_modify model energy yes virial yes")
    attach(lmp, "model", multifid.load(FOLDER / "a.mfid", precision="fp64"), "a", SYMBOLS)
    lmp.command("compute virial all pressure NULL virial")
    lmp.command("thermo_style custom step pe c_virial[*]")
    lmp.command("run 0")
    found = state(lmp)
    found["virial"] = [lmp.extract_compute("virial", 0, 1)[k] * -BAR for k in (0, 1, 2, 5, 4, 3)]
    lmp.command("fix move all nve")
    lmp.command("timestep 0.0002")
    lmp.command("run 5")
    return found | {"later": state(lmp)}


SCENES = (single, one_sided, painn, direct, single_precision, committee, overlay, hybrid, real, dynamics, pressure)
SCENES += (mliap, external, refused, refused_briefly, one_rank_fails)

if __name__ == "__main__":
    wanted = sys.argv[2:]
    found = {}
    for scene in SCENES:
        if not wanted or scene.__name__ in wanted:
            found[scene.__name__] = scene()
    ranks = int(os.environ.get("PMI_SIZE", "1"))
    if int(os.environ.get("PMI_RANK", "0")) == 0:
        (FOLDER / f"found-{ranks}.json").write_text(json.dumps(found))
