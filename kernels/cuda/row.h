// The arithmetic of a row of logits, for the device and, so that it can be tested without one, for the host.
//
// x is a logit as stored; the softmax is over x * outer. Exponentials are base 2: 2 ** (x * scale - shift), with
// scale = outer * log2(e). A row is walked in groups of 16 bytes: slices of groups to the blocks of a cluster, groups
// to a block's threads in turns. States merge across lanes, then warps, then blocks, always in the same order.
//
// The states leave the label out, which joins the merged one: where it is the largest, its log-prob is -log1p(the others'
// sum over it), exact however close to 0.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define FP_HD __host__ __device__ __forceinline__
#else
#define FP_HD inline
#endif

namespace fused_po {

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float LOWEST = -1e30f;  // where running maxima start: finite, so that -inf minus it stays -inf
constexpr float FLOOR = -1e4f;    // stands for log2(0) beside a probability of 0: their product must be 0, not NaN
constexpr float LOG_RATIO_CLAMP = 20.0f;
constexpr float SATURATION = 20.0f;  // k3 goes on along its tangent where the reference is more nats above

// Rows of tokens[TOKEN_FIELDS, rows]; one without a loss ends after ENTROPY.
enum Field { SHIFT, NORM, LOGP, ENTROPY, LOSS, KL, RATIO, CLIPPED, SLOPE, TOKEN_FIELDS };
enum Kind { CLIP, WEIGHT, GATE };
enum Estimator { NO_KL, K2, K3 };
enum Type { FP32, BF16, FP16 };

// What a launch is given; Python fills the same structure through ctypes. Tensors of tokens are [rows].
struct Problem {
  const void* x;  // logits [outer rows, inner rows, n_cols], columns side by side
  void* out;      // gradient or basis, of the same shape; may be x
  const int64_t* labels;
  const float *advantages, *weights, *old_logps, *ref_logps;  // of a policy loss; the last two may be null
  const float *g_logps, *g_entropy, *g_lse, *entropy;         // incoming gradients, or null; entropy with g_entropy
  float* tokens;
  int64_t n_rows, inner_rows, n_cols, x_stride_outer, x_stride_inner, out_stride_outer, out_stride_inner;
  int64_t first_col, ignore_index;
  float outer, low, high, bound, kl_coef, entropy_coef;
  int32_t kind, estimator, kl_times_ratio, x_type, out_type, blocks;  // blocks: of a cluster
};

FP_HD int64_t row_offset(int64_t row, int64_t inner_rows, int64_t outer, int64_t inner) {
  return row / inner_rows * outer + row % inner_rows * inner;
}

FP_HD float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// The online softmax.

struct State {
  float shift;  // maximum of x * scale
  float d;      // sum 2^u with u = x * scale - shift
  float t;      // sum 2^u u
};

FP_HD State start_state() { return {LOWEST, 0.0f, 0.0f}; }

// Takes a group of N logits: one maximum, one rescaling.
template <int N>
FP_HD void fold(State& s, const float (&x)[N], float scale) {
  float top = x[0];
#pragma unroll
  for (int i = 1; i < N; ++i) top = fmaxf(top, x[i]);
  const float shift = fmaxf(s.shift, top * scale);
  const float step = s.shift - shift, rescale = exp2_fast(step);
  float d = 0.0f, t = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float u = fmaf(x[i], scale, -shift), e = exp2_fast(u);
    d += e;
    t = fmaf(e, fmaxf(u, FLOOR), t);
  }
  s.t = fmaf(fmaf(step, s.d, s.t), rescale, t);
  s.d = fmaf(s.d, rescale, d);
  s.shift = shift;
}

// Sets the label to -inf, if it is among these columns.
template <int N>
FP_HD void leave_out(float (&x)[N], int64_t first_column, int64_t label) {
  const int64_t at = label - first_column;
  if (at < 0 || at >= N) return;
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = i == at ? -INFINITY : x[i];
}

FP_HD State combine(const State& a, const State& b) {
  const float shift = fmaxf(a.shift, b.shift), step_a = a.shift - shift, step_b = b.shift - shift;
  const float r_a = exp2_fast(step_a), r_b = exp2_fast(step_b);
  return {shift, a.d * r_a + b.d * r_b, (a.t + step_a * a.d) * r_a + (b.t + step_b * b.d) * r_b};
}

// What a row has come to; norm is log2 of the sum over the shift.
struct Result {
  float shift, norm, logp, entropy;
};

