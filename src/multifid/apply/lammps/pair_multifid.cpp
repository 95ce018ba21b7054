/* SPDX-License-Identifier: MIT

   pair_style multifid MODEL TASK: models of the Python package multifid in LAMMPS, on any number of MPI ranks.

   This one file is under the MIT licence, text below, and not under that of the package (Apache-2.0): it includes headers
   of LAMMPS, which is GPL-2.0-only, and MIT is compatible with that. A library compiled from it is a work that the GPL
   of LAMMPS covers. It is built on the machine of its user by `multifid lammps build` and never distributed as a binary.

   Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
   documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
   rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
   persons to whom the Software is furnished to do so, subject to the following conditions: The above copyright notice
   and this permission notice shall be included in all copies or substantial portions of the Software.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
   WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
   COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
   OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

   What happens where: LAMMPS owns atoms, ghosts, neighbour lists, forces. Python (apply/lammps/pair.py) computes, for
   the pairs of a rank, the energies of its own atoms and the slope of the total energy along every pair; between two
   layers of the model it asks here for an exchange of features of atoms with the other ranks, and in the backward
   pass for the exchange of gradients back. Python is the one that drives LAMMPS, or is started here within `lmp`.

   Python sees rows: one for each atom of this rank, then one for each atom of another rank that has ghosts here. All
   ghosts of an atom, its periodic images, share its row, so that one rank alone has no ghosts and exchanges nothing.

   Every call of Python and every exchange ends, respectively begins, with an agreement of all ranks on whether all are
   well, so that an error on one rank is an error on all, with its reason, and none waits for ever. */

#include "atom.h"
#include "comm.h"
#include "error.h"
#include "fix.h"
#include "force.h"
#include "lammps.h"
#include "memory.h"
#include "modify.h"
#include "neigh_list.h"
#include "neighbor.h"
#include "pair.h"
#include "update.h"
#include "utils.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <map>
#include <mpi.h>
#include <string>
#include <utility>
#include <vector>

using namespace LAMMPS_NS;

namespace {

constexpr int MESSAGE = 4096;

/* What both sides know of each other; apply/lammps/pair.py has the same table. */
struct Bridge {
  // of this side
  void *pair;
  int (*exchange)(void *pair, int backward, double *rows, int width);    // 0, or 1 where another rank has failed
  // of Python; each returns 0, or 1 with a reason in `message`
  int (*open)(int narg, char **arg);                // arguments of pair_style
  int (*types)(int ntypes, char **symbols);         // symbols of the types, NULL where a type is another style's
  int (*system)(const double *counts);              // atoms of each type, all ranks together
  int (*compute)(int nlocal, int nrows, const int *type, int nown, const int *own, int npairs, const int *i,
                 const int *j, const double *r, double *energies, double *slopes, double *forces, double *deviations);
  int (*close)();
  // of the model
  double cutoff;          // angstrom
  int width;              // numbers per atom in the widest exchange
  int conservative;       // 1: slopes of pairs; 0: forces of atoms
  int committee;          // models
  // of the run
  int alone;              // 1: there is no other rank
  char message[MESSAGE];
};

/* Python's functions, from the process that it runs in, or from its library. */
struct Interpreter {
  int (*is_initialized)();
  void (*initialize)(int);
  void *(*save_thread)();
  int (*ensure)();
  void (*release)(int);
  int (*run)(const char *, void *);
  void (*set_program_name)(const wchar_t *);

  std::string start()    // an empty text, or why there is none
  {
    void *where = RTLD_DEFAULT;
    if (!dlsym(where, "Py_IsInitialized")) {
      where = dlopen(MULTIFID_LIBPYTHON, RTLD_NOW | RTLD_GLOBAL);
      if (!where)
        return std::string("Python's library cannot be loaded (") + dlerror() +
            "): start LAMMPS from Python, or build the plugin again in an environment that has it";
    }
    bool all = find(where, "Py_IsInitialized", is_initialized) && find(where, "Py_InitializeEx", initialize) &&
        find(where, "PyEval_SaveThread", save_thread) && find(where, "PyGILState_Ensure", ensure) &&
        find(where, "PyGILState_Release", release) && find(where, "PyRun_SimpleStringFlags", run);
    if (!all) return "functions of Python are missing in the library " MULTIFID_LIBPYTHON;
    if (is_initialized()) return "";
    // The interpreter of the environment that the plugin was built in: with it come its packages.
    if (!find(where, "Py_SetProgramName", set_program_name))
      return "this version of Python cannot be started here: start LAMMPS from Python";
    static std::wstring name;
    for (const char *c = MULTIFID_PYTHON; *c; ++c) name += static_cast<wchar_t>(static_cast<unsigned char>(*c));
    set_program_name(name.c_str());
    initialize(0);
    save_thread();
    return "";
  }

