// The edges of a layer of PaiNN (native/painn.h) as two operations of compiled files; `painn.py` declares them.
#include "tensors.h"

#include "painn.h"

using namespace multifid;

namespace {

PaiNNCall call_of(Handle i, Handle j, Handle phi, Handle v, Handle r, Handle b, Handle u, Handle weight, Handle bias) {
  PaiNNCall p = {};
  p.edges = size(i, 0), p.atoms = size(phi, 0), p.H = size(phi, 2), p.R = size(b, 1), p.threads = threads();
  p.i = whole(i), p.j = whole(j);
  p.phi = data(phi), p.v = data(v), p.r = data(r), p.b = data(b), p.u = data(u);
  p.weight = data(weight), p.bias = data(bias);
  return p;
}

} // namespace

extern "C" {

AOTITorchError aoti_torch_cpu_multifid_painn(Handle i, Handle j, Handle phi, Handle v, Handle r, Handle b, Handle u,
                                             Handle weight, Handle bias, Handle *sum_m) {
  PaiNNCall p = call_of(i, j, phi, v, r, b, u, weight, bias);
  p.sum_m = make(sum_m, {p.atoms, 4, p.H}, true);
  PaiNN<Full<Number>>(p).forward();
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_multifid_painn_slopes(Handle i, Handle j, Handle phi, Handle v, Handle r, Handle b,
                                                    Handle u, Handle weight, Handle bias, Handle G_m, Handle *g_phi,
                                                    Handle *g_v, Handle *g_r, Handle *g_b, Handle *g_u) {
  PaiNNCall p = call_of(i, j, phi, v, r, b, u, weight, bias);
  p.G_m = data(G_m);
  p.g_phi = make(g_phi, {p.atoms, 3, p.H}, true), p.g_v = make(g_v, {p.atoms, 3, p.H}, true);
  p.g_r = make(g_r, {p.edges, 3}, true), p.g_b = make(g_b, {p.edges, p.R}, true), p.g_u = make(g_u, {p.edges, 1}, true);
  PaiNN<Full<Number>>(p).backward();
  return AOTI_TORCH_SUCCESS;
}
}
