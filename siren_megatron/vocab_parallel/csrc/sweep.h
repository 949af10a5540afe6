// One pass over a row: sums, the largest logits, and the nucleus where these prove it.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>
#include "simd.h"

namespace {

constexpr float NEG_INF = -std::numeric_limits<float>::infinity();
constexpr int64_t CHUNK = 4096;    // columns handled while they are in the L1 cache
constexpr int64_t BLOCK = 512;     // columns that share one vector of 16 lane maxima
constexpr int HEADER = 8;
constexpr float ENGINE = 1;        // who made a pack; ranks with different engines merge in plain torch
constexpr int BINS = 1024;
constexpr double PER_NAT = 32.0;
constexpr size_t CANDIDATES = 8192;

struct Sweep { float max; double sum_e, sum_ed; };
struct Result { float max, label; double sum_e, sum_ed; float tau; int64_t cut; double mass, mass_ed; bool sure; };

struct Scratch {
  std::vector<float> row, maxima;
  std::vector<uint64_t> list;
  float list_end = 0;  // every logit >= list_end is in the list
  std::vector<int32_t> keys, ids;  // `found` logits near the threshold, columns ascending
  size_t found = 0;
  std::vector<double> mass;
  double histogram[BINS];
  explicit Scratch(int64_t width) : maxima(((width + CHUNK - 1) / CHUNK) * (CHUNK / BLOCK) * LANES) {}
};

INLINE const float* as_float(const float* p, int64_t n, int64_t room, float* tmp) {
  if (n == room) return p;
  memcpy(tmp, p, n * sizeof(float));
  for (int64_t i = n; i < room; i++) tmp[i] = NEG_INF;
  return tmp;
}
INLINE const float* as_float(const uint16_t* p, int64_t n, int64_t room, float* tmp) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(tmp + i, load_bf16(p + i));
  for (; i < n; i++) tmp[i] = bf16_to_float(p[i]);
  for (; i < room; i++) tmp[i] = NEG_INF;
  return tmp;
}
INLINE float as_float(float x) { return x; }
INLINE float as_float(uint16_t x) { return bf16_to_float(x); }
INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Moves the sums' origin up from one maximum to another: returns sum e, changes sum e d.
INLINE vd rescaled(vd sum_e, vd& sum_ed, float from, float to) {
  if (from == NEG_INF) return sum_e;  // nothing but zeros so far (or a NaN, which stays)
  const double shift = (double)from - to, scale = std::exp(shift);
  sum_ed = (sum_ed + shift * sum_e) * scale;
  return sum_e * scale;
}

// Sums of one chunk relative to an origin near its maximum, the lane maxima of its blocks, and its maximum.
struct Chunk { float max; vd sum_e, sum_ed; };

template <class P>
INLINE Chunk chunk_sums(const P* p, int64_t room, float origin, float* maxima, const char* ahead) {
  vf chunk_max = splat(NEG_INF);
  vd sum_e = {}, sum_ed = {};
  for (int64_t b = 0; b < room; b += BLOCK) {
    vf top[4] = {splat(NEG_INF), splat(NEG_INF), splat(NEG_INF), splat(NEG_INF)}, e[4] = {}, ed[4] = {};
    for (int64_t i = b; i < b + BLOCK; i += 64) {
      for (int k = 0; k < 64 * (int)sizeof(P); k += 64) __builtin_prefetch(ahead + i * sizeof(P) + k);
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) {
        const vf x = get(p + i + 16 * u), d = vmax(splat(LOWEST), x - origin), mass = exp_near(d);
        top[u] = vmax(x, top[u]);
        e[u] += mass;
        ed[u] += mass * d;
      }
    }
    const vf block_max = vmax(vmax(top[0], top[1]), vmax(top[2], top[3]));
    store(maxima + b / BLOCK * LANES, block_max);
    chunk_max = vmax(block_max, chunk_max);
    const vf s = (e[0] + e[1]) + (e[2] + e[3]), t = (ed[0] + ed[1]) + (ed[2] + ed[3]);
    sum_e += widen(low(s)) + widen(high(s));
    sum_ed += widen(low(t)) + widen(high(t));
  }
  return {hmax(chunk_max), sum_e, sum_ed};
}

template <class T>
float first_max(const T* z, int64_t n) {
  float top = NEG_INF;
  for (int64_t i = 0; i < n; i++) top = as_float(z[i]) > top ? as_float(z[i]) : top;
  return top;
}

