// Compiled CPU engine: sweep with a top-K tournament, merge, radix select, gradient; plain C interface.
// Legend: rows T; stride Vs = columns of a shard, width W = its true ones; d = z - row max, e = exp(d).
// Results of T rows: f32 [3, T] = max, label logit, tau; f64 [4, T] = sum e, sum e d, and both over the nucleus.
#include "gradient.h"
#include "radix.h"

namespace {

template <class T>
int64_t forward_rows(const T* z, int64_t rows, int64_t stride, int64_t width, const int64_t* labels, double top_p,
                     int exclusive, int threads, float* f32, double* f64, int64_t* cut) {
  int64_t fallback = 0;
#pragma omp parallel num_threads(threads) reduction(+ : fallback)
  {
    FlushSubnormals guard;
    Scratch s(width);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < rows; t++) {
      const T* row = z + t * stride;
      const Sweep w = sweep_row(row, width, s.maxima.data());
      Result r = {w.max, NEG_INF, w.sum_e, w.sum_ed, NEG_INF, 0, w.sum_e, w.sum_ed, true};
      if (labels && labels[t] >= 0 && labels[t] < width) r.label = as_float(row[labels[t]]);
      if (!(w.sum_e > 0) || std::isinf(w.max)) {
        r.tau = r.max = NAN, r.sum_e = r.sum_ed = r.mass = r.mass_ed = NAN;
      } else if (top_p < 1.0) {
        r.sure = false;
        if (collect_top(row, width, w.max, 64, s)) local_nucleus(s, top_p, exclusive, r);
        if (!r.sure) select_row(row, width, top_p, exclusive, s, r), fallback++;
      }
      f32[t] = r.max, f32[rows + t] = r.label, f32[2 * rows + t] = r.tau, cut[t] = r.cut;
      f64[t] = r.sum_e, f64[rows + t] = r.sum_ed, f64[2 * rows + t] = r.mass, f64[3 * rows + t] = r.mass_ed;
    }
  }
  return fallback;
}

template <class T>
void sweep_rows(const T* z, int64_t rows, int64_t stride, int64_t width, const int64_t* labels, int top_k,
                int threads, float* pack, int64_t* columns) {
#pragma omp parallel num_threads(threads)
  {
    FlushSubnormals guard;
    Scratch s(width);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < rows; t++) {
      const T* row = z + t * stride;
      float* out = pack + t * (HEADER + top_k);
      const Sweep w = sweep_row(row, width, s.maxima.data());
      out[0] = w.max, out[1] = NEG_INF, out[6] = ENGINE, out[7] = 0;
      if (labels && labels[t] >= 0 && labels[t] < width) out[1] = as_float(row[labels[t]]);
      memcpy(out + 2, &w.sum_e, 8), memcpy(out + 4, &w.sum_ed, 8);
      if (!top_k) continue;
      // A list cut short by ties repeats the maximum: no threshold is then strictly above its tail.
      for (int k = 0; k < top_k; k++) out[HEADER + k] = w.max, columns[t * top_k + k] = 0;
      if (!(w.sum_e > 0) || !collect_top(row, width, w.max, top_k, s)) continue;
      const size_t n = std::min<size_t>(s.list.size(), top_k);
      std::partial_sort(s.list.begin(), s.list.begin() + n, s.list.end(), std::greater<uint64_t>());
      for (size_t k = 0; k < (size_t)top_k; k++) {
        out[HEADER + k] = k < n ? key_float(s.list[k]) : s.list_end;
        columns[t * top_k + k] = k < n ? key_id(s.list[k]) : 0;
      }
    }
  }
}