// The others' state and the label's logit x. Where the label is the largest, exponents are over its own, not over its
// rounding to a shift.
FP_HD Result join(const State& s, float x, float scale) {
  const float scaled = x * scale;
  const bool largest = scaled >= s.shift;
  const float shift = largest ? scaled : s.shift, t = fmaf(x, scale, -shift);
  const float step = largest ? -fmaf(x, scale, -s.shift) : 0.0f, rescale = exp2_fast(step);
  const float own = largest ? 0.0f : t, weight = exp2_fast(own), rest = s.d * rescale, sum = weight + rest;
  const float nats = largest ? log1pf(rest) : log2f(sum) * LN2, log2_sum = largest ? nats * LOG2E : log2f(sum);
  const float weighed = fmaf(step, s.d, s.t) * rescale + weight * fmaxf(own, FLOOR);
  // x * scale - shift in two parts, t + low: rounded in base 2, where it is 1.44 times as large, it would lose a bit.
  const float back = t + shift, part = back - t;
  float low = fmaf(x, scale, -back) - ((t - (back - part)) + (shift - part));
  if (!(fabsf(t) < 1e30f)) low = 0.0f;  // an infinite t has none
  const float below = fmaf(t, LN2, (low - log2_sum) * LN2);
  return {shift, (largest ? t : 0.0f) + log2_sum, largest ? 0.0f - nats : below > 0.0f ? 0.0f : below,
          nats - weighed / sum * LN2};
}

// Where the groups of a row lie: columns [0, lead) before the first 16-byte boundary, `groups` groups of `size`
// columns, and fewer than `size` columns after them.
struct Layout {
  int lead, size;
  int64_t groups, n_cols;
};

FP_HD Layout layout_of(uint64_t address, int64_t n_cols, int itemsize) {
  const int size = 16 / itemsize, before = (int)(address & 15) / itemsize;
  int64_t lead = (size - before) % size;
  if (lead > n_cols) lead = n_cols;
  return {(int)lead, size, (n_cols - lead) / size, n_cols};
}

// Whether rows of x and out begin equally far from a 16-byte boundary, counted in columns of x's groups.
FP_HD bool begin_together(const Problem& p) {
  const int64_t in_size = p.x_type == FP32 ? 4 : 2, out_size = p.out_type == FP32 ? 4 : 2, n = 16 / in_size;
  const int64_t x = (int64_t)p.x / in_size % n, out = (int64_t)p.out / out_size % n;
  return x == out && p.x_stride_outer % n == p.out_stride_outer % n && p.x_stride_inner % n == p.out_stride_inner % n;
}

// The groups of block `rank` of `blocks`: [begin, end).
struct Slice {
  int64_t begin, end;
};

FP_HD int64_t slice_groups(int64_t groups, int blocks) { return (groups + blocks - 1) / blocks; }

FP_HD Slice slice_of(int64_t groups, int rank, int blocks) {
  const int64_t each = slice_groups(groups, blocks);
  const int64_t begin = each * rank < groups ? each * rank : groups;
  return {begin, begin + each < groups ? begin + each : groups};
}

// The column outside the groups that a thread of block 0 takes, or -1.
FP_HD int64_t edge_column(const Layout& l, int rank, int thread) {
  if (rank != 0 || thread >= 2 * l.size) return -1;
  if (thread < l.size) return thread < l.lead ? thread : -1;
  const int64_t column = l.lead + l.groups * l.size + (thread - l.size);
  return column < l.n_cols ? column : -1;
}

// A token's loss, as the zoo has it.

struct Token {
  float advantage, weight, old_logp, ref_logp;
  bool has_old;
};

struct Terms {
  float loss, kl, ratio, clipped, slope;  // slope: weight * d loss / d log-prob
};

// weight * value, 0 where the weight is 0, also for infinities.
FP_HD float times(float weight, float value) { return weight == 0.0f ? 0.0f : weight * value; }

FP_HD void kl_estimate(float k1, int estimator, float& kl, float& slope) {
  if (estimator == K2) {
    kl = 0.5f * k1 * k1;
    slope = k1;
    return;
  }
  const float inside = -k1 > SATURATION ? SATURATION : -k1;  // fminf and fmaxf lose NaN
  slope = -expm1f(inside);
  kl = -inside - slope * (1.0f + (-k1 > SATURATION ? -k1 - SATURATION : 0.0f));  // no difference of infinities
  if (fabsf(k1) < 0.05f) kl = k1 * k1 * (0.5f - k1 * (0.1666666667f - k1 * 0.04166666667f));
}

FP_HD void policy_term(const Problem& p, float logp, float ratio, float ratio_slope, float a, Terms& out) {
  const bool above = ratio > p.high && a > 0.0f, below = ratio < p.low && a < 0.0f;
  out.clipped = above ? 1.0f : below ? -1.0f : 0.0f;
  if (p.kind == CLIP) {
    const bool bounded = ratio > p.bound && a < 0.0f;
    const float held = above ? p.high : below ? p.low : bounded ? p.bound : ratio;
    out.loss = -a * held;
    out.slope = above || below || bounded ? 0.0f : -a * ratio_slope;
  } else if (p.kind == WEIGHT) {
    const float weight = fminf(fmaxf(ratio, p.low), p.high);
    out.loss = -times(weight * a, logp);
    out.slope = -weight * a;
  } else {
    const float tau = a > 0.0f ? p.low : p.high, e = expf(-fabsf(tau * (ratio - 1.0f)));
    const float gate = (ratio > 1.0f ? 1.0f : e) / (1.0f + e), closed = (ratio > 1.0f ? e : 1.0f) / (1.0f + e);
    out.loss = -gate * 4.0f / tau * a;
    out.slope = -4.0f * gate * closed * a * ratio_slope;
    out.clipped = 0.0f;
  }
}

