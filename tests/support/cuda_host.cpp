// kernels/cuda/row.h on the host: lanes, warps, blocks and clusters run one by one and merge in the kernels' order.
#include <stddef.h>
#include <string.h>

#include <vector>

#include "row.h"

using namespace fused_po;

constexpr int THREADS = 512, WARPS = THREADS / 32;

// warp_merge of device.cuh: lanes past the end get their own state back from a shuffle.
static State warp_merge(std::vector<State> lanes) {
  for (int offset = 16; offset; offset /= 2) {
    const std::vector<State> before = lanes;
    for (int i = 0; i < 32; ++i) lanes[i] = combine(before[i], before[i + offset < 32 ? i + offset : i]);
  }
  return lanes[0];
}

static State block_merge(const std::vector<State>& threads) {
  std::vector<State> warps(32, start_state());
  for (int w = 0; w < WARPS; ++w)
    warps[w] = warp_merge(std::vector<State>(threads.begin() + 32 * w, threads.begin() + 32 * (w + 1)));
  return warp_merge(warps);
}

// The columns of one thread: every THREADS-th group, and its column outside the groups. visited counts reads.
template <int N>
static State walk(const float* x, int64_t label, const Layout& l, int rank, int blocks, int thread, float scale,
                  int* visited) {
  State s = start_state();
  const Slice slice = slice_of(l.groups, rank, blocks);
  const int64_t edge = edge_column(l, rank, thread);
  const auto take_edge = [&] {
    if (edge < 0) return;
    float one[1] = {x[edge]};
    leave_out(one, edge, label);
    fold(s, one, scale);
    ++visited[edge];
  };
  if (blocks > 1) take_edge();  // first where a row is read once, last in the statistics pass
  for (int64_t g = slice.begin + thread; g < slice.end; g += THREADS) {
    float group[N];
    for (int i = 0; i < N; ++i) {
      const int64_t column = l.lead + g * N + i;
      group[i] = x[column];
      ++visited[column];
    }
    leave_out(group, l.lead + g * N, label);
    fold(s, group, scale);
  }
  if (blocks == 1) take_edge();
  return s;
}

// The state of a row that starts `before` columns after a 16-byte boundary, computed by a cluster of `blocks`.
template <int N>
static State score(const float* x, int64_t label, int64_t n_cols, int before, int blocks, float scale, int* visited) {
  const Layout l = layout_of(4096 + before * (16 / N), n_cols, 16 / N);
  State merged = start_state();
  for (int rank = 0; rank < blocks; ++rank) {
    std::vector<State> threads;
    for (int t = 0; t < THREADS; ++t) threads.push_back(walk<N>(x, label, l, rank, blocks, t, scale, visited));
    const State block = block_merge(threads);
    merged = rank ? combine(merged, block) : block;
  }
  return merged;
}

// results [rows, 3]: log-prob, entropy, lse in base 2. grad [rows, n_cols] of g_logp logp + g_entropy H + g_lse lse.
extern "C" void host_rows(const float* x, const int64_t* labels, int64_t rows, int64_t n_cols, int itemsize, int before,
                          int blocks, float outer, const float* g, float* results, float* grad, int* visited) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x + r * n_cols;
    const float scale = outer * LOG2E;
    const State s = itemsize == 2 ? score<8>(row, labels[r], n_cols, before, blocks, scale, visited + r * n_cols)
                                  : score<4>(row, labels[r], n_cols, before, blocks, scale, visited + r * n_cols);
    float* out = results + 3 * r;
    const Result joined = join(s, row[labels[r]], scale);
    out[0] = joined.logp;
    out[1] = joined.entropy;
    out[2] = joined.shift + joined.norm;
    const Slopes slopes = {joined.shift,    joined.norm,    joined.logp, joined.entropy, g[3 * r],
                           g[3 * r + 1], g[3 * r + 2]};
    for (int64_t v = 0; v < n_cols; ++v)
      grad[r * n_cols + v] = v == labels[r] ? gradient_label(slopes, outer) : gradient_element(row[v], slopes, outer);
  }
}

// tokens [5, n]: loss, KL, ratio, clipped, slope.
extern "C" void host_terms(const Problem* p, const float* logps, const float* entropy, int64_t n, float* tokens) {
  for (int64_t i = 0; i < n; ++i) {
    const Token token = {p->advantages[i], p->weights[i], p->old_logps ? p->old_logps[i] : 0.0f,
                         p->ref_logps ? p->ref_logps[i] : 0.0f, p->old_logps != nullptr};
    const Terms t = token_terms(*p, token, logps[i], entropy[i]);
    const float fields[] = {t.loss, t.kl, t.ratio, t.clipped, t.slope};
    for (int k = 0; k < 5; ++k) tokens[k * n + i] = fields[k];
  }
}

extern "C" int host_live(float norm, float g) { return is_live({0.0f, norm, 0.0f, 0.0f, g, 0.0f, 0.0f}); }

