#pragma once

namespace vllm_b200 {

enum class InputType { kBFloat16, kHalf, kFloat };
enum class OutputType { kE4M3, kInt8 };
enum class ScaleType {
  kFloat,        // fp32, amax / qmax
  kFloatPow2,    // fp32, rounded up to a power of two
  kPackedUE8M0,  // four biased exponents to an int32, rounded up to a power of two
};

}  // namespace vllm_b200