FP_HD Terms token_terms(const Problem& p, const Token& token, float logp, float entropy) {
  Terms out = {};
  const float log_ratio = token.has_old ? logp - token.old_logp : 0.0f;
  const float inside = fminf(fmaxf(log_ratio, -LOG_RATIO_CLAMP), LOG_RATIO_CLAMP);
  out.ratio = log_ratio == log_ratio ? expf(inside) : log_ratio;  // fminf and fmaxf lose NaN
  const float ratio_slope = inside == log_ratio ? out.ratio : 0.0f;
  policy_term(p, logp, out.ratio, ratio_slope, token.advantage, out);
  if (p.estimator != NO_KL) {
    float slope;
    kl_estimate(logp - token.ref_logp, p.estimator, out.kl, slope);
    if (p.kl_times_ratio) {
      slope = slope * out.ratio + times(ratio_slope, out.kl);
      out.kl *= out.ratio;
    }
    out.loss += times(p.kl_coef, out.kl);
    out.slope += times(p.kl_coef, slope);
  }
  out.loss -= p.entropy_coef * entropy;
  out.slope = times(token.weight, out.slope);
  return out;
}

// The gradient of g_logp log p_y + g_entropy H + g_lse lse in the raw logits.

struct Slopes {
  float shift, norm, logp, entropy, g_logp, g_entropy, g_lse;
};

FP_HD bool is_live(const Slopes& s) {
  return s.norm != INFINITY && (s.g_logp != 0.0f || s.g_entropy != 0.0f || s.g_lse != 0.0f);
}

FP_HD float gradient_element(float x, const Slopes& s, float outer) {
  const float log2p = fmaf(x, outer * LOG2E, -s.shift) - s.norm;
  float weight = s.g_lse - s.g_logp;
  if (s.g_entropy != 0.0f) weight -= s.g_entropy * ((log2p < FLOOR ? FLOOR : log2p) * LN2 + s.entropy);
  return exp2_fast(log2p) * weight * outer;
}

// The label's own entry, by expm1 of its log-prob: exact where p is close to 1.
FP_HD float gradient_label(const Slopes& s, float outer) {
  const float floored = s.logp < FLOOR * LN2 ? FLOOR * LN2 : s.logp;
  const float p = exp2_fast(s.logp * LOG2E);
  return (p * (s.g_lse - s.g_entropy * (floored + s.entropy)) - s.g_logp * expm1f(s.logp)) * outer;
}

// The gradient's ingredients of a row that has been scored: the basis, or a policy loss's gradient. x: the label's
// logit. With `write`, the row's numbers go to p.tokens.
FP_HD Slopes finish_row(const Problem& p, int64_t row, bool valid, const State& s, float x, bool policy, bool write) {
  const Result r = valid ? join(s, x, p.outer * LOG2E) : Result{s.shift, INFINITY, 0.0f, 0.0f};
  Slopes out = {r.shift, r.norm, r.logp, r.entropy, valid ? 1.0f : 0.0f, 0.0f, 0.0f};
  Terms terms = {};
  if (policy && valid) {
    const bool has_old = p.old_logps, has_ref = p.ref_logps;
    const Token token = {p.advantages[row], p.weights[row], has_old ? p.old_logps[row] : 0.0f,
                         has_ref ? p.ref_logps[row] : 0.0f, has_old};
    terms = token_terms(p, token, r.logp, r.entropy);
    out.g_logp = terms.slope;
    out.g_entropy = -p.entropy_coef * token.weight;
  }
  if (!write) return out;
  const float fields[TOKEN_FIELDS] = {r.shift,  r.norm,      r.logp,        r.entropy,  terms.loss,
                                      terms.kl, terms.ratio, terms.clipped, terms.slope};
  const int n_fields = policy ? TOKEN_FIELDS : ENTROPY + 1;
#pragma unroll
  for (int i = 0; i < TOKEN_FIELDS; ++i)
    if (i < n_fields) p.tokens[i * p.n_rows + row] = fields[i];
  return out;
}

// Those of the gradient pass: p.tokens begins with shift, norm and logp; without incoming gradients it is the basis.
FP_HD Slopes slopes_of(const Problem& p, int64_t row) {
  Slopes s = {p.tokens[row], p.tokens[p.n_rows + row], p.tokens[2 * p.n_rows + row], 0.0f, 0.0f, 0.0f, 0.0f};
  if (p.g_logps) s.g_logp = p.g_logps[row];
  if (p.g_entropy) s.g_entropy = p.g_entropy[row], s.entropy = p.entropy[row];
  if (p.g_lse) s.g_lse = p.g_lse[row];
  if (!p.g_logps && !p.g_entropy && !p.g_lse) s.g_logp = 1.0f;
  return s;
}

}  // namespace fused_po