// Nucleus of rows from the ranks' packs [tp, T, 8 + K]; the twin of torch_engine.merge.
void merge_rows(const float* packs, int tp, int64_t rows, int top_k, int rank, const int64_t* columns, double top_p,
                bool exclusive, int threads, float* f32, double* f64, int64_t* cut, uint8_t* sure) {
  const int64_t words = HEADER + top_k;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < rows; t++) {
    auto pack = [&](int r) { return packs + (r * rows + t) * words; };
    Result r = {NEG_INF, NEG_INF, 0, 0, NEG_INF, 0, 0, 0, true};
    float tail = NEG_INF;
    for (int i = 0; i < tp; i++) {
      r.max = std::max(r.max, pack(i)[0]), r.label = std::max(r.label, pack(i)[1]);
      tail = std::max(tail, pack(i)[words - 1]);
    }
    for (int i = 0; i < tp; i++) {
      double e, ed;
      memcpy(&e, pack(i) + 2, 8), memcpy(&ed, pack(i) + 4, 8);
      const double shift = pack(i)[0] == NEG_INF ? -1e4 : (double)pack(i)[0] - r.max, scale = std::exp(shift);
      r.sum_e += e * scale, r.sum_ed += (ed + shift * e) * scale;
    }
    if (!(r.sum_e > 0) || std::isinf(r.max)) {
      r.tau = r.max = NAN, r.sum_e = r.sum_ed = r.mass = r.mass_ed = NAN;
    } else if (top_k == 0) {
      r.mass = r.sum_e, r.mass_ed = r.sum_ed;
    } else {
      r.sure = false;
      const double target = top_p * r.sum_e, slack = sum_slack(r.sum_ed / r.sum_e) * target;
      int at[1024] = {};
      for (;;) {
        int best = -1;
        for (int i = 0; i < tp; i++)
          if (at[i] < top_k && (best < 0 || pack(i)[HEADER + at[i]] > pack(best)[HEADER + at[best]])) best = i;
        if (best < 0) break;
        const float value = pack(best)[HEADER + at[best]++];
        if (!(value > tail)) break;
        const double d = (double)value - r.max, e = std::exp(d);
        if (r.mass + e < target) { r.mass += e, r.mass_ed += e * d; continue; }
        r.sure = r.mass + e >= target + slack && r.mass < target - slack;
        r.tau = value;
        if (exclusive) at[best]--;
        else r.mass += e, r.mass_ed += e * d;
        const int last = at[rank] - 1;
        if (last >= 0 && pack(rank)[HEADER + last] == value) r.cut = columns[t * top_k + last] + 1;
        break;
      }
    }
    f32[t] = r.max, f32[rows + t] = r.label, f32[2 * rows + t] = r.tau, cut[t] = r.cut, sure[t] = r.sure;
    f64[t] = r.sum_e, f64[rows + t] = r.sum_ed, f64[2 * rows + t] = r.mass, f64[3 * rows + t] = r.mass_ed;
  }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int64_t vp_forward(const void* z, int bf16, int64_t rows, int64_t stride, int64_t width, const int64_t* labels,
                          double top_p, int exclusive, int threads, float* f32, double* f64, int64_t* cut) {
  if (bf16)
    return forward_rows((const uint16_t*)z, rows, stride, width, labels, top_p, exclusive, threads, f32, f64, cut);
  return forward_rows((const float*)z, rows, stride, width, labels, top_p, exclusive, threads, f32, f64, cut);
}

EXPORT void vp_sweep(const void* z, int bf16, int64_t rows, int64_t stride, int64_t width, const int64_t* labels,
                     int top_k, int threads, float* pack, int64_t* columns) {
  if (bf16) sweep_rows((const uint16_t*)z, rows, stride, width, labels, top_k, threads, pack, columns);
  else sweep_rows((const float*)z, rows, stride, width, labels, top_k, threads, pack, columns);
}

EXPORT void vp_merge(const float* packs, int tp, int64_t rows, int top_k, int rank, const int64_t* columns,
                     double top_p, int exclusive, int threads, float* f32, double* f64, int64_t* cut, uint8_t* sure) {
  merge_rows(packs, tp, rows, top_k, rank, columns, top_p, exclusive, threads, f32, f64, cut, sure);
}

// The dense steps of the sharded radix select, for the rows z[index[0 .. rows)].
EXPORT void vp_histogram(const void* z, int bf16, const int64_t* index, int64_t rows, int64_t stride, int64_t width,
                         const float* row_max, int threads, double* histogram) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < rows; t++) {
    if (bf16) row_histogram((const uint16_t*)z + index[t] * stride, width, row_max[t], histogram + t * BINS);
    else row_histogram((const float*)z + index[t] * stride, width, row_max[t], histogram + t * BINS);
  }
}

// Counts (columns = null) or lists (from offsets[t]) the logits whose digit is bin[t].
EXPORT void vp_collect(const void* z, int bf16, const int64_t* index, int64_t rows, int64_t stride, int64_t width,
                       const float* row_max, const int64_t* bin, int threads, int64_t* offsets, int64_t* columns,
                       float* values) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < rows; t++) {
    float low_end, high_end;
    bin_bounds((int)bin[t], row_max[t], low_end, high_end);
    int64_t at = columns ? offsets[t] : 0;
    auto visit = [&](int64_t id, float x) {
      if (columns) columns[at] = id, values[at] = x;
      at++;
    };
    if (bf16) each_within((const uint16_t*)z + index[t] * stride, width, low_end, high_end, visit);
    else each_within((const float*)z + index[t] * stride, width, low_end, high_end, visit);
    if (!columns) offsets[t] = at;
  }
}

EXPORT void vp_ed_above(const void* z, int bf16, const int64_t* index, int64_t rows, int64_t stride, int64_t width,
                        const float* row_max, const float* tau, int threads, double* out) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < rows; t++) {
    if (bf16) out[t] = masked_ed((const uint16_t*)z + index[t] * stride, width, row_max[t], tau[t]);
    else out[t] = masked_ed((const float*)z + index[t] * stride, width, row_max[t], tau[t]);
  }
}

EXPORT void vp_backward(const void* z, void* out, int bf16, int64_t rows, int64_t stride, int64_t width,
                        const float* coefs, const float* row_max, const float* tau, const int64_t* cut,
                        const int64_t* labels, const float* label_grad, int stream, int threads) {
  if (bf16)
    backward_rows((const uint16_t*)z, (uint16_t*)out, rows, stride, width, coefs, row_max, tau, cut, labels,
                  label_grad, stream, threads);
  else
    backward_rows((const float*)z, (float*)out, rows, stride, width, coefs, row_max, tau, cut, labels, label_grad,
                  stream, threads);
}
