// Statistics pass, gradient pass and scaling, for any GPU from sm_80 on: as the Triton kernels of the same names.
#include "device.cuh"

namespace fused_po {

// One block a row: one read gives the row's numbers and, for a policy loss, its terms.
template <class T>
__global__ void __launch_bounds__(THREADS) statistics_kernel(const Problem p, const bool policy) {
  const Row<T> row(p, blockIdx.x);
  const float scale = p.outer * LOG2E;
  State s = start_state();
  float label_x = 0.0f;
  if (row.valid) {
    if (threadIdx.x == 0) label_x = row.at(row.label);
    const auto* groups = row.groups();
#pragma unroll 2
    for (int64_t g = threadIdx.x; g < row.layout.groups; g += THREADS) {
      float x[GROUP<T>];
      widen(groups[g], x);
      leave_out(x, row.layout.lead + g * GROUP<T>, row.label);
      fold(s, x, scale);
    }
    const int64_t column = edge_column(row.layout, 0, threadIdx.x);
    if (column >= 0) {
      float x[1] = {row.at(column)};
      leave_out(x, column, row.label);
      fold(s, x, scale);
    }
  }
  s = block_merge(s);
  if (threadIdx.x == 0) finish_row(p, row.index, row.valid, s, label_x, policy, true);
}

constexpr int GROUPS_A_THREAD = 4;

// Rows on grid axis 0, blocks of columns on axis 1. together: rows of x and out begin equally far from a boundary.
template <class In, class Out>
__global__ void __launch_bounds__(THREADS) gradient_kernel(const Problem p, const bool together) {
  constexpr int N = GROUP<In>;
  const Row<In> row(p, blockIdx.x);
  Out* out = (Out*)p.out + row_offset(row.index, p.inner_rows, p.out_stride_outer, p.out_stride_inner);
  const int64_t label = row.label - p.first_col;
  const Slopes s = slopes_of(p, row.index);
  const bool live = is_live(s);

  const auto element = [&](float x, int64_t column) {
    return from_float<Out>(column == label ? gradient_label(s, p.outer) : gradient_element(x, s, p.outer));
  };
  const auto scalar = [&](int64_t column) { out[column] = live ? element(row.at(column), column) : from_float<Out>(0.0f); };
  const int64_t first = (int64_t)blockIdx.y * THREADS * GROUPS_A_THREAD + threadIdx.x;
  if (!together) {  // a thread's columns lie THREADS apart
    for (int i = 0; i < GROUPS_A_THREAD * N; ++i) {
      const int64_t column = ((int64_t)blockIdx.y * GROUPS_A_THREAD * N + i) * THREADS + threadIdx.x;
      if (column < p.n_cols) scalar(column);
    }
    return;
  }
  const auto* groups = row.groups();
#pragma unroll
  for (int i = 0; i < GROUPS_A_THREAD; ++i) {
    const int64_t g = first + i * THREADS;
    if (g >= row.layout.groups) break;
    float x[N] = {};
    if (live) widen(groups[g], x);
    Pack<Out, N> values;
#pragma unroll
    for (int k = 0; k < N; ++k)
      values.v[k] = live ? element(x[k], row.layout.lead + g * N + k) : from_float<Out>(0.0f);
    *(Pack<Out, N>*)(out + row.layout.lead + g * N) = values;
  }
  const int64_t column = edge_column(row.layout, blockIdx.y, threadIdx.x);
  if (column >= 0) scalar(column);
}

// Multiplies n values with the factor; nothing is read if it is 1.
template <class T>
__global__ void __launch_bounds__(THREADS) scale_kernel(T* values, const float* factor, const int64_t n) {
  const float f = *factor;
  if (f == 1.0f) return;
  constexpr int N = GROUP<T>;
  const int64_t stride = (int64_t)gridDim.x * THREADS, first = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  for (int64_t g = first; g < n / N; g += stride) {
    Pack<T, N> pack = ((Pack<T, N>*)values)[g];
#pragma unroll
    for (int k = 0; k < N; ++k) pack.v[k] = from_float<T>(to_float(pack.v[k]) * f);
    ((Pack<T, N>*)values)[g] = pack;
  }
  const int64_t rest = n / N * N + first;
  if (rest < n) values[rest] = from_float<T>(to_float(values[rest]) * f);
}

}  // namespace fused_po

using namespace fused_po;

extern "C" int fused_po_statistics(const Problem* p, int policy, cudaStream_t stream) {
  return with_types(*p, [&](auto in, auto) {
    statistics_kernel<decltype(in)><<<p->n_rows, THREADS, 0, stream>>>(*p, policy != 0);
    return cudaGetLastError();
  });
}

extern "C" int fused_po_gradient(const Problem* p, cudaStream_t stream) {
  return with_types(*p, [&](auto in, auto out) {
    const int64_t columns = THREADS * GROUPS_A_THREAD * GROUP<decltype(in)>;
    const dim3 grid(p->n_rows, (p->n_cols + columns - 1) / columns);
    gradient_kernel<decltype(in), decltype(out)><<<grid, THREADS, 0, stream>>>(*p, begin_together(*p));
    return cudaGetLastError();
  });
}

extern "C" int fused_po_scale(void* values, const float* factor, int64_t n, int type, cudaStream_t stream) {
  Problem p = {};
  p.x_type = p.out_type = type;
  return with_types(p, [&](auto in, auto) {
    using T = decltype(in);
    const int64_t blocks = (n / GROUP<T> + THREADS) / THREADS;
    scale_kernel<T><<<blocks < 4096 ? blocks : 4096, THREADS, 0, stream>>>((T*)values, factor, n);
    return cudaGetLastError();
  });
}

extern "C" const char* fused_po_error(int code) { return cudaGetErrorString((cudaError_t)code); }