// Max, sum e, sum e d in one read. The origin of a chunk's exponentials is the maximum before it: far enough
// below its own that they could overflow, the chunk is done again.
template <class T>
Sweep sweep_row(const T* z, int64_t width, float* maxima) {
  alignas(64) float tmp[CHUNK];
  float m = NEG_INF;
  vd se = {}, sd = {};
  for (int64_t at = 0; at < width; at += CHUNK) {
    const int64_t n = std::min(CHUNK, width - at), room = round_up(n, BLOCK);
    float* const lanes = maxima + at / BLOCK * LANES;
    const float* padded = n == room ? nullptr : as_float(z + at, n, room, tmp);
    const char* ahead = (const char*)(z + at + CHUNK);
    auto sums = [&] {
      const float origin = m == NEG_INF ? 0.0f : m;
      return padded ? chunk_sums(padded, room, origin, lanes, ahead) : chunk_sums(z + at, room, origin, lanes, ahead);
    };
    if (m == NEG_INF) m = first_max(z + at, std::min(n, BLOCK));
    if (m == NEG_INF) m = first_max(z + at, n);
    Chunk c = sums();
    if (m != NEG_INF && c.max > m + 60.0f && !std::isinf(c.max)) {
      se = rescaled(se, sd, m, c.max), m = c.max;
      c = sums();
    }
    se += c.sum_e, sd += c.sum_ed;
    if (c.max > m) se = rescaled(se, sd, m, c.max), m = c.max;
  }
  return {m, hsum(se), hsum(sd)};
}

// Bound on the relative error of a sweep's sum e; the same for every engine's fp32 sums (see docs).
double sum_slack(double mean_d) { return 1.1920929e-7 * (24.0 + 2.0 * std::fabs(mean_d)); }

uint64_t pack_key(float v, int64_t id) {  // descending value, then ascending id = descending integer
  return (uint64_t)((uint32_t)order_key(v) ^ 0x80000000u) << 32 | (0xFFFFFFFFu - (uint32_t)id);
}
float key_float(uint64_t key) { return key_value((int32_t)((uint32_t)(key >> 32) ^ 0x80000000u)); }
int64_t key_id(uint64_t key) { return 0xFFFFFFFFu - (uint32_t)key; }

// All logits >= a threshold that about `want` of them reach. False: too many ties to list.
template <class T>
bool collect_top(const T* z, int64_t width, float max, size_t want, Scratch& s) {
  s.list.clear();
  const int64_t blocks = round_up(width, BLOCK) / BLOCK, lanes = blocks * LANES;
  auto count_ge = [&](float x) {
    size_t count = 0;
    for (int64_t i = 0; i < lanes; i += LANES) count += __builtin_popcount(ge_bits(load(&s.maxima[i]), splat(x)));
    return count;
  };
  float low_end = max - 40.0f, high_end = max;
  if (count_ge(low_end) > want + want / 2)
    for (int i = 0; i < 24; i++) {
      const float middle = 0.5f * (low_end + high_end);
      if (!(middle > low_end && middle < high_end)) break;
      const size_t count = count_ge(middle);
      if (count < want) { high_end = middle; continue; }
      low_end = middle;
      if (count <= want + want / 2) break;
    }
  s.list_end = low_end;
  alignas(64) float tmp[BLOCK];
  for (int64_t b = 0; b < blocks; b++) {
    if (!ge_bits(load(&s.maxima[b * LANES]), splat(low_end))) continue;
    const int64_t at = b * BLOCK, n = std::min(BLOCK, width - at);
    const float* p = as_float(z + at, n, BLOCK, tmp);
    for (int64_t i = 0; i < BLOCK; i += LANES)
      for (uint32_t bits = ge_bits(load(p + i), splat(low_end)); bits; bits &= bits - 1) {
        const int64_t k = i + __builtin_ctz(bits);
        s.list.push_back(pack_key(p[k], at + k));
      }
    if (s.list.size() > CANDIDATES) return false;
  }
  return true;
}

// Nucleus of one unsharded row from its collected top logits; sure = proved.
void local_nucleus(Scratch& s, double top_p, bool exclusive, Result& r) {
  auto& heap = s.list;
  std::make_heap(heap.begin(), heap.end());
  const double target = top_p * r.sum_e, slack = sum_slack(r.sum_ed / r.sum_e) * target;
  double mass = 0, mass_ed = 0;
  for (size_t left = heap.size(); left > 0; left--) {
    const uint64_t key = heap.front();
    const double d = (double)key_float(key) - r.max, e = std::exp(d);
    if (mass + e >= target) {
      r.sure = mass + e >= target + slack && mass < target - slack;
      r.tau = key_float(key), r.cut = exclusive ? key_id(key) : key_id(key) + 1;
      r.mass = exclusive ? mass : mass + e;
      r.mass_ed = exclusive ? mass_ed : mass_ed + e * d;
      return;
    }
    mass += e, mass_ed += e * d;
    std::pop_heap(heap.begin(), heap.begin() + left);
  }
}

}  // namespace
