// What Python calls. Numbers of types: 0 float32, 1 float64, 2 bfloat16 products with float32 sums (in tiles, or in pairs,
// as the processor has them), 3 the same of rounded numbers. Numbers of functions: 0 forward, 1 backward, 2 tangent,
// 3 again (egnn.h). Many calls are backward passes for inputs alone, and differ in the gradients that they are given and make.
#include "egnn.h"
#include "mlp.h"
#include "painn.h"
#include "painn_atoms.h"
#include "pairs.h"
#include "soap.h"

using namespace multifid;

template <template <class> class Layer, class Type, class Call> void run_as(const Call *calls, int what, long many) {
  if constexpr (std::is_same<Call, EGNNCall>::value)
    if (many > 1) return Layer<Type>::backward(calls, many);
  for (long k = 0; k < many; ++k) {
    Layer<Type> layer(calls[k]);
    if (what == 0) layer.forward();
    if (what == 1) layer.backward();
    if (what == 2) layer.tangent();
    if (what == 3) layer.again();
  }
}

template <template <class> class Layer, class Call> void run(const Call *calls, int what, long many) {
  if (calls->type == 0) return run_as<Layer, Full<float>>(calls, what, many);
  if (calls->type == 1) return run_as<Layer, Full<double>>(calls, what, many);
#if defined(MULTIFID_AMX)
  static const bool allowed = Tiled::allowed();
  if (calls->type == 2 && allowed) return run_as<Layer, Tiled>(calls, what, many);
#endif
#if defined(__AVX512BF16__)
  if (calls->type == 2) return run_as<Layer, Paired>(calls, what, many);
#endif
  run_as<Layer, Rounded>(calls, what, many);
}

extern "C" {

// Wide layers are all products of matrices: with short vectors a library's are faster than those here.
long multifid_widest() { return BYTES == 64 ? STRIDES[sizeof(STRIDES) / sizeof(long) - 1] - 16 : 512; }
long multifid_maps() { return MAPS; }
void multifid_egnn(const EGNNCall *calls, int what, int many) { run<EGNN>(calls, what, many); }
void multifid_mlp(const MLPCall *calls, int what, int many) { run<MLP>(calls, what, many); }
void multifid_painn_atoms(const PaiNNAtomsCall *calls, int what, int many) { run<PaiNNAtoms>(calls, what, many); }
void multifid_soap(const SOAPCall *call) { call->type == 1 ? SOAP<double>(*call).update() : SOAP<float>(*call).update(); }
void multifid_twins(long edges, long atoms, const int64_t *i, const int64_t *j, const void *r, int64_t *twin, long type) {
  if (type == 1) find_twins(edges, atoms, i, j, static_cast<const double *>(r), twin);
  else find_twins(edges, atoms, i, j, static_cast<const float *>(r), twin);
}
void multifid_pairs(const PairsCall *calls, int what, int many) {
  calls->type == 1 ? run_as<Pairs, Full<double>>(calls, what, many) : run_as<Pairs, Full<float>>(calls, what, many);
}
void multifid_painn(const PaiNNCall *calls, int what, int many) {
  calls->type == 1 ? run_as<PaiNN, Full<double>>(calls, what, many) : run_as<PaiNN, Full<float>>(calls, what, many);
}
}
