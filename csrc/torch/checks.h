#pragma once

// Checks that several bindings share. The Python wrappers have named what is wrong in words; these keep a direct call of
// an op from reading or writing out of range.

#include <initializer_list>

#include "../kernels/quant/types.h"
#include "common.h"

namespace vllm_b200 {

inline InputType input_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return InputType::kBFloat16;
    case ScalarType::Half: return InputType::kHalf;
    case ScalarType::Float: return InputType::kFloat;
    default: STD_TORCH_CHECK(false, "x: takes bfloat16, float16 or float32");
  }
}

inline OutputType output_type(const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::Float8_e4m3fn: return OutputType::kE4M3;
    case ScalarType::Char: return OutputType::kInt8;
    default: STD_TORCH_CHECK(false, "q: takes float8_e4m3fn or int8");
  }
}

// x as rows: [..., width] with a last stride of 1 and leading dimensions that fold into one.
struct Rows {
  int64_t count = 1, width = 0, stride = 0;
  bool regular = true;  // whether the leading dimensions fold

  explicit Rows(const Tensor& x) {
    const int64_t dim = x.dim();
    if (dim == 0) {
      regular = false;
      return;
    }
    width = stride = x.size(-1);
    if (x.numel() == 0) {
      count = 0;
      return;
    }
    regular = width < 2 || x.stride(-1) == 1;
    bool first = true;
    int64_t next = 0;
    for (int64_t d = dim - 2; d >= 0; --d) {
      if (x.size(d) != 1) {
        if (first) {
          stride = x.stride(d);
          first = false;
        } else if (x.stride(d) != next) {
          regular = false;
        }
        next = x.stride(d) * x.size(d);
      }
      count *= x.size(d);
    }
  }
};

// Whether every row begins at a multiple of 16 bytes.
inline bool rows_are_vectors(const Tensor& x, const Rows& rows) {
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  return x.numel() == 0 ||
         (reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && (rows.count < 2 || rows.stride * bytes % 16 == 0));
}

inline Rows checked_rows(const Tensor& x, const char* name) {
  const Rows rows(x);
  STD_TORCH_CHECK(rows.regular && rows_are_vectors(x, rows), name,
                  ": takes a last stride of 1 and rows that start at multiples of 16 bytes");
  return rows;
}

inline void check_shape(const Tensor& x, const char* name, std::initializer_list<int64_t> shape) {
  bool same = x.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (const int64_t size : shape) {
    same = same && x.size(d) == size;
    ++d;
  }
  STD_TORCH_CHECK(same, name, ": has another shape than the other arguments ask for");
}

inline void check_type(const Tensor& x, const char* name, ScalarType type) {
  STD_TORCH_CHECK(x.scalar_type() == type, name, ": has another dtype than the op takes");
}

// One number on the device of x, of dtype float or, for a zero point, int.
inline void check_scalar(const Tensor& scalar, const char* name, const Tensor& x, ScalarType type = ScalarType::Float) {
  check_type(scalar, name, type);
  STD_TORCH_CHECK(scalar.numel() == 1, name, ": takes one element, got ", scalar.numel());
  STD_TORCH_CHECK(scalar.get_device_index() == x.get_device_index(), name, ": takes the device of x");
}

}  // namespace vllm_b200
