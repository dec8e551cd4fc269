// What the kernels share on the device: 16-byte groups of logits, reductions in a fixed order, where a row begins.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "row.h"

namespace fused_po {

constexpr int THREADS = 512, WARPS = THREADS / 32;

template <class T>
constexpr int GROUP = 16 / sizeof(T);

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }

template <class T, int N>
__device__ __forceinline__ void widen(const Pack<T, N>& pack, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = to_float(pack.v[i]);
}

__device__ __forceinline__ int64_t row_offset(int64_t row, int64_t inner_rows, int64_t outer, int64_t inner) {
  return row / inner_rows * outer + row % inner_rows * inner;
}

// A row and what is needed to score it.
template <class T>
struct Row {
  const T* x;
  int64_t index, label;
  bool valid;
  Layout layout;

  __device__ Row(const Problem& p, int64_t row)
      : x((const T*)p.x + row_offset(row, p.inner_rows, p.x_stride_outer, p.x_stride_inner)),
        index(row),
        label(p.labels[row]),
        valid(label != p.ignore_index),
        layout(layout_of((uint64_t)x, p.n_cols, sizeof(T))) {}

  __device__ float at(int64_t column) const { return to_float(x[column]); }
  __device__ const Pack<T, GROUP<T>>* groups() const { return (const Pack<T, GROUP<T>>*)(x + layout.lead); }
};

__device__ __forceinline__ State shuffle_down(const State& s, int offset) {
  return {__shfl_down_sync(~0u, s.shift, offset), __shfl_down_sync(~0u, s.d, offset),
          __shfl_down_sync(~0u, s.t, offset)};
}

__device__ __forceinline__ State warp_merge(State s) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) s = combine(s, shuffle_down(s, offset));
  return s;  // lane 0 has it
}

// The state of a block; thread 0 has it. Every thread calls it once.
__device__ __forceinline__ State block_merge(State s) {
  __shared__ State warps[WARPS];
  s = warp_merge(s);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = s;
  __syncthreads();
  return threadIdx.x < 32 ? warp_merge(threadIdx.x < WARPS ? warps[threadIdx.x] : start_state()) : s;
}

// The gradient's ingredients of a scored row; with `write`, its numbers go to p.tokens. x: the label's logit.
template <class T>
__device__ Slopes finish_row(const Problem& p, const Row<T>& row, const State& s, float x, bool policy, bool write) {
  const bool valid = row.valid;
  Slopes out = {s.shift, valid ? log2f(s.d) : INFINITY, valid ? entropy_of(s) : 0.0f, valid ? 1.0f : 0.0f, 0.0f, 0.0f};
  const float logp = valid ? label_logp(x, s, p.outer * LOG2E) : 0.0f;
  Terms terms = {};
  if (policy && valid) {
    const bool has_old = p.old_logps, has_ref = p.ref_logps;
    const Token token = {p.advantages[row.index], p.weights[row.index], has_old ? p.old_logps[row.index] : 0.0f,
                         has_ref ? p.ref_logps[row.index] : 0.0f, has_old};
    terms = token_terms(p, token, logp, out.entropy);
    out.g_logp = terms.slope;
    out.g_entropy = -p.entropy_coef * token.weight;
  }
  if (!write) return out;
  const float fields[TOKEN_FIELDS] = {out.shift,  out.norm,    logp,        out.entropy,  terms.loss,
                                      terms.kl, terms.ratio, terms.clipped, terms.slope};
  const int n_fields = policy ? TOKEN_FIELDS : ENTROPY + 1;
#pragma unroll
  for (int i = 0; i < TOKEN_FIELDS; ++i)
    if (i < n_fields) p.tokens[i * p.n_rows + row.index] = fields[i];
  return out;
}

// Whether rows of x and out begin equally far from a 16-byte boundary, counted in columns of x's groups.
inline bool begin_together(const Problem& p) {
  const int64_t in_size = p.x_type == FP32 ? 4 : 2, out_size = p.out_type == FP32 ? 4 : 2, n = 16 / in_size;
  const int64_t x = (int64_t)p.x / in_size % n, out = (int64_t)p.out / out_size % n;
  return x == out && p.x_stride_outer % n == p.out_stride_outer % n && p.x_stride_inner % n == p.out_stride_inner % n;
}

// The types of logits and gradient, by name: f(In{}, Out{}). What cannot be served is cudaErrorInvalidValue.
template <class F>
cudaError_t with_types(const Problem& p, F f) {
  if (p.x_type == FP32 && p.out_type == FP32) return f(float(), float());
  if (p.x_type == FP32 && p.out_type == BF16) return f(float(), __nv_bfloat16());
  if (p.x_type == FP32 && p.out_type == FP16) return f(float(), __half());
  if (p.x_type == BF16 && p.out_type == BF16) return f(__nv_bfloat16(), __nv_bfloat16());
  if (p.x_type == FP16 && p.out_type == FP16) return f(__half(), __half());
  return cudaErrorInvalidValue;
}

}  // namespace fused_po
