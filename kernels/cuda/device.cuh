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