  bool execute(const std::string &text)
  {
    int state = ensure();
    int failed = run(text.c_str(), nullptr);
    release(state);
    return failed == 0;
  }

 private:
  template <class F> bool find(void *where, const char *name, F &function)
  {
    void *found = dlsym(where, name);
    std::memcpy(&function, &found, sizeof found);
    return found != nullptr;
  }
};

}    // namespace

namespace LAMMPS_NS {

class PairMultifid : public Pair {
 public:
  PairMultifid(LAMMPS *);
  ~PairMultifid() override;
  void settings(int, char **) override;
  void coeff(int, char **) override;
  void init_style() override;
  double init_one(int, int) override;
  void compute(int, int) override;
  int pack_forward_comm(int, int *, double *, int, int *) override;
  void unpack_forward_comm(int, int, double *) override;
  int pack_reverse_comm(int, int, double *) override;
  void unpack_reverse_comm(int, int *, double *) override;
  void *extract(const char *, int &) override;
  void *extract_peratom(const char *, int &) override;
  double memory_usage() override;

 private:
  Bridge bridge{};
  bool opened = false, told = false;
  double *rows = nullptr;    // of the exchange that is under way, by `row_of`: (nrows, width)
  int width = 0;
  bool rows_known = false;
  std::vector<int> row_of;    // (nall): the row of each atom and ghost
  std::vector<int> first_of;    // (nrows): the atom, or first of the ghosts, that has a row
  std::vector<int> own, pair_i, pair_j, senders, types;    // senders: rows of pair_j; types: (nrows)
  std::vector<double> r, energies, slopes, direct, deviations;
  std::vector<int> mapped;    // by type: 1 where it is an element here
  int deviation_asked = 0;

  static int exchange(void *, int, double *, int);
  bool all_well(bool);
  void agree(bool, const char *);
  void refuse_pressure();
  void list_rows();
  void list_pairs();
  void add_slopes(double);
  void add_direct(double);
  double unit();
};

PairMultifid::PairMultifid(LAMMPS *lmp) : Pair(lmp)
{
  single_enable = 0;
  restartinfo = 0;
  one_coeff = 1;
  manybody_flag = 1;
  no_virial_fdotr_compute = 1;
  centroidstressflag = CENTROID_NOTAVAIL;
  bridge.pair = this;
  bridge.exchange = &PairMultifid::exchange;
}

PairMultifid::~PairMultifid()
{
  if (opened) bridge.close();
  if (allocated) {
    memory->destroy(setflag);
    memory->destroy(cutsq);
  }
}

/* Whether every rank is. Called by all, or not at all. */
bool PairMultifid::all_well(bool well)
{
  int here = well ? comm->nprocs : comm->me, first = 0;
  MPI_Allreduce(&here, &first, 1, MPI_INT, MPI_MIN, world);
  if (first == comm->nprocs) return true;
  MPI_Bcast(bridge.message, MESSAGE, MPI_CHAR, first, world);
  told = true;
  if (comm->nprocs > 1) {
    const std::string text = std::string(bridge.message).substr(0, MESSAGE - 32);
    std::snprintf(bridge.message, MESSAGE, "%s (rank %d)", text.c_str(), first);
  }
  return false;
}

/* After a call of Python: an error on one rank is one on all. */
void PairMultifid::agree(bool well, const char *what)
{
  // Where an exchange was under way, all have heard already.
  if (told || !all_well(well)) error->all(FLERR, "{}: {}", what, bridge.message);
}

void PairMultifid::settings(int narg, char **arg)
{
  if (narg < 2)
    error->all(FLERR,
               "pair_style multifid needs a model and a task: pair_style multifid MODEL TASK "
               "[dtype float32|float64] [device cpu|cuda|cuda:N] [charge E] [spin MULTIPLICITY] [committee MODEL...]");
  if (opened) bridge.close();
  opened = told = false;
  if (allocated)    // another model: types must be mapped anew
    for (int a = 1; a <= atom->ntypes; a++)
      for (int b = 1; b <= atom->ntypes; b++) setflag[a][b] = 0;
  Interpreter python{};
  std::string why = python.start();
  bool well = why.empty();
  if (well) {
    char text[256];
    std::snprintf(text, sizeof text, "import multifid.apply.lammps.pair as _p; _p.connect(%llu)",
                  static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(&bridge)));
    well = python.execute(text);
    if (!well) why = "Python cannot import multifid, as it says above; built for " MULTIFID_PYTHON;
  }
  std::snprintf(bridge.message, MESSAGE, "%s", why.c_str());
  agree(well, "pair_style multifid");
  opened = true;
  agree(bridge.open(narg, arg) == 0, "pair_style multifid");
  comm_forward = comm_reverse = bridge.width;
}

