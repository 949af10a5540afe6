// grad = e (a0 + a1 d + 1_N (b0 + b1 d)) + label term: one read and one write.
#pragma once
#include "sweep.h"

namespace {

INLINE void put(float* p, vf v, bool stream) {
#ifdef __AVX512F__
  if (stream) { _mm512_stream_ps(p, (__m512)v); return; }
#endif
  store(p, v);
}
INLINE void put(uint16_t* p, vf v, bool stream) {
  const vh h = round_bf16(v);
#ifdef __AVX512F__
  if (stream) { _mm256_stream_si256((__m256i*)p, (__m256i)h); return; }
#endif
  memcpy(p, &h, sizeof h);
}
INLINE float narrow(float x, const float*) { return x; }
INLINE uint16_t narrow(float x, const uint16_t*) { return float_to_bf16(x); }

struct Slopes { float a0, a1, b0, b1, max; };

enum Mask { NONE, AT_LEAST, ABOVE };  // which columns are in the nucleus: none, z >= tau, z > tau

INLINE vf grad_of(vf x, const Slopes& c) {
  const vf d = vmax(splat(LOWEST), x - c.max);
  return exp_near(d) * (c.a0 + c.a1 * d);
}
INLINE vf grad_of(vf x, const Slopes& c, vi inside) {
  const vf d = vmax(splat(LOWEST), x - c.max);
  return exp_near(d) * (blend(inside, splat(c.b0), splat(c.a0)) + blend(inside, splat(c.b1), splat(c.a1)) * d);
}
template <Mask MASK>
INLINE vf masked_grad(vf x, const Slopes& c, float tau) {
  if (MASK == NONE) return grad_of(x, c);
  return grad_of(x, c, MASK == AT_LEAST ? x >= tau : x > tau);
}

template <Mask MASK>
INLINE uint32_t inside_bits(vf x, float tau) {
  return MASK == AT_LEAST ? ge_bits(x, splat(tau)) : MASK == ABOVE ? gt_bits(x, splat(tau)) : 0;
}

template <Mask MASK, class T>
INLINE void grad_range(const T* z, T* out, int64_t from, int64_t to, const Slopes& c, float tau, bool stream) {
  int64_t i = from;
  for (; i + 64 <= to; i += 64) {
    vf x[4];
    uint32_t inside = 0;
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) {
      x[u] = get(z + i + 16 * u);
      __builtin_prefetch(z + i + 16 * u + 2048);
      inside |= inside_bits<MASK>(x[u], tau);
    }
    if (MASK != NONE && inside) {  // most groups hold no member of the nucleus
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) put(out + i + 16 * u, masked_grad<MASK>(x[u], c, tau), stream);
      continue;
    }
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) put(out + i + 16 * u, grad_of(x[u], c), stream);
  }
  for (; i < to; i += LANES) put(out + i, masked_grad<MASK>(get(z + i), c, tau), stream);
}

// Fewer than 16 columns, or those among which the id cut falls.
template <class T>
void grad_part(const T* z, T* out, int64_t from, int64_t to, const Slopes& c, bool masked, float tau, int64_t cut) {
  alignas(64) T zs[LANES] = {}, os[LANES];
  for (int64_t i = from; i < to; i++) zs[i - from] = z[i];
  const vf x = get(zs);
  vi lane;
  for (int k = 0; k < LANES; k++) lane[k] = from + k < cut ? -1 : 0;
  put(os, masked ? grad_of(x, c, (x > tau) | ((x == tau) & lane)) : grad_of(x, c), false);
  for (int64_t i = from; i < to; i++) out[i] = os[i - from];
}

template <class T>
void backward_rows(const T* z, T* out, int64_t rows, int64_t stride, int64_t width, const float* coefs,
                   const float* row_max, const float* tau, const int64_t* cut, const int64_t* labels,
                   const float* label_grad, int stream_wanted, int threads) {
#pragma omp parallel num_threads(threads)
  {
    FlushSubnormals guard;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < rows; t++) {
      const T* x = z + t * stride;
      T* y = out + t * stride;
      const float* a = coefs + 4 * t;
      const bool masked = a[2] != 0 || a[3] != 0;
      const Slopes c = {a[0], a[1], a[0] + a[2], a[1] + a[3], row_max[t]};
      const bool stream = stream_wanted && ((uintptr_t)y % 64 == 0) && (sizeof(T) * width) % 64 == 0;
      const bool labelled = labels[t] >= 0 && labels[t] < width;
      const float label_logit = labelled ? as_float(x[labels[t]]) : 0;
      const int64_t whole = width / LANES * LANES;
      if (!masked) {
        grad_range<NONE>(x, y, 0, whole, c, 0, stream);
      } else {
        const int64_t turn = std::min(cut[t] / LANES * LANES, whole);
        int64_t rest = turn;
        grad_range<AT_LEAST>(x, y, 0, turn, c, tau[t], stream);
        if (turn < whole && cut[t] % LANES) {
          grad_part(x, y, turn, turn + LANES, c, true, tau[t], cut[t]);
          rest += LANES;
        }
        grad_range<ABOVE>(x, y, rest, whole, c, tau[t], stream);
      }
      if (whole < width) grad_part(x, y, whole, width, c, masked, tau[t], cut[t]);
      for (int64_t i = width; i < stride; i++) y[i] = 0;
      if (labelled) {
        const float d = std::max(label_logit - c.max, LOWEST);
        const bool inside = label_logit > tau[t] || (label_logit == tau[t] && labels[t] < cut[t]);
        const float slope = masked && inside ? c.b0 + c.b1 * d : c.a0 + c.a1 * d;
        const float g = std::exp(d) * slope + label_grad[t];
        y[labels[t]] = narrow(g != g || c.max != c.max ? NAN : g, y);
      }
    }
#if defined(__x86_64__)
    _mm_sfence();
#endif
  }
}

}  // namespace
