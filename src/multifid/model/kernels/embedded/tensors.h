// Tensors of torch behind its stable C interface, which compiled files and the libraries of all torch versions share.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <omp.h>

namespace multifid {

using Number = MULTIFID_NUMBER; // of this object file: float or double
using Handle = AtenTensorHandle;

inline int32_t dtype_of(float) { return aoti_torch_dtype_float32(); }
inline int32_t dtype_of(double) { return aoti_torch_dtype_float64(); }

inline void *data(Handle tensor) {
  void *found = nullptr;
  aoti_torch_get_data_ptr(tensor, &found);
  return found;
}
inline const int64_t *whole(Handle tensor) { return static_cast<const int64_t *>(data(tensor)); }
inline int64_t size(Handle tensor, int64_t dim) {
  int64_t found = 0;
  aoti_torch_get_size(tensor, dim, &found);
  return found;
}

// A new contiguous tensor, which the caller of the operation owns; `zeros`: cleared.
inline void *make(Handle *to, std::initializer_list<int64_t> sizes, bool zeros) {
  int64_t strides[8], count = 1, dim = sizes.size();
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = count;
    count *= sizes.begin()[d];
  }
  aoti_torch_empty_strided(dim, sizes.begin(), strides, dtype_of(Number()), aoti_torch_device_type_cpu(), 0, to);
  void *found = data(*to);
  if (zeros && count) std::memset(found, 0, count * sizeof(Number));
  return found;
}

inline int64_t threads() { return MULTIFID_THREADS ? MULTIFID_THREADS : omp_get_max_threads(); }

} // namespace multifid