void PairMultifid::coeff(int narg, char **arg)
{
  const int n = atom->ntypes;
  if (!allocated) {
    allocated = 1;
    memory->create(setflag, n + 1, n + 1, "pair:setflag");
    memory->create(cutsq, n + 1, n + 1, "pair:cutsq");
  }
  if (narg < 2 || std::strcmp(arg[0], "*") != 0 || std::strcmp(arg[1], "*") != 0)
    error->all(FLERR, "pair_coeff of multifid must begin with * *");
  if (narg != n + 2)
    error->all(FLERR,
               "pair_coeff * * of multifid needs one element for each of the {} atom types, in their order, "
               "as `pair_coeff * * H C O`; {} are given",
               n, narg - 2);
  agree(bridge.types(n, arg + 2) == 0, "pair_coeff");
  mapped.assign(n + 1, 0);
  for (int t = 1; t <= n; t++) mapped[t] = std::strcmp(arg[t + 1], "NULL") != 0;
  for (int a = 1; a <= n; a++)
    for (int b = 1; b <= n; b++) setflag[a][b] = b >= a && mapped[a] && mapped[b];
}

double PairMultifid::unit()
{
  if (std::strcmp(update->unit_style, "metal") == 0) return 1.0;
  return utils::get_conversion_factor(utils::ENERGY, utils::METAL2REAL);
}

void PairMultifid::init_style()
{
  const std::string units = update->unit_style;
  if (units != "metal" && units != "real")
    error->all(FLERR, "pair_style multifid needs units metal or real, not {}", units);
  if (force->newton_pair == 0) error->all(FLERR, "pair_style multifid needs `newton on`");
  if (atom->molecular != Atom::ATOMIC)
    for (int k = 1; k < 4; k++)
      if (force->special_lj[k] != 1.0 || force->special_coul[k] != 1.0)
        error->all(FLERR,
                   "pair_style multifid sees all pairs, also bonded ones, which LAMMPS would leave out: "
                   "say `special_bonds lj/coul 1 1 1`");
  if (!bridge.conservative) refuse_pressure();
  neighbor->add_request(this, NeighConst::REQ_FULL);
  const int n = atom->ntypes;
  std::vector<double> here(n + 1, 0.0), all(n + 1, 0.0);
  for (int k = 0; k < atom->nlocal; k++) here[atom->type[k]] += 1.0;
  MPI_Allreduce(here.data(), all.data(), n + 1, MPI_DOUBLE, MPI_SUM, world);
  bridge.alone = comm->nprocs == 1;
  rows_known = false;
  agree(bridge.system(all.data() + 1) == 0, "pair_style multifid");
}

/* Forces that are predicted directly are no gradient of an energy: there is no virial to steer a box by. */
void PairMultifid::refuse_pressure()
{
  for (Fix *fix : modify->get_fix_list())
    for (const char *style : {"npt", "nph", "press/", "box/relax"})
      if (std::strstr(fix->style, style))
        error->all(FLERR,
                   "fix {} follows the pressure, and the forces of this model are predicted directly, so that it has "
                   "none: take a model of `model.branch.forces: conservative`",
                   fix->style);
  if (comm->me == 0)
    error->warning(FLERR,
                   "pair_style multifid: the forces of this model are predicted directly. They are no gradient of its "
                   "energy, so that total energy is not conserved, and the pressure has its kinetic part only");
}

double PairMultifid::init_one(int, int)
{
  return bridge.cutoff;
}

/* Which ghosts are of one atom: its owner says who it is, by an exchange in which every atom and ghost has a row. */
void PairMultifid::list_rows()
{
  const int nlocal = atom->nlocal, nall = nlocal + atom->nghost;
  row_of.resize(nall);
  for (int k = 0; k < nall; k++) row_of[k] = k;
  first_of = row_of;
  std::vector<double> owners(2 * static_cast<size_t>(nall) + 1, 0.0);    // rank, and number there
  for (int k = 0; k < nlocal; k++) {
    owners[2 * k] = comm->me;
    owners[2 * k + 1] = k;
  }
  rows = owners.data();
  width = 2;
  comm->forward_comm(this, width);
  rows = nullptr;
  std::map<std::pair<int, int>, int> known;    // rows of other ranks' atoms
  first_of.resize(nlocal);
  for (int k = nlocal; k < nall; k++) {
    const int rank = static_cast<int>(owners[2 * k]), number = static_cast<int>(owners[2 * k + 1]);
    if (rank == comm->me) {
      row_of[k] = number;
      continue;
    }
    const auto [found, is_new] = known.emplace(std::pair(rank, number), static_cast<int>(first_of.size()));
    if (is_new) first_of.push_back(k);
    row_of[k] = found->second;
  }
  rows_known = true;
}

