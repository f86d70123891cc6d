#include "../kernels/cache/cache_write.h"
#include "checks.h"
#include "memory_ops.h"

namespace vllm_b200 {
namespace {

bool is_e4m3(const Tensor& source, const Tensor& cache, const char* name) {
  const ScalarType type = cache.scalar_type();
  STD_TORCH_CHECK(source.scalar_type() == ScalarType::BFloat16 || source.scalar_type() == ScalarType::Half, name,
                  ": what is written takes bfloat16 or float16");
  if (type == source.scalar_type()) return false;
  STD_TORCH_CHECK(type == ScalarType::Byte || type == ScalarType::Float8_e4m3fn, name,
                  ": takes the dtype of what is written, uint8 or float8_e4m3fn");
  return true;
}

void check_vectors(const Tensor& x, const char* name) {
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  bool right = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && (x.size(-1) < 2 || x.stride(-1) == 1);
  for (int64_t d = 0; d + 1 < x.dim(); ++d) right = right && (x.size(d) < 2 || x.stride(d) * bytes % 16 == 0);
  STD_TORCH_CHECK(right, name, ": takes a last stride of 1 and heads that start at multiples of 16 bytes");
}

// source [tokens, heads, head_size] or [tokens, head_size]; cache [blocks, block_size, heads, head_size] or, from
// `column` on, [blocks, block_size, width].
CachePart cache_part(const Tensor& source, const Tensor& cache, const Tensor& scale, int64_t column, int64_t tokens,
                     bool e4m3, const char* name) {
  const bool headless = source.dim() == 2;
  const int64_t heads = headless ? 1 : source.size(1), head_size = source.size(-1);
  STD_TORCH_CHECK(source.size(0) >= tokens, name, ": takes at least as many tokens as there are slots, ", tokens);
  STD_TORCH_CHECK(head_size % 16 == 0, name, ": the head size takes multiples of 16, got ", head_size);
  STD_TORCH_CHECK(heads * head_size < (int64_t{1} << 20), name, ": takes rows below 2^20 elements");
  check_vectors(source, name);
  STD_TORCH_CHECK(source.get_device_index() == cache.get_device_index(), name, ": takes the device of the cache");
  CachePart part = {};
  part.source = source.data_ptr();
  part.cache = static_cast<char*>(cache.data_ptr()) + column * static_cast<int64_t>(cache.element_size());
  part.heads = static_cast<int32_t>(heads);
  part.head_size = static_cast<int32_t>(head_size);
  part.source_stride_token = source.stride(0);
  part.source_stride_head = headless ? 0 : source.stride(1);
  part.cache_stride_block = cache.stride(0);
  part.cache_stride_slot = cache.stride(1);
  part.cache_stride_head = headless ? 0 : cache.stride(2);
  if (e4m3) {
    check_type(scale, "scale", ScalarType::Float);
    STD_TORCH_CHECK(scale.numel() == 1 || (scale.numel() == heads && scale.is_contiguous()),
                    "scale: takes one number, or one a head");
    STD_TORCH_CHECK(scale.get_device_index() == cache.get_device_index(), "scale: takes the device of the cache");
    part.scale = static_cast<const float*>(scale.data_ptr());
    part.scale_stride_head = scale.numel() == 1 ? 0 : 1;
  }
  return part;
}

void check_slots(const Tensor& slots, const Tensor& cache) {
  check_type(slots, "slot_mapping", ScalarType::Long);
  STD_TORCH_CHECK(slots.dim() == 1 && slots.is_contiguous(), "slot_mapping: takes one dimension, contiguous");
  STD_TORCH_CHECK(slots.get_device_index() == cache.get_device_index(), "slot_mapping: takes the device of the cache");
}

void write(CacheWriteParams& params, const Tensor& source, const Tensor& cache, const Tensor& slots, bool e4m3, bool pdl,
           const char* op) {
  params.slots = static_cast<const int64_t*>(slots.data_ptr());
  params.tokens = slots.size(0);
  params.block_size = static_cast<int32_t>(cache.size(1));
  params.pdl = pdl;
  const InputType input = source.scalar_type() == ScalarType::Half ? InputType::kHalf : InputType::kBFloat16;
  const torch::stable::accelerator::DeviceGuard guard(cache.get_device_index());
  check_launch(cache_write(params, input, e4m3, current_stream(cache.get_device_index())), op);
}

}  // namespace

namespace ops {

void reshape_and_cache_flash(const Tensor& key, const Tensor& value, Tensor key_cache, Tensor value_cache,
                             const Tensor& slot_mapping, const Tensor& k_scale, const Tensor& v_scale, bool pdl) {
  STD_TORCH_CHECK(key.dim() == 3 && value.dim() == 3, "key and value: take 3 dimensions");
  STD_TORCH_CHECK(key_cache.dim() == 4 && value_cache.dim() == 4, "key_cache and value_cache: take 4 dimensions");
  check_slots(slot_mapping, key_cache);
  const int64_t blocks = key_cache.size(0), block_size = key_cache.size(1);
  check_shape(key_cache, "key_cache", {blocks, block_size, key.size(1), key.size(2)});
  check_shape(value_cache, "value_cache", {blocks, block_size, value.size(1), value.size(2)});
  check_vectors(key_cache, "key_cache");
  check_vectors(value_cache, "value_cache");
  const bool e4m3 = is_e4m3(key, key_cache, "key_cache");
  check_type(value, "value", key.scalar_type());
  check_type(value_cache, "value_cache", key_cache.scalar_type());
  const int64_t tokens = slot_mapping.size(0);
  CacheWriteParams params = {};
  params.parts[0] = cache_part(key, key_cache, k_scale, 0, tokens, e4m3, "key");
  params.parts[1] = cache_part(value, value_cache, v_scale, 0, tokens, e4m3, "value");
  write(params, key, key_cache, slot_mapping, e4m3, pdl, "reshape_and_cache_flash");
}

void concat_and_cache_mla(const Tensor& kv_c, const Tensor& k_pe, Tensor kv_cache, const Tensor& slot_mapping,
                          const Tensor& scale, bool pdl) {
  STD_TORCH_CHECK(kv_c.dim() == 2 && k_pe.dim() == 2, "kv_c and k_pe: take 2 dimensions");
  STD_TORCH_CHECK(kv_cache.dim() == 3, "kv_cache: takes 3 dimensions");
  check_slots(slot_mapping, kv_cache);
  check_shape(kv_cache, "kv_cache", {kv_cache.size(0), kv_cache.size(1), kv_c.size(1) + k_pe.size(1)});
  check_vectors(kv_cache, "kv_cache");
  const bool e4m3 = is_e4m3(kv_c, kv_cache, "kv_cache");
  check_type(k_pe, "k_pe", kv_c.scalar_type());
  const int64_t tokens = slot_mapping.size(0);
  CacheWriteParams params = {};
  params.parts[0] = cache_part(kv_c, kv_cache, scale, 0, tokens, e4m3, "kv_c");
  params.parts[1] = cache_part(k_pe, kv_cache, scale, kv_c.size(1), tokens, e4m3, "k_pe");
  write(params, kv_c, kv_cache, slot_mapping, e4m3, pdl, "concat_and_cache_mla");
}

}  // namespace ops
}  // namespace vllm_b200

STABLE_TORCH_LIBRARY_IMPL(vllm_b200, CUDA, m) {
  m.impl("reshape_and_cache_flash", TORCH_BOX(&vllm_b200::ops::reshape_and_cache_flash));
  m.impl("concat_and_cache_mla", TORCH_BOX(&vllm_b200::ops::concat_and_cache_mla));
}
