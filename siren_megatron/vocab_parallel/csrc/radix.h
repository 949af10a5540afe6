// Exact radix select in float64 for the rows that the tournament cannot settle.
#pragma once
#include "sweep.h"

namespace {

// sum of e d over z > tau (fp32 terms, blockwise fp64 sums).
template <class T>
double masked_ed(const T* z, int64_t width, float max, float tau) {
  alignas(64) float tmp[CHUNK];
  vd sum = {};
  for (int64_t at = 0; at < width; at += CHUNK) {
    const int64_t n = std::min(CHUNK, width - at), room = round_up(n, BLOCK);
    const float* p = as_float(z + at, n, room, tmp);
    for (int64_t b = 0; b < room; b += BLOCK) {
      vf t = {};
      for (int64_t i = b; i < b + BLOCK; i += LANES) {
        const vf x = load(p + i), d = vmax(splat(LOWEST), x - max);
        t += blend(x > tau, exp_neg(d) * d, vf{});
      }
      sum += widen(low(t)) + widen(high(t));
    }
  }
  return hsum(sum);
}

// Mass histogram over the linear digit floor((max - z) c), exponentials and sums in fp64.
template <class T>
void row_histogram(const T* z, int64_t width, double max, double* out) {
  alignas(64) float tmp[CHUNK];
  alignas(64) double tables[2][BINS] = {};  // neighbours with one digit don't wait for each other
  for (int64_t at = 0; at < width; at += CHUNK) {
    const int64_t n = std::min(CHUNK, width - at), room = round_up(n, LANES);
    const float* p = as_float(z + at, n, room, tmp);
    for (int64_t i = 0; i < room; i += LANES) {
      alignas(64) double e[LANES];
      alignas(64) int32_t digit[LANES];
      const vf x = load(p + i);
      const vf8 halves[2] = {low(x), high(x)};
      for (int h = 0; h < 2; h++) {
        const vd d = vmaxd(splatd(-750.0), widen(halves[h]) - max), mass = exp_neg(d);
        const vd scaled = d * -PER_NAT, last = splatd(BINS - 1);
        const vi8 index = __builtin_convertvector(scaled > last ? last : scaled, vi8);
        memcpy(e + 8 * h, &mass, sizeof mass), memcpy(digit + 8 * h, &index, sizeof index);
      }
      for (int k = 0; k < LANES; k++) tables[k & 1][digit[k]] += e[k];
    }
  }
  for (int b = 0; b < BINS; b++) out[b] = tables[0][b] + tables[1][b];
}

int digit_of(float x, double max) {
  return (int)std::min(std::max((double)x - max, -750.0) * -PER_NAT, (double)(BINS - 1));
}

// The floats whose digit is `bin` are those in [low, high]: the digit falls monotonically with z.
void bin_bounds(int bin, float max, float& low, float& high) {
  auto lowest_with = [&](int limit) {  // lowest key whose digit is <= limit
    int64_t none = order_key(NEG_INF) - 1ll, some = order_key(max);
    while (some - none > 1) {
      const int64_t middle = (some + none) >> 1;
      (digit_of(key_value((int32_t)middle), max) <= limit ? some : none) = middle;
    }
    return (int32_t)some;
  };
  low = key_value(lowest_with(bin));
  high = bin == 0 ? max : key_value(lowest_with(bin - 1) - 1);
}

// First bin where the mass from above reaches the target (the last occupied one if rounding hides it).
int pick(const double* histogram, double& above, double target) {
  int last = 0;
  double last_above = above, sum = above;
  for (int b = 0; b < BINS; b++) {
    if (!(histogram[b] > 0)) continue;
    if (sum + histogram[b] >= target) { above = sum; return b; }
    last = b, last_above = sum, sum += histogram[b];
  }
  above = last_above;
  return last;
}

// Calls visit(column, logit) for the logits in [low, high], columns ascending.
template <class T, class F>
void each_within(const T* z, int64_t width, float low_end, float high_end, F visit) {
  alignas(64) float tmp[CHUNK];
  for (int64_t at = 0; at < width; at += CHUNK) {
    const int64_t n = std::min(CHUNK, width - at), room = round_up(n, LANES);
    const float* p = as_float(z + at, n, room, tmp);
    for (int64_t i = 0; i < room; i += LANES) {
      const vf x = load(p + i);
      uint32_t bits = ge_bits(x, splat(low_end)) & ge_bits(splat(high_end), x);
      for (; bits; bits &= bits - 1) {
        const int64_t k = i + __builtin_ctz(bits);
        if (k < n) visit(at + k, p[k]);
      }
    }
  }
}

// fp64 mass of every collected logit.
void weigh_collected(float max, Scratch& s) {
  const int64_t n = s.keys.size(), room = round_up(n, 8);
  s.mass.resize(room);
  for (int64_t i = 0; i < room; i += 8) {
    vd d;
    for (int k = 0; k < 8; k++) d[k] = i + k < n ? (double)key_value(s.keys[i + k]) - max : -750.0;
    const vd e = exp_neg(d);
    memcpy(&s.mass[i], &e, sizeof e);
  }
}

template <class T>
void collect_bin(const T* z, int64_t width, int bin, float max, Scratch& s) {
  float low_end, high_end;
  bin_bounds(bin, max, low_end, high_end);
  s.keys.clear(), s.ids.clear();
  each_within(z, width, low_end, high_end, [&](int64_t id, float x) {
    s.keys.push_back(order_key(x)), s.ids.push_back((int32_t)id);
  });
}

// Bounds around the threshold from a sample of the row: a guess, which the exact pass confirms or refutes.
template <class T>
bool guess_bounds(const T* z, int64_t width, double top_p, float max, float& low_end, float& high_end) {
  constexpr int64_t SAMPLE = 4096;
  if (width < 8 * SAMPLE) return false;
  alignas(64) float x[SAMPLE];
  double mass[BINS] = {}, sum = 0, squares = 0;
  for (int64_t i = 0; i < SAMPLE; i++) x[i] = as_float(z[i * width / SAMPLE]);
  for (int64_t i = 0; i < SAMPLE; i += LANES) {
    alignas(64) float e[LANES];
    store(e, exp_neg(vmax(splat(LOWEST), load(x + i) - max)));
    for (int k = 0; k < LANES; k++) {
      mass[digit_of(x[i + k], max)] += e[k], sum += e[k], squares += (double)e[k] * e[k];
    }
  }
  if (!(sum > 0)) return false;
  const double spread = 4 * std::sqrt(top_p * (1 - top_p) * squares) / sum;  // four standard errors
  int first = -1, last = BINS - 1;
  double cumulative = 0;
  for (int b = 0; b < BINS; b++) {
    cumulative += mass[b] / sum;
    if (first < 0 && cumulative > top_p - spread) first = b;
    if (cumulative > top_p + spread) { last = b; break; }
  }
  if (first < 0) return false;
  float unused;
  bin_bounds(first, max, unused, high_end);
  bin_bounds(last, max, low_end, unused);
  return true;
}

// One exact pass: sum of all e, sum of e above high_end, and the logits in [low_end, high_end].
template <class T>
void scan_between(const T* z, int64_t width, float low_end, float high_end, float max, Scratch& s, double& sum,
                  double& above) {
  alignas(64) float tmp[CHUNK];
  s.keys.clear(), s.ids.clear();
  vd all[2] = {}, higher[2] = {};
  for (int64_t at = 0; at < width; at += CHUNK) {
    const int64_t n = std::min(CHUNK, width - at), room = round_up(n, LANES);
    const float* p = as_float(z + at, n, room, tmp);
    for (int64_t i = 0; i < room; i += LANES) {
      const vf x = load(p + i);
      const vd halves[2] = {widen(low(x)), widen(high(x))};
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        const vd e = exp_neg(halves[h] - (double)max);
        all[h] += e;
        higher[h] += halves[h] > (double)high_end ? e : vd{};
      }
      uint32_t bits = ge_bits(x, splat(low_end)) & ge_bits(splat(high_end), x);
      for (; bits; bits &= bits - 1) {
        const int64_t k = i + __builtin_ctz(bits);
        if (k < n) s.keys.push_back(order_key(p[k])), s.ids.push_back((int32_t)(at + k));
      }
    }
  }
  sum = hsum(all[0] + all[1]), above = hsum(higher[0] + higher[1]);
}