/* Own atoms of mapped types in ascending order, and their pairs within the cutoff. */
void PairMultifid::list_pairs()
{
  double **x = atom->x;
  const double cutoff2 = bridge.cutoff * bridge.cutoff;
  own.clear();
  pair_i.clear();
  pair_j.clear();
  senders.clear();
  r.clear();
  std::vector<int> place(atom->nlocal, -1);
  for (int k = 0; k < list->inum; k++) place[list->ilist[k]] = k;
  for (int i = 0; i < atom->nlocal; i++) {
    if (place[i] < 0 || !mapped[atom->type[i]]) continue;
    own.push_back(i);
    const int *neighbours = list->firstneigh[i];
    for (int n = 0; n < list->numneigh[i]; n++) {
      const int j = neighbours[n] & NEIGHMASK;
      if (!mapped[atom->type[j]]) continue;
      const double d[3] = {x[j][0] - x[i][0], x[j][1] - x[i][1], x[j][2] - x[i][2]};
      if (!(d[0] * d[0] + d[1] * d[1] + d[2] * d[2] < cutoff2)) continue;
      pair_i.push_back(i);
      pair_j.push_back(j);
      senders.push_back(row_of[j]);
      r.insert(r.end(), d, d + 3);
    }
  }
}

void PairMultifid::compute(int eflag, int vflag)
{
  ev_init(eflag, vflag);
  if (neighbor->ago == 0 || !rows_known) list_rows();    // ghosts change with the lists of neighbours, on all ranks
  list_pairs();
  types.clear();
  for (int first : first_of) types.push_back(atom->type[first]);
  const bool deviation = bridge.committee > 1 && deviation_asked;
  energies.assign(own.size() + 1, 0.0);
  slopes.assign(r.size() + 1, 0.0);
  direct.assign(3 * own.size() + 1, 0.0);
  if (deviation) deviations.assign(atom->nmax + 1, 0.0);
  int failed = bridge.compute(atom->nlocal, static_cast<int>(types.size()), types.data(), static_cast<int>(own.size()),
                              own.data(), static_cast<int>(pair_i.size()), pair_i.data(), senders.data(), r.data(),
                              energies.data(), slopes.data(), direct.data(), deviation ? deviations.data() : nullptr);
  agree(failed == 0, "pair_style multifid");
  const double factor = unit();
  if (eflag_either)
    for (size_t k = 0; k < own.size(); k++) {
      if (eflag_global) eng_vdwl += factor * energies[k];
      if (eflag_atom) eatom[own[k]] += factor * energies[k];
    }
  if (bridge.conservative)
    add_slopes(factor);
  else
    add_direct(factor);
}

/* g = dE/dr of the pair r = x_j - x_i: forces, and -r (x) g to the virial, half of it to either atom. */
void PairMultifid::add_slopes(double factor)
{
  double **f = atom->f;
  for (size_t p = 0; p < pair_i.size(); p++) {
    const int i = pair_i[p], j = pair_j[p];
    const double *d = &r[3 * p];
    const double g[3] = {factor * slopes[3 * p], factor * slopes[3 * p + 1], factor * slopes[3 * p + 2]};
    for (int k = 0; k < 3; k++) {
      f[i][k] += g[k];
      f[j][k] -= g[k];
    }
    if (!vflag_either) continue;
    const double v[6] = {-d[0] * g[0],
                         -d[1] * g[1],
                         -d[2] * g[2],
                         -0.5 * (d[0] * g[1] + d[1] * g[0]),
                         -0.5 * (d[0] * g[2] + d[2] * g[0]),
                         -0.5 * (d[1] * g[2] + d[2] * g[1])};
    for (int k = 0; k < 6; k++) {
      if (vflag_global) virial[k] += v[k];
      if (vflag_atom) {
        vatom[i][k] += 0.5 * v[k];
        vatom[j][k] += 0.5 * v[k];
      }
    }
  }
}

