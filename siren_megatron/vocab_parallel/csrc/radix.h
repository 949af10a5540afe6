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
        t += blend(x > tau, exp_near(d) * d, vf{});
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
  alignas(64) double tables[8][BINS] = {};  // neighbours with one digit don't wait for each other
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
      for (int k = 0; k < LANES; k++) tables[k & 7][digit[k]] += e[k];
    }
  }
  for (int b = 0; b < BINS; b++) {
    out[b] = 0;
    for (int k = 0; k < 8; k++) out[b] += tables[k][b];
  }
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
  s.mass.resize(round_up(s.found, LANES));
  for (size_t i = 0; i < s.found; i += 8) {
    alignas(64) double d[8];
    for (size_t k = 0; k < 8; k++) d[k] = i + k < s.found ? (double)key_value(s.keys[i + k]) - max : -750.0;
    vd x; memcpy(&x, d, sizeof x);
    const vd e = exp_neg(x);
    memcpy(&s.mass[i], &e, sizeof e);
  }
}

void room_for(int64_t width, Scratch& s) {
  s.keys.resize(round_up(width, LANES) + LANES), s.ids.resize(s.keys.size()), s.found = 0;
}

template <class T>
void collect_bin(const T* z, int64_t width, int bin, float max, Scratch& s) {
  float low_end, high_end;
  bin_bounds(bin, max, low_end, high_end);
  room_for(width, s);
  each_within(z, width, low_end, high_end, [&](int64_t id, float x) {
    s.keys[s.found] = order_key(x), s.ids[s.found++] = (int32_t)id;
  });
}

// Exact nucleus of one unsharded row by radix select; the row is still in the cache.
template <class T>
void select_row(const T* z, int64_t width, double top_p, bool exclusive, Scratch& s, Result& r) {
  row_histogram(z, width, r.max, s.histogram);
  double sum = 0, above = 0;
  for (double x : s.histogram) sum += x;
  r.sum_e = sum;
  const double target = top_p * sum;
  collect_bin(z, width, pick(s.histogram, above, target), r.max, s);
  weigh_collected(r.max, s);
  size_t n = s.found;
  for (;;) {
    int32_t low_key = s.keys[0], top = s.keys[0];
    for (size_t i = 1; i < n; i++) low_key = std::min(low_key, s.keys[i]), top = std::max(top, s.keys[i]);
    const int64_t span = (int64_t)top - low_key;
    if (span == 0) break;
    int shift = 0;
    while (span >> shift >= BINS) shift++;
    auto digit = [&](size_t i) { return (int)(((int64_t)top - s.keys[i]) >> shift); };
    alignas(64) double tables[4][BINS] = {};
    for (size_t i = 0; i < n; i++) tables[i & 3][digit(i)] += s.mass[i];
    for (int b = 0; b < BINS; b++) s.histogram[b] = (tables[0][b] + tables[1][b]) + (tables[2][b] + tables[3][b]);
    const int bin = pick(s.histogram, above, target);
    size_t kept = 0;
    for (size_t i = 0; i < n; i++)
      if (digit(i) == bin) {
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
