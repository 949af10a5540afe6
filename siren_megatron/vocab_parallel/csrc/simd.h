// Vectors of 16 fp32 / 8 fp64 lanes by the compiler's vector extension: zmm with AVX-512, pairs elsewhere.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef double vd __attribute__((vector_size(64)));
typedef int64_t vl __attribute__((vector_size(64)));
typedef float vf8 __attribute__((vector_size(32)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef int32_t vi8 __attribute__((vector_size(32)));
constexpr int LANES = 16;

#define INLINE static inline __attribute__((always_inline))

INLINE vf splat(float x) { return vf{} + x; }
INLINE vd splatd(double x) { return vd{} + x; }
INLINE vf load(const float* p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

// The second operand where the comparison is false, so a NaN in b survives and a NaN in a doesn't.
INLINE vf vmax(vf a, vf b) {
#ifdef __AVX512F__
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
INLINE vd vmaxd(vd a, vd b) {
#ifdef __AVX512F__
  return (vd)_mm512_max_pd((__m512d)a, (__m512d)b);
#else
  return a > b ? a : b;
#endif
}
INLINE vf blend(vi mask, vf yes, vf no) { return mask ? yes : no; }
INLINE bool any(vi mask) {
#ifdef __AVX512F__
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  int32_t m[LANES]; memcpy(m, &mask, sizeof m);
  int32_t r = 0;
  for (int i = 0; i < LANES; i++) r |= m[i];
  return r != 0;
#endif
}
INLINE uint32_t ge_bits(vf a, vf b) {  // bit i: a[i] >= b[i]
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#else
  uint32_t r = 0;
  for (int i = 0; i < LANES; i++) r |= (uint32_t)(a[i] >= b[i]) << i;
  return r;
#endif
}
INLINE uint32_t gt_bits(vf a, vf b) {  // bit i: a[i] > b[i]
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#else
  uint32_t r = 0;
  for (int i = 0; i < LANES; i++) r |= (uint32_t)(a[i] > b[i]) << i;
  return r;
#endif
}
INLINE float hmax(vf v) {  // ignores NaN
  float r = -__builtin_inff();
  for (int i = 0; i < LANES; i++) r = v[i] > r ? v[i] : r;
  return r;
}
INLINE double hsum(vd v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }
INLINE vf8 low(vf v) { vf8 r; memcpy(&r, &v, sizeof r); return r; }
INLINE vf8 high(vf v) { vf8 r; memcpy(&r, (const char*)&v + sizeof r, sizeof r); return r; }
INLINE vd widen(vf8 v) { return __builtin_convertvector(v, vd); }

INLINE vf load_bf16(const uint16_t* p) {
  vh h; memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vi) << 16);
}
INLINE vf get(const float* p) { return load(p); }
INLINE vf get(const uint16_t* p) { return load_bf16(p); }
INLINE vh round_bf16(vf v) {  // round to nearest even
#ifdef __AVX512BF16__
  return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
  vi u = (vi)v;
  u = u + 0x7FFF + ((u >> 16) & 1);
  return __builtin_convertvector((u >> 16) & 0xFFFF, vh);
#endif
}
INLINE float bf16_to_float(uint16_t h) { uint32_t u = (uint32_t)h << 16; float f; memcpy(&f, &u, 4); return f; }
INLINE uint16_t float_to_bf16(float f) {
  uint32_t u; memcpy(&u, &f, 4);
  if (f != f) return (uint16_t)((u >> 16) | 0x40);
  return (uint16_t)((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

constexpr float LOWEST = -88.029692f;  // below it exp_neg is exactly 0; d is clamped here: no 0 * (-inf)

// exp(d) for LOWEST <= d < 88, relative error below 3e-7 + 1.4e-8 |d|; exactly 0 at LOWEST; NaN stays NaN.
// d log2(e) = r + f with integer r: 2^f by a minimax polynomial, 2^r from the bits left in the magic sum.
INLINE vf exp_near(vf d) {
  const vf magic = splat(12582912.0f + 127.0f);
  vf t = d * 1.44269502f + magic;
  vf f = d * 1.44269502f - (t - magic);
  vf p = splat(0.00132764724548906f);
  p = p * f + 0.00967554189264774f;
  p = p * f + 0.0555071309208869f;
  p = p * f + 0.240221202373505f;
  p = p * f + 0.693146944046020f;
  p = p * f + 1.0f;
  return p * (vf)((vi)t << 23);
}

// exp(d) for d <= 0 in fp64, relative error a few 1e-16; exactly 0 below -708; NaN stays NaN.
INLINE vd exp_neg(vd d) {
  d = vmaxd(splatd(-709.0), d);
  const vd magic = splatd(6755399441055744.0 + 1023.0);
  vd t = d * 1.4426950408889634 + magic;
  vd r = t - magic;
  vd f = d - r * 0.6931471805599453;
  f = f - r * 2.3190468138462996e-17;
  vd p = splatd(1.0 / 479001600.0);
  p = p * f + 1.0 / 39916800.0;
  p = p * f + 1.0 / 3628800.0;
  p = p * f + 1.0 / 362880.0;
  p = p * f + 1.0 / 40320.0;
  p = p * f + 1.0 / 5040.0;
  p = p * f + 1.0 / 720.0;
  p = p * f + 1.0 / 120.0;
  p = p * f + 1.0 / 24.0;
  p = p * f + 1.0 / 6.0;
  p = p * f + 0.5;
  p = p * f + 1.0;
  p = p * f + 1.0;
  return p * (vd)((vl)t << 52);
}

// Integers in the order of the floats; -0.0 and 0.0 share one.
INLINE int32_t order_key(float v) {
  v += 0.0f;
  int32_t k; memcpy(&k, &v, 4);
  return k < 0 ? (int32_t)(0x80000000u - (uint32_t)k) : k;
}
INLINE float key_value(int32_t k) {
  uint32_t u = k < 0 ? 0x80000000u - (uint32_t)k : (uint32_t)k;
  float v; memcpy(&v, &u, 4);
  return v;
}

// Subnormal results are flushed inside a kernel (they cost a hundred cycles each on some CPUs).
struct FlushSubnormals {
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();
  FlushSubnormals() { _mm_setcsr(saved | 0x8000); }
  ~FlushSubnormals() { _mm_setcsr(saved); }
#endif
};