/* Forces that are predicted directly have no virial; `init_style` has said so. */
void PairMultifid::add_direct(double factor)
{
  for (size_t k = 0; k < own.size(); k++)
    for (int c = 0; c < 3; c++) atom->f[own[k]][c] += factor * direct[3 * k + c];
}

/* Called by Python between two layers: rows of ghosts from their owners, or gradients of ghosts back to them. */
int PairMultifid::exchange(void *self, int backward, double *rows, int width)
{
  auto *pair = static_cast<PairMultifid *>(self);
  if (!pair->all_well(true)) return 1;
  pair->rows = rows;
  pair->width = width;
  if (backward)
    pair->comm->reverse_comm(pair, width);
  else
    pair->comm->forward_comm(pair, width);
  pair->rows = nullptr;
  return 0;
}

int PairMultifid::pack_forward_comm(int n, int *list, double *buffer, int, int *)
{
  double *to = buffer;
  for (int k = 0; k < n; k++, to += width) std::copy_n(rows + static_cast<size_t>(row_of[list[k]]) * width, width, to);
  return n * width;
}

/* LAMMPS exchanges in several turns, and hands ghosts of one turn on in the next: the first ghost of an atom, which has
   its row, is received before another one is handed on, and in the reverse exchange gives its row away after it. */
void PairMultifid::unpack_forward_comm(int n, int first, double *buffer)
{
  for (int k = first; k < first + n; k++, buffer += width)
    if (first_of[row_of[k]] == k) std::copy_n(buffer, width, rows + static_cast<size_t>(row_of[k]) * width);
}

int PairMultifid::pack_reverse_comm(int n, int first, double *buffer)
{
  double *to = buffer;
  for (int k = first; k < first + n; k++, to += width) {
    if (first_of[row_of[k]] == k)
      std::copy_n(rows + static_cast<size_t>(row_of[k]) * width, width, to);
    else
      std::fill_n(to, width, 0.0);    // the row of another one has it
  }
  return n * width;
}

void PairMultifid::unpack_reverse_comm(int n, int *list, double *buffer)
{
  const double *from = buffer;
  for (int k = 0; k < n; k++, from += width)
    for (int c = 0; c < width; c++) rows[static_cast<size_t>(row_of[list[k]]) * width + c] += from[c];
}

/* For `fix NAME all pair N multifid deviation 1`: how far the models of a committee disagree on each force. */
void *PairMultifid::extract(const char *name, int &dim)
{
  dim = 0;
  return std::strcmp(name, "deviation_flag") == 0 && bridge.committee > 1 ? &deviation_asked : nullptr;
}

void *PairMultifid::extract_peratom(const char *name, int &columns)
{
  columns = 0;
  if (std::strcmp(name, "deviation") != 0 || bridge.committee < 2) return nullptr;
  if (deviations.size() < static_cast<size_t>(atom->nmax) + 1) deviations.resize(atom->nmax + 1, 0.0);
  return deviations.data();
}

double PairMultifid::memory_usage()
{
  return Pair::memory_usage() + sizeof(int) * (own.capacity() + 3.0 * pair_i.capacity() + row_of.capacity() + 2.0 * types.capacity()) +
      sizeof(double) * (2.0 * r.capacity() + 4.0 * energies.capacity());
}

}    // namespace LAMMPS_NS

/* What LAMMPS asks of a plugin; its header lammpsplugin.h is not among those that are installed. */
namespace {

struct Plugin {
  const char *version, *style, *name, *info, *author;
  union {
    void *(*v1)(void *);
    void *(*v2)(void *, int, char **);
  } creator;
  void *handle;
};

void *create(void *lmp)
{
  return new PairMultifid(static_cast<LAMMPS *>(lmp));
}

}    // namespace

extern "C" void lammpsplugin_init(void *lmp, void *handle, void *regfunc)
{
  using Register = void (*)(Plugin *, void *);
  auto *lammps = static_cast<LAMMPS *>(lmp);
  if (lammps->num_ver != MULTIFID_LAMMPS)
    lammps->error->all(FLERR,
                       "the plugin of multifid was built for LAMMPS {}, and this is {}: run `multifid lammps build` again",
                       MULTIFID_LAMMPS, lammps->num_ver);
  Plugin plugin{};
  plugin.version = lammps->version;
  plugin.style = "pair";
  plugin.name = "multifid";
  plugin.info = "interatomic potentials of the Python package multifid";
  plugin.author = "the authors of multifid";
  plugin.creator.v1 = &create;
  plugin.handle = handle;
  reinterpret_cast<Register>(regfunc)(&plugin, lmp);
}
