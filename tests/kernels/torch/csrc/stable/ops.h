// What the kernels' loops want of PyTorch's header, in one thread: so that they are built where there is no PyTorch.
#pragma once

#include <cstdint>

namespace torch::stable {

inline uint32_t get_num_threads() { return 1; }

template <class F> void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  if (begin < end) f(begin, end);
}

}  // namespace torch::stable
