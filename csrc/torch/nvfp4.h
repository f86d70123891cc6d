#pragma once

#include "checks.h"

namespace vllm_b200 {

constexpr int64_t kNvfp4GroupSize = 16, kNvfp4TileRows = 128, kNvfp4TileGroups = 4;

inline int64_t round_up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// q [rows of x, padded_size / 2] bytes and, apart from the number of its rows, scale, for NVFP4.
inline void check_nvfp4_layout(const Tensor& x, const Tensor& q, const Tensor& scale, bool swizzled) {
  STD_TORCH_CHECK(q.dim() == 2 && scale.dim() == 2, "q and scale: take 2 dimensions");
  check_type(q, "q", ScalarType::Byte);
  check_type(scale, "scale", ScalarType::Float8_e4m3fn);
  check_shape(q, "q", {x.size(0), q.size(1)});
  STD_TORCH_CHECK(q.size(1) % 8 == 0 && q.size(1) < (int64_t{1} << 29), "q: takes columns in multiples of 8, got ",
                  q.size(1));
  const int64_t groups = round_up_to(q.size(1) / 8, swizzled ? kNvfp4TileGroups : 1);
  check_shape(scale, "scale", {scale.size(0), groups});
  STD_TORCH_CHECK(q.is_contiguous() && scale.is_contiguous(), "q and scale: are contiguous");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(q.data_ptr()) % 8 == 0 &&
                      reinterpret_cast<uintptr_t>(scale.data_ptr()) % (swizzled ? 4 : 1) == 0,
                  "q and scale: start at multiples of 8 and 4 bytes");
  STD_TORCH_CHECK(x.get_device_index() == q.get_device_index() && x.get_device_index() == scale.get_device_index(),
                  "x, q and scale: take one device");
}

// The whole of them, with columns for hidden_size at least.
inline void check_nvfp4_outputs(const Tensor& x, int64_t hidden_size, const Tensor& q, const Tensor& scale,
                                bool swizzled) {
  check_nvfp4_layout(x, q, scale, swizzled);
  STD_TORCH_CHECK(2 * q.size(1) >= hidden_size, "q: takes at least ", hidden_size / 2, " columns, got ", q.size(1));
  check_shape(scale, "scale", {swizzled ? round_up_to(x.size(0), kNvfp4TileRows) : x.size(0), scale.size(1)});
}

}  // namespace vllm_b200
