// What Python calls. Numbers of types: 0 float32, 1 float64, 2 bfloat16 products with float32 sums, 3 the same where the
// processor has none. Numbers of functions: 0 forward, 1 backward, 2 tangent, 3 again (egnn.h).
#include "egnn.h"
#include "mlp.h"
#include "painn.h"
#include "painn_atoms.h"
#include "pairs.h"

using namespace multifid;

template <template <class> class Layer, class Type, class Call> void run_as(const Call &call, int what) {
  Layer<Type> layer(call);
  if (what == 0) layer.forward();
  if (what == 1) layer.backward();
  if (what == 2) layer.tangent();
  if (what == 3) layer.again();
}

template <template <class> class Layer, class Call> void run(const Call &call, int what) {
  if (call.type == 0) return run_as<Layer, Full<float>>(call, what);
  if (call.type == 1) return run_as<Layer, Full<double>>(call, what);
#if defined(MULTIFID_AMX)
  static const bool allowed = Tiled::allowed();
  if (call.type == 2 && allowed) return run_as<Layer, Tiled>(call, what);
#endif
  run_as<Layer, Rounded>(call, what);
}

extern "C" {

// Wide layers are all products of matrices: with short vectors a library's are faster than those here.
long multifid_widest() { return BYTES == 64 ? STRIDES[sizeof(STRIDES) / sizeof(long) - 1] - 16 : 512; }
long multifid_maps() { return MAPS; }
void multifid_egnn(const EGNNCall *call, int what) { run<EGNN>(*call, what); }
void multifid_mlp(const MLPCall *call, int what) { run<MLP>(*call, what); }
void multifid_painn_atoms(const PaiNNAtomsCall *call, int what) { run<PaiNNAtoms>(*call, what); }
void multifid_pairs(const PairsCall *call, int what) {
  call->type == 1 ? run_as<Pairs, Full<double>>(*call, what) : run_as<Pairs, Full<float>>(*call, what);
}
void multifid_painn(const PaiNNCall *call, int what) {
  call->type == 1 ? run_as<PaiNN, Full<double>>(*call, what) : run_as<PaiNN, Full<float>>(*call, what);
}
}