// Exact nucleus of one unsharded row by radix select; the row is still in the cache.
template <class T>
void select_row(const T* z, int64_t width, double top_p, bool exclusive, Scratch& s, Result& r) {
  double sum = 0, above = 0, within = 0;
  float low_end, high_end;
  bool settled = false;
  if (guess_bounds(z, width, top_p, r.max, low_end, high_end)) {
    scan_between(z, width, low_end, high_end, r.max, s, sum, above);
    weigh_collected(r.max, s);
    for (size_t i = 0; i < s.keys.size(); i++) within += s.mass[i];
    const double margin = 1e-12 * sum;  // summation orders differ by less
    settled = above < top_p * sum - margin && above + within > top_p * sum + margin;
  }
  if (!settled) {
    row_histogram(z, width, r.max, s.histogram);
    sum = above = 0;
    for (double x : s.histogram) sum += x;
    collect_bin(z, width, pick(s.histogram, above, top_p * sum), r.max, s);
    weigh_collected(r.max, s);
  }
  r.sum_e = sum;
  const double target = top_p * sum;
  size_t n = s.keys.size();
  for (;;) {
    const auto [low, high] = std::minmax_element(s.keys.begin(), s.keys.begin() + n);
    const int64_t top = *high, span = top - *low;
    if (span == 0) break;
    int shift = 0;
    while (span >> shift >= BINS) shift++;
    memset(s.histogram, 0, sizeof s.histogram);
    for (size_t i = 0; i < n; i++) s.histogram[(top - s.keys[i]) >> shift] += s.mass[i];
    const int bin = pick(s.histogram, above, target);
    size_t kept = 0;
    for (size_t i = 0; i < n; i++)
      if ((top - s.keys[i]) >> shift == bin) {
        s.keys[kept] = s.keys[i], s.ids[kept] = s.ids[i], s.mass[kept] = s.mass[i], kept++;
      }
    n = kept;
  }
  const double weight = s.mass[0];
  double wanted = std::min(std::max(std::ceil((target - above) / weight), 1.0), (double)n);
  if (wanted > 1 && above + (wanted - 1) * weight >= target) wanted -= 1;  // the division rounded up
  else if (wanted < n && above + wanted * weight < target) wanted += 1;    // ... or down
  if (exclusive) wanted -= 1;
  r.tau = key_value(s.keys[0]);
  r.cut = wanted > 0 ? s.ids[(size_t)wanted - 1] + 1 : 0;
  r.mass = above + wanted * weight;
  r.mass_ed = r.mass > 0 ? masked_ed(z, width, r.max, r.tau) + wanted * weight * ((double)r.tau - r.max) : 0;
}

}  // namespace
