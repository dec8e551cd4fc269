// Every logit read once: a cluster of blocks holds a row in shared memory, scores it, and writes from there its basis
// (d log p_y / d x) or the gradient of a policy loss, over the logits or beside them. From sm_90 on.
#include <cooperative_groups.h>
#include <cuda_pipeline.h>

#include "device.cuh"

namespace fused_po {

constexpr int BATCHES = 4;  // of asynchronous copies: the first are scored while the last are on their way

// Scores batch `b` of the groups that this thread has copied, once it has arrived. label: counted from the first group.
template <class T, int LATER>
__device__ __forceinline__ void fold_batch(State& s, const Pack<T, GROUP<T>>* held, int64_t n, int64_t each, float scale,
                                           int64_t label) {
  __pipeline_wait_prior(LATER);
  const int64_t begin = each * (BATCHES - 1 - LATER), end = begin + each < n ? begin + each : n;
  for (int64_t g = begin + threadIdx.x; g < end; g += THREADS) {
    float x[GROUP<T>];
    widen(held[g], x);
    leave_out(x, g * GROUP<T>, label);
    fold(s, x, scale);
  }
}

template <class In, class Out>
__global__ void __launch_bounds__(THREADS, 2) one_read_kernel(const Problem p, const bool policy) {
#if __CUDA_ARCH__ >= 900
  namespace cg = cooperative_groups;
  constexpr int N = GROUP<In>;
  using Group = Pack<In, N>;
  extern __shared__ uint4 shared[];
  __shared__ State block_state;
  __shared__ Slopes slopes;
  Group* held = (Group*)shared;
  const cg::cluster_group cluster = cg::this_cluster();
  const int rank = cluster.block_rank();
  const Row<In> row(p, blockIdx.x / p.blocks);
  const Slice slice = slice_of(row.layout.groups, rank, p.blocks);
  const int64_t n = slice.end - slice.begin;
  const Group* source = row.groups() + slice.begin;
  const int64_t edge = edge_column(row.layout, rank, threadIdx.x);
  const float scale = p.outer * LOG2E;
  float label_x = 0.0f, edge_x = 0.0f;
  State s = start_state();
  if (row.valid) {
    const int64_t each = (n + BATCHES * THREADS - 1) / (BATCHES * THREADS) * THREADS;
#pragma unroll
    for (int b = 0; b < BATCHES; ++b) {
      const int64_t end = each * (b + 1) < n ? each * (b + 1) : n;
      for (int64_t g = each * b + threadIdx.x; g < end; g += THREADS) __pipeline_memcpy_async(held + g, source + g, 16);
      __pipeline_commit();
    }
    if (threadIdx.x == 0) label_x = row.at(row.label);  // before anybody writes
    if (edge >= 0) {
      edge_x = row.at(edge);
      float x[1] = {edge_x};
      leave_out(x, edge, row.label);
      fold(s, x, scale);
    }
    const int64_t label = row.label - row.layout.lead - slice.begin * N;
    fold_batch<In, 3>(s, held, n, each, scale, label);
    fold_batch<In, 2>(s, held, n, each, scale, label);
    fold_batch<In, 1>(s, held, n, each, scale, label);
    fold_batch<In, 0>(s, held, n, each, scale, label);
  }
  s = block_merge(s);
  if (threadIdx.x == 0) block_state = s;
  cluster.sync();
  if (threadIdx.x == 0) {  // every block merges the same states in the same order
    s = *cluster.map_shared_rank(&block_state, 0);
    for (int r = 1; r < p.blocks; ++r) s = combine(s, *cluster.map_shared_rank(&block_state, r));
    slopes = finish_row(p, row.index, row.valid, s, label_x, policy, rank == 0);
  }
  cluster.sync();  // no block exits or writes while another may read its state or a label's logit

  const Slopes g = slopes;
  const bool live = is_live(g);
  Out* out = (Out*)p.out + row_offset(row.index, p.inner_rows, p.out_stride_outer, p.out_stride_inner);
  const auto element = [&](float x, int64_t column) {
    const float dx = column == row.label ? gradient_label(g, p.outer) : gradient_element(x, g, p.outer);
    return from_float<Out>(live ? dx : 0.0f);
  };
  for (int64_t i = threadIdx.x; i < n; i += THREADS) {
    float x[N] = {};
    if (live) widen(held[i], x);
    const int64_t column = row.layout.lead + (slice.begin + i) * N;
    Pack<Out, N> values;
#pragma unroll
    for (int k = 0; k < N; ++k) values.v[k] = element(x[k], column + k);
    *(Pack<Out, N>*)(out + column) = values;
  }
  if (edge >= 0) out[edge] = element(edge_x, edge);
#endif
}

}  // namespace fused_po

using namespace fused_po;

// p->blocks: of a cluster, 1, 2, 4, 8 or 16; more than 8 is beyond what every GPU promises, and asked for.
// Where rows of x and out do not begin equally far from a 16-byte boundary it is cudaErrorNotSupported.
extern "C" int fused_po_one_read(const Problem* p, int policy, cudaStream_t stream) {
  if (!begin_together(*p)) return cudaErrorNotSupported;
  return with_types(*p, [&](auto in, auto out) {
    const auto kernel = one_read_kernel<decltype(in), decltype(out)>;
    const size_t bytes = slice_groups(p->n_cols / GROUP<decltype(in)>, p->blocks) * 16;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status == cudaSuccess && p->blocks > 8)
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (status != cudaSuccess) return status;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = p->blocks;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(p->n_rows * p->blocks);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, *p, policy != 0);
  });
}
