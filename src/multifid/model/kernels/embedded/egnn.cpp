// The edges of a layer of EGNN (native/egnn.h) as two operations of compiled files; `egnn.py` declares them.
#include "tensors.h"

#include "egnn.h"

using namespace multifid;

namespace {

EGNNCall call_of(Handle i, Handle j, Handle a, Handle c, Handle v, Handle r, Handle b, Handle u, Handle y, Handle pair,
                 Handle message, Handle message_bias, Handle gate, Handle gate_bias, Handle move, Handle move_bias,
                 Handle weight, Handle weight_bias, double per_area, int64_t angles) {
  EGNNCall p = {};
  p.edges = size(i, 0), p.atoms = size(a, 0), p.K = size(a, 1), p.C = size(v, 2), p.R = size(b, 1);
  p.T = size(weight, 0) - p.C, p.angles = angles, p.threads = threads(), p.per_area = per_area;
  p.i = whole(i), p.j = whole(j);
  p.a = data(a), p.c = data(c), p.v = data(v), p.r = data(r), p.b = data(b), p.u = data(u), p.y = data(y);
  p.pair = data(pair), p.message = data(message), p.message_bias = data(message_bias);
  p.gate = data(gate), p.gate_bias = data(gate_bias), p.move = data(move), p.move_bias = data(move_bias);
  p.weight = data(weight), p.weight_bias = data(weight_bias);
  return p;
}

} // namespace

extern "C" {

AOTITorchError aoti_torch_cpu_multifid_egnn(
    Handle i, Handle j, Handle a, Handle c, Handle v, Handle r, Handle b, Handle u, Handle y, Handle pair, Handle message,
    Handle message_bias, Handle gate, Handle gate_bias, Handle move, Handle move_bias, Handle weight, Handle weight_bias,
    double per_area, int64_t angles, Handle *sum_m, Handle *sum_v, Handle *sum_t, Handle *first, Handle *second,
    Handle *third, Handle *gates, Handle *phi) {
  EGNNCall p = call_of(i, j, a, c, v, r, b, u, y, pair, message, message_bias, gate, gate_bias, move, move_bias, weight,
                       weight_bias, per_area, angles);
  p.sum_m = make(sum_m, {p.atoms, p.K}, true), p.sum_v = make(sum_v, {p.atoms, 3, p.C}, true);
  p.sum_t = make(sum_t, {p.atoms, 5, p.T}, true);
  p.first = make(first, {p.edges, p.K}, false), p.second = make(second, {p.edges, p.K}, false);
  p.third = make(third, {p.edges, p.K}, false), p.gates = make(gates, {p.edges}, false);
  p.phi = make(phi, {p.edges, p.C + p.T}, false);
  EGNN<Full<Number>>(p).forward();
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_cpu_multifid_egnn_slopes(
    Handle i, Handle j, Handle a, Handle c, Handle v, Handle r, Handle b, Handle u, Handle y, Handle pair, Handle message,
    Handle message_bias, Handle gate, Handle gate_bias, Handle move, Handle move_bias, Handle weight, Handle weight_bias,
    Handle first, Handle second, Handle third, Handle gates, Handle phi, Handle G_m, Handle G_v, Handle G_t,
    double per_area, int64_t angles, Handle *g_a, Handle *g_c, Handle *g_v, Handle *g_r, Handle *g_b, Handle *g_u,
    Handle *g_y) {
  EGNNCall p = call_of(i, j, a, c, v, r, b, u, y, pair, message, message_bias, gate, gate_bias, move, move_bias, weight,
                       weight_bias, per_area, angles);
  p.first = data(first), p.second = data(second), p.third = data(third), p.gates = data(gates), p.phi = data(phi);
  p.G_m = data(G_m), p.G_v = data(G_v), p.G_t = data(G_t);
  p.g_a = make(g_a, {p.atoms, p.K}, true), p.g_c = make(g_c, {p.atoms, p.K}, true);
  p.g_v = make(g_v, {p.atoms, 3, p.C}, true);
  p.g_r = make(g_r, {p.edges, 3}, false), p.g_b = make(g_b, {p.edges, p.R}, false), p.g_u = make(g_u, {p.edges, 1}, false);
  void *of_tensors = make(g_y, {size(y, 0), 5}, false);
  if (p.T) p.g_y = of_tensors;
  EGNN<Full<Number>>(p).backward();
  return AOTI_TORCH_SUCCESS;
}
}