// The offsets of Problem's fields in order, and its size.
extern "C" void host_offsets(int64_t* out) {
  const size_t all[] = {
      offsetof(Problem, x), offsetof(Problem, out), offsetof(Problem, labels), offsetof(Problem, advantages),
      offsetof(Problem, weights), offsetof(Problem, old_logps), offsetof(Problem, ref_logps), offsetof(Problem, g_logps),
      offsetof(Problem, g_entropy), offsetof(Problem, g_lse), offsetof(Problem, entropy), offsetof(Problem, tokens),
      offsetof(Problem, n_rows), offsetof(Problem, inner_rows), offsetof(Problem, n_cols),
      offsetof(Problem, x_stride_outer), offsetof(Problem, x_stride_inner), offsetof(Problem, out_stride_outer),
      offsetof(Problem, out_stride_inner), offsetof(Problem, first_col), offsetof(Problem, ignore_index),
      offsetof(Problem, outer), offsetof(Problem, low), offsetof(Problem, high), offsetof(Problem, bound),
      offsetof(Problem, kl_coef), offsetof(Problem, entropy_coef), offsetof(Problem, kind), offsetof(Problem, estimator),
      offsetof(Problem, kl_times_ratio), offsetof(Problem, x_type), offsetof(Problem, out_type),
      offsetof(Problem, blocks), sizeof(Problem)};
  for (size_t i = 0; i < sizeof(all) / sizeof(*all); ++i) out[i] = all[i];
}

// The launchers on host memory, one row after another, so that all code above them can run without a GPU.

static float load(const void* x, int type, int64_t i) {
  if (type == FP32) return ((const float*)x)[i];
  const uint32_t bits = (uint32_t)((const uint16_t*)x)[i] << 16;  // bf16
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static void store(void* out, int type, int64_t i, float value) {
  if (type == FP32) {
    ((float*)out)[i] = value;
    return;
  }
  uint32_t bits;
  memcpy(&bits, &value, 4);
  ((uint16_t*)out)[i] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

struct HostRow {
  int64_t x_at, out_at, label;
  bool valid;
  std::vector<float> x;

  HostRow(const Problem& p, int64_t row)
      : x_at(row_offset(row, p.inner_rows, p.x_stride_outer, p.x_stride_inner)),
        out_at(row_offset(row, p.inner_rows, p.out_stride_outer, p.out_stride_inner)),
        label(p.labels[row]),
        valid(label != p.ignore_index) {
    for (int64_t v = 0; v < p.n_cols; ++v) x.push_back(load(p.x, p.x_type, x_at + v));
  }

  State score_by(const Problem& p, int blocks) const {
    std::vector<int> visited(x.size());
    const int itemsize = p.x_type == FP32 ? 4 : 2, before = ((uint64_t)p.x / itemsize + x_at) % (16 / itemsize);
    const float scale = p.outer * LOG2E;
    return itemsize == 2 ? score<8>(x.data(), label, p.n_cols, before, blocks, scale, visited.data())
                         : score<4>(x.data(), label, p.n_cols, before, blocks, scale, visited.data());
  }

  void write(const Problem& p, const Slopes& s, int64_t target) const {
    for (int64_t v = 0; v < p.n_cols; ++v) {
      const float dx = v == target ? gradient_label(s, p.outer) : gradient_element(x[v], s, p.outer);
      store(p.out, p.out_type, out_at + v, is_live(s) ? dx : 0.0f);
    }
  }
};

static State score_valid(const Problem& p, const HostRow& row, int blocks) {
  return row.valid ? row.score_by(p, blocks) : start_state();
}

extern "C" int fused_po_statistics(const Problem* p, int policy, void*) {
  for (int64_t r = 0; r < p->n_rows; ++r) {
    const HostRow row(*p, r);
    finish_row(*p, r, row.valid, score_valid(*p, row, 1), row.valid ? row.x[row.label] : 0.0f, policy, true);
  }
  return 0;
}

extern "C" int fused_po_gradient(const Problem* p, void*) {
  for (int64_t r = 0; r < p->n_rows; ++r) {
    const HostRow row(*p, r);
    row.write(*p, slopes_of(*p, r), row.label - p->first_col);
  }
  return 0;
}

static int one_reads = 0;

extern "C" int host_one_reads() { return one_reads; }

extern "C" int fused_po_one_read(const Problem* p, int policy, void*) {
  if (!begin_together(*p)) return 801;
  ++one_reads;
  for (int64_t r = 0; r < p->n_rows; ++r) {
    const HostRow row(*p, r);
    const float x = row.valid ? row.x[row.label] : 0.0f;
    row.write(*p, finish_row(*p, r, row.valid, score_valid(*p, row, p->blocks), x, policy, true), row.label);
  }
  return 0;
}

extern "C" int fused_po_scale(void* values, const float* factor, int64_t n, int type, void*) {
  for (int64_t i = 0; i < n; ++i) store(values, type, i, load(values, type, i) * *factor);
  return 0;
}
