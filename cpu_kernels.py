"""Kernels for x86 CPUs in C++, compiled once for this machine: products of plain, int8 and int4 weights, the norm, and
attention of a few tokens to the cache.

What the compiler makes of plain PyTorch is slow for integers where a processor has AVX2 alone: SmolLM2 in int8 decoded
at 17 tokens/s, and at 153 with this file (benchmarks/README.md and log.md say from which runs). Decisions to know:

- `linear` takes any number of tokens. A row of weights is read once for up to 8 of them.
- For integer weights x is rounded to 16 bits with a scale for each 32 columns, and multiplied in integers. The error is
  2^-16 of the largest number in 32 at most.
- int4 weights are read as they are on disk: a 16-bit word holds columns 4 i to 4 i + 3, and x is laid out to match.
- Sums of products are float32 for each 32 columns, so no integer overflows.
- A 16-bit weight is read as it is and multiplied with float32, which is exact and reads half the bytes.
- Norm and attention are here because each call from a compiled graph costs microseconds, which one token's few numbers
  do not. Attention reads the used slots only, in parts for the threads.
- Memory is asked for 4 kB ahead. Rows of small models are too short for the processor to foresee the next ones.
- Threads are PyTorch's own. Two pools would wait for each other.
- The library is written once, under `$XDG_CACHE_HOME/gpt_twin` or `~/.cache/gpt_twin`, by a rename, so that processes
  may start together. Its name is a digest of all that it depends on.

`quantized_linear.py` and `fast_model.py` have the plain twin, which runs where there is no compiler or no AVX2.

Copy me: needs torch, and a C++ compiler (g++ or clang++).

Shapes: B batch, T tokens, N output rows, K input columns, G columns in a group, S cache slots, H query heads, KV kv
heads, C head dim.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <memory>
#include <new>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#ifdef __AVX512VNNI__
constexpr int W = 64;  // bytes in a vector
#else
constexpr int W = 32;
#endif
constexpr int L = W / 4;  // 32-bit numbers in a vector
constexpr int GROUP = 32;  // columns of x that share a scale
constexpr int MOST = 8;  // tokens for which a row of weights is read once
constexpr int AHEAD = 4096;  // bytes
constexpr int MOST_C = 512, MOST_ROWS = 128;  // of attention: head dim, and tokens times query heads of a kv head

typedef float Floats __attribute__((vector_size(W)));
typedef int32_t Ints __attribute__((vector_size(W)));
typedef int16_t Shorts __attribute__((vector_size(W)));
typedef uint16_t Words __attribute__((vector_size(W)));
typedef int8_t Bytes __attribute__((vector_size(W / 2)));
typedef uint16_t Halves __attribute__((vector_size(W / 2)));

template <class V> static inline V load(const void* p) { V v; memcpy(&v, p, sizeof(V)); return v; }

#ifdef __AVX512VNNI__
static inline Ints add_products(Ints sum, Shorts a, Shorts b) {
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
static inline Shorts widen(Bytes a) { return (Shorts)_mm512_cvtepi8_epi16((__m256i)a); }
static inline Ints widen(Halves a) { return (Ints)_mm512_cvtepu16_epi32((__m256i)a); }
static inline Floats pick(Floats a, Ints at) { return (Floats)_mm512_permutexvar_ps((__m512i)at, (__m512)a); }
static inline Floats from_f16(const void* p) { return (Floats)_mm512_cvtph_ps((__m256i)load<Halves>(p)); }
static inline Ints round(Floats a) { return (Ints)_mm512_cvtps_epi32((__m512)a); }
static inline float sum(Floats a) { return _mm512_reduce_add_ps((__m512)a); }
#else
static inline Ints add_products(Ints sum, Shorts a, Shorts b) {
  return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
static inline Shorts widen(Bytes a) { return (Shorts)_mm256_cvtepi8_epi16((__m128i)a); }
static inline Ints widen(Halves a) { return (Ints)_mm256_cvtepu16_epi32((__m128i)a); }
static inline Floats pick(Floats a, Ints at) { return (Floats)_mm256_permutevar8x32_ps((__m256)a, (__m256i)at); }
static inline Floats from_f16(const void* p) { return (Floats)_mm256_cvtph_ps((__m128i)load<Halves>(p)); }
static inline Ints round(Floats a) { return (Ints)_mm256_cvtps_epi32((__m256)a); }
static inline float sum(Floats a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#endif

static inline float from_bf16(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  return load<float>(&bits);
}
static inline Floats from_bf16(const void* p) { return (Floats)(widen(load<Halves>(p)) << 16); }
static inline uint16_t to_bf16(float x) {
  uint32_t bits = load<uint32_t>(&x);
  return x != x ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

struct Deleter { void operator()(void* p) const { ::operator delete[](p, std::align_val_t(64)); } };
template <class V> using Array = std::unique_ptr<V[], Deleter>;
template <class V> static Array<V> zeros(int64_t n) {
  void* p = ::operator new[](n * sizeof(V) + W, std::align_val_t(64));
  return Array<V>((V*)memset(p, 0, n * sizeof(V) + W));
}

// The numbers of a tensor that is float32 or bf16; `from` and `to` count numbers.
struct Numbers {
  void* data;
  bool bf16;
  void read(int64_t from, int64_t n, float* out) const {
    if (bf16) for (int64_t i = 0; i < n; i++) out[i] = from_bf16(((const uint16_t*)data)[from + i]);
    else memcpy(out, (const float*)data + from, n * sizeof(float));
  }
  void write(int64_t to, int64_t n, const float* x) const {
    if (bf16) for (int64_t i = 0; i < n; i++) ((uint16_t*)data)[to + i] = to_bf16(x[i]);
    else memcpy((float*)data + to, x, n * sizeof(float));
  }
};

// What a product is of: a weight has rows of `row_bytes`.
struct Job {
  int64_t T, N, K, G, row_bytes;
  const void *weight, *scales, *zeros;
  bool scales_are_bf16, gated;
  Numbers x, y;

  const uint8_t* row(int64_t n) const { return (const uint8_t*)weight + n * row_bytes; }
};

// 32 numbers rounded to 16 bits; returns their scale. NaN and infinity make it NaN.
static float round_group(const float* x, int16_t* rounded) {
  Floats most = {}, none = {};
  for (int i = 0; i < GROUP; i += L) {
    Floats part = load<Floats>(x + i), size = (Floats)((Ints)part & 0x7FFFFFFF);
    most = size > most ? size : most;
    none += part * 0.0f;
  }
  float largest = 1e-30f;
  for (int i = 0; i < L; i++) largest = std::max(largest, most[i]);
  for (int i = 0; i < GROUP; i += L) {
    Ints numbers = round(load<Floats>(x + i) * (32767 / largest));
    for (int j = 0; j < L; j++) rounded[i + j] = numbers[j];
  }
  return largest / 32767 + sum(none);
}

// Each kind of weight has `prepare` for a token of x, and `dot` of R rows from n with TT tokens from t, each a vector
// whose sum, times `scale` of the row, is the result.

template <bool IS_F16> struct Plain {
  const Job& job;
  Array<float> x;
  explicit Plain(const Job& job) : job(job), x(job.x.bf16 ? zeros<float>(job.T * job.K) : nullptr) {}
  bool prepares() const { return job.x.bf16; }
  void prepare(int64_t t) { job.x.read(t * job.K, job.K, x.get() + t * job.K); }
  float scale(int64_t) const { return 1; }
  template <int TT, int R> void dot(int64_t n, int64_t t, Floats (&sums)[R][TT]) const {
    const float* from = (x ? x.get() : (const float*)job.x.data) + t * job.K;
    for (int64_t k = 0; k < job.K; k += L) {
      UNROLL for (int r = 0; r < R; r++) {
        const uint8_t* at = job.row(n + r) + (IS_F16 ? 2 : 4) * k;
        __builtin_prefetch(at + AHEAD);
        Floats w = IS_F16 ? from_f16(at) : load<Floats>(at);
        UNROLL for (int i = 0; i < TT; i++) sums[r][i] += w * load<Floats>(from + i * job.K + k);
      }
    }
  }
};

// Even and odd columns become floats apart, so x is laid out as L even ones, then L odd ones.
struct Bf16 {
  const Job& job;
  Array<float> x;
  explicit Bf16(const Job& job) : job(job), x(zeros<float>(job.T * job.K)) {}
  bool prepares() const { return true; }
  void prepare(int64_t t) {
    float numbers[2 * L];
    for (int64_t k = t * job.K; k < (t + 1) * job.K; k += 2 * L) {
      job.x.read(k, 2 * L, numbers);
      for (int i = 0; i < 2 * L; i++) x[k + i % 2 * L + i / 2] = numbers[i];
    }
  }
  float scale(int64_t) const { return 1; }
  template <int TT, int R> void dot(int64_t n, int64_t t, Floats (&sums)[R][TT]) const {
    const float* from = x.get() + t * job.K;
    for (int64_t k = 0; k < job.K; k += 2 * L) {
      UNROLL for (int r = 0; r < R; r++) {
        const uint8_t* at = job.row(n + r) + 2 * k;
        __builtin_prefetch(at + AHEAD);
        Ints pairs = load<Ints>(at);
        Floats even = (Floats)(pairs << 16), odd = (Floats)(pairs & -65536);
        UNROLL for (int i = 0; i < TT; i++) {
          Floats x_even = load<Floats>(from + i * job.K + k), x_odd = load<Floats>(from + i * job.K + k + L);
          if (TT < 3) sums[r][i] += even * x_even + odd * x_odd;  // each sum waits for the one before it
          else sums[r][i] += even * x_even, sums[r][i] += odd * x_odd;  // an instruction less
        }
      }
    }
  }
};

struct Int8 {
  const Job& job;
  int64_t groups;
  Array<int16_t> x;
  Array<float> x_scales;
  explicit Int8(const Job& job)
      : job(job), groups(job.K / GROUP), x(zeros<int16_t>(job.T * job.K)), x_scales(zeros<float>(job.T * groups)) {}
  bool prepares() const { return true; }
  void prepare(int64_t t) {
    float numbers[GROUP];
    for (int64_t g = 0; g < groups; g++) {
      job.x.read(t * job.K + g * GROUP, GROUP, numbers);
      x_scales[t * groups + g] = round_group(numbers, x.get() + t * job.K + g * GROUP);
    }
  }
  float scale(int64_t n) const {
    return job.scales_are_bf16 ? from_bf16(((const uint16_t*)job.scales)[n]) : ((const float*)job.scales)[n];
  }
  template <int TT, int R> void dot(int64_t n, int64_t t, Floats (&sums)[R][TT]) const {
    constexpr int PARTS = 2 * GROUP / W;
    const int16_t* from = x.get() + t * job.K;
    const float* from_scales = x_scales.get() + t * groups;
    for (int64_t g = 0; g < groups; g++) {
      UNROLL for (int r = 0; r < R; r++) {
        const uint8_t* at = job.row(n + r) + g * GROUP;
        __builtin_prefetch(at + AHEAD);
        Shorts w[PARTS];
        UNROLL for (int p = 0; p < PARTS; p++) w[p] = widen(load<Bytes>(at + p * W / 2));
        UNROLL for (int i = 0; i < TT; i++) {
          Ints products = {};
          UNROLL for (int p = 0; p < PARTS; p++)
            products = add_products(products, w[p], load<Shorts>(from + i * job.K + g * GROUP + p * W / 2));
          sums[r][i] += __builtin_convertvector(products, Floats) * from_scales[i * groups + g];
        }
      }
    }
  }
};

// A block is a vector of words, so 8 L columns: four vectors of x, one for each nibble, and L scales of x, of which
// four neighbours are the same. The numbers are q * scale + (zero - 8 * scale), whose second part meets the sums of x.
struct Int4 {
  const Job& job;
  int64_t blocks, groups, padded, first_copied;
  Array<int16_t> x;
  Array<float> x_scales, x_sums;
  Array<uint8_t> copied;
  Array<uint16_t> copied_scales, copied_zeros;
  Ints spread[GROUP];  // which of L scales each lane of a block takes; G / 8 blocks share L scales

  explicit Int4(const Job& job) : job(job) {
    blocks = (job.K + 8 * L - 1) / (8 * L);
    groups = job.K / job.G;
    padded = (groups + L - 1) / L * L;
    x = zeros<int16_t>(job.T * blocks * 8 * L);
    x_scales = zeros<float>(job.T * blocks * L);
    x_sums = zeros<float>(job.T * padded);
    for (int b = 0; b < job.G / 8; b++)
      for (int i = 0; i < L; i++) spread[b][i] = (b * L + i) * 8 / job.G;
    // Of a row the last vectors may reach past it, which the matrix's last rows must not: of these there are copies.
    int64_t fit = std::min((job.N * job.row_bytes - blocks * W) / job.row_bytes, (job.N * groups - padded) / groups);
    first_copied = std::max<int64_t>(0, fit);
    int64_t rows = job.N - first_copied;
    copied = zeros<uint8_t>(rows * job.row_bytes + W);
    copied_scales = zeros<uint16_t>(rows * groups + L);
    copied_zeros = zeros<uint16_t>(rows * groups + L);
    memcpy(copied.get(), job.row(first_copied), rows * job.row_bytes);
    memcpy(copied_scales.get(), (const uint16_t*)job.scales + first_copied * groups, rows * groups * 2);
    memcpy(copied_zeros.get(), (const uint16_t*)job.zeros + first_copied * groups, rows * groups * 2);
  }
  bool prepares() const { return true; }
  void prepare(int64_t t) {
    float numbers[GROUP];
    int16_t rounded[GROUP];
    for (int64_t g = 0; g < job.K / GROUP; g++) {
      job.x.read(t * job.K + g * GROUP, GROUP, numbers);
      float scale = round_group(numbers, rounded);
      int total = 0;
      int16_t* to = x.get() + t * blocks * 8 * L + g * GROUP / (8 * L) * 8 * L + g * GROUP % (8 * L) / 4;
      for (int i = 0; i < GROUP; i++) to[i % 4 * 2 * L + i / 4] = rounded[i], total += rounded[i];
      for (int i = 0; i < 4; i++) x_scales[t * blocks * L + g * 4 + i] = scale;
      x_sums[t * padded + g * GROUP / job.G] += scale * total;
    }
  }
  float scale(int64_t) const { return 1; }
  template <int TT, int R> void dot(int64_t n, int64_t t, Floats (&sums)[R][TT]) const {
    const int16_t* from = x.get() + t * blocks * 8 * L;
    const float *from_scales = x_scales.get() + t * blocks * L, *from_sums = x_sums.get() + t * padded;
    const uint8_t* row[R];
    const uint16_t *scales[R], *zeros[R];
    for (int r = 0; r < R; r++) {
      int64_t copy = n + r - first_copied;
      row[r] = copy >= 0 ? copied.get() + copy * job.row_bytes : job.row(n + r);
      scales[r] = copy >= 0 ? copied_scales.get() + copy * groups : (const uint16_t*)job.scales + (n + r) * groups;
      zeros[r] = copy >= 0 ? copied_zeros.get() + copy * groups : (const uint16_t*)job.zeros + (n + r) * groups;
    }
    Floats some_scales[R];
    for (int64_t b = 0, part = 0, g = 0; b < blocks; b++) {
      if (part == 0) {
        UNROLL for (int r = 0; r < R; r++) some_scales[r] = from_bf16(scales[r] + g);
        g += L;
      }
      UNROLL for (int r = 0; r < R; r++) {
        __builtin_prefetch(row[r] + b * W + AHEAD);
        Words words = load<Words>(row[r] + b * W);
        Words parts[4] = {words & 15, words >> 4 & 15, words >> 8 & 15, words >> 12};
        Floats scale = pick(some_scales[r], spread[part]);
        UNROLL for (int i = 0; i < TT; i++) {
          Ints products = {};
          const int16_t* block = from + (i * blocks + b) * 8 * L;
          UNROLL for (int p = 0; p < 4; p++)
            products = add_products(products, (Shorts)parts[p], load<Shorts>(block + p * 2 * L));
          Floats both = scale * load<Floats>(from_scales + (i * blocks + b) * L);
          sums[r][i] += __builtin_convertvector(products, Floats) * both;
        }
      }
      if (++part == job.G / 8) part = 0;
    }
    for (int64_t g = 0; g < padded; g += L) {
      UNROLL for (int r = 0; r < R; r++) {
        Floats shift = from_bf16(zeros[r] + g) - 8.0f * from_bf16(scales[r] + g);
        UNROLL for (int i = 0; i < TT; i++) sums[r][i] += shift * load<Floats>(from_sums + i * padded + g);
      }
    }
  }
};

template <class Kind> struct Product {
  const Job& job;
  Kind kind;
  explicit Product(const Job& job) : job(job), kind(job) {}

  template <int TT, int R> void rows(int64_t& n, int64_t end, int64_t t, float*& y) const {
    for (; n + R <= end; n += R) {
      Floats sums[R][TT] = {};
      kind.template dot<TT, R>(n, t, sums);
      for (int r = 0; r < R; r++)
        for (int i = 0; i < TT; i++) *y++ = sum(sums[r][i]) * kind.scale(n + r);
    }
  }
  template <int TT, int R> int rows_of(int64_t n, int64_t end, int64_t t, float* y) const {
    rows<TT, R>(n, end, t, y);
    rows<TT, 1>(n, end, t, y);
    return TT;
  }
  // Results of rows n to end, y [rows, tokens], for the tokens from t on; returns how many tokens that were.
  int some_tokens(int64_t n, int64_t end, int64_t t, float* y) const {
    switch (std::min<int64_t>(job.T - t, MOST)) {
      case 1: return rows_of<1, 1>(n, end, t, y);
      case 2: return rows_of<2, 2>(n, end, t, y);
      case 3: return rows_of<3, 2>(n, end, t, y);
      case 4: return rows_of<4, 2>(n, end, t, y);
      case 5: return rows_of<5, 1>(n, end, t, y);
      case 6: return rows_of<6, 1>(n, end, t, y);
      case 7: return rows_of<7, 1>(n, end, t, y);
      default: return rows_of<MOST, W == 64 ? 2 : 1>(n, end, t, y);
    }
  }
  void multiply(int64_t begin, int64_t end) const {
    constexpr int ROWS = 16;  // at a time, which stay in the processor's cache for all tokens
    int64_t outs = job.gated ? job.N / 2 : job.N;
    float y[ROWS * MOST], up[ROWS * MOST], of_token[ROWS];
    for (int64_t n = begin, stop; n < end; n = stop) {
      stop = std::min(n + ROWS, end);
      for (int64_t t = 0, tokens; t < job.T; t += tokens) {
        tokens = some_tokens(n, stop, t, y);
        if (job.gated) {
          some_tokens(n + outs, stop + outs, t, up);
          for (int i = 0; i < (stop - n) * tokens; i++) y[i] = y[i] / (1 + std::exp(-y[i])) * up[i];
        }
        for (int i = 0; i < tokens; i++) {
          for (int64_t r = 0; r < stop - n; r++) of_token[r] = y[r * tokens + i];
          job.y.write((t + i) * outs + n, stop - n, of_token);
        }
      }
    }
  }
  void run() {
    auto prepare = [](int64_t t, int64_t end, void* self) { for (; t < end; t++) ((Product*)self)->kind.prepare(t); };
    auto part = [](int64_t begin, int64_t end, void* self) { ((const Product*)self)->multiply(begin, end); };
    if (kind.prepares()) torch_parallel_for(0, job.T, std::max<int64_t>(1, 65536 / job.K), prepare, this);
    torch_parallel_for(0, job.gated ? job.N / 2 : job.N, 16, part, this);
  }
};

// exp of numbers up to 0 to 1e-7 of itself: 2^n times a polynomial of the rest (Cephes, expf).
static inline Floats exp_of_negative(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  Ints n = round(x * 1.44269504f);
  Floats whole = __builtin_convertvector(n, Floats), r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  return y * (Floats)((n + 127) << 23);
}

struct AddNorm {
  int64_t D;
  Numbers x, update, weight, total, y;
  float eps;
  void row(int64_t n) const {
    Array<float> a = zeros<float>(D), b = zeros<float>(D);
    x.read(n * D, D, a.get());
    update.read(n * D, D, b.get());
    for (int64_t i = 0; i < D; i++) a[i] += b[i];
    total.write(n * D, D, a.get());
    total.read(n * D, D, a.get());  // as it was rounded
    Floats squares = {};
    for (int64_t i = 0; i < D; i += L) squares += load<Floats>(&a[i]) * load<Floats>(&a[i]);
    float factor = 1 / std::sqrt(sum(squares) / D + eps);
    weight.read(0, D, b.get());
    for (int64_t i = 0; i < D; i++) a[i] *= factor * b[i];
    y.write(n * D, D, a.get());
  }
};

struct Cache {
  Numbers numbers;
  uint16_t* scales;  // null unless the cache is int8
  // A head's numbers into slot `at`, rounded as `fast_model.quantize_heads` does it.
  void store(int64_t at, const float* x, int64_t C) const {
    if (!scales) return numbers.write(at * C, C, x);
    float most = 1e-8f;
    for (int64_t c = 0; c < C; c++) most = std::max(most, std::fabs(x[c]));
    scales[at] = to_bf16(most / 127);
    float scale = from_bf16(scales[at]);
    for (int64_t c = 0; c < C; c++)
      ((int8_t*)numbers.data)[at * C + c] = std::max(-127.0f, std::min(127.0f, std::nearbyintf(x[c] / scale)));
  }
  void read(int64_t at, float* x, int64_t C) const {
    if (!scales) return numbers.read(at * C, C, x);
    float scale = from_bf16(scales[at]);
    for (int64_t c = 0; c < C; c++) x[c] = ((const int8_t*)numbers.data)[at * C + c] * scale;
  }
};

// Softmax over parts of the slots, joined at the end (Dao et al. 2023, "Flash-Decoding").
struct Attention {
  static constexpr int TILE = 64;  // slots at a time
  int64_t B, T, H, KV, C, S, window, padded;
  Numbers q, k, v, y;
  const int64_t *q_strides, *k_strides, *v_strides;  // those of [B, T, heads, C]; a head's numbers are neighbours
  float scale;  // of the scores
  const float* sinks;  // [H], one more score of each head without a value, null for none
  const float* rope;  // cos and sin [B T, 2, C/2], null for no rotation
  const int64_t* position;  // [B, T]
  Cache keys, values;
  int64_t parts;
  Array<float> queries;  // [B, KV, rows, padded]
  Array<float> tops, totals, sums;  // [B, KV, parts, rows], the last [..., padded]

  int64_t rows() const { return T * H / KV; }
  // A head of a token, rotated and rounded once.
  void rotated(const Numbers& x, int64_t first, int64_t token, float* out) const {
    float numbers[MOST_C];
    x.read(first, C, rope ? numbers : out);
    if (!rope) return;
    const float *cosine = rope + token * C, *sine = cosine + C / 2, *a = numbers, *b = numbers + C / 2;
    for (int64_t i = 0; i < C / 2; i++) {
      out[i] = a[i] * cosine[i] - b[i] * sine[i];
      out[C / 2 + i] = b[i] * cosine[i] + a[i] * sine[i];
    }
    if (x.bf16) for (int64_t c = 0; c < C; c++) out[c] = from_bf16(to_bf16(out[c]));
  }
  void prepare(int64_t token) {
    int64_t b = token / T, t = token % T;
    float head[MOST_C];
    for (int64_t h = 0; h < H; h++) {
      int64_t row = (b * KV + h / (H / KV)) * rows() + t * (H / KV) + h % (H / KV);
      rotated(q, b * q_strides[0] + t * q_strides[1] + h * C, token, queries.get() + row * padded);
    }
    if (position[token] < 0 || position[token] >= S) return;
    for (int64_t h = 0; h < KV; h++) {
      int64_t slot = (b * KV + h) * S + position[token];
      rotated(k, b * k_strides[0] + t * k_strides[1] + h * C, token, head);
      keys.store(slot, head, C);
      v.read(b * v_strides[0] + t * v_strides[1] + h * C, C, head);
      values.store(slot, head, C);
    }
  }
  // One part of the slots of one kv head.
  void attend(int64_t item) {
    int64_t head = item / parts, part = item % parts, b = head / KV, M = rows(), per_token = H / KV;
    const float* query = queries.get() + head * M * padded;
    float *top = tops.get() + item * M, *total = totals.get() + item * M, *to = sums.get() + item * M * padded;
    int64_t oldest = std::max<int64_t>(0, position[b * T] - window + 1), newest = oldest;
    for (int64_t t = 0; t < T; t++) newest = std::max(newest, std::min(position[b * T + t] + 1, S));
    int64_t each = (newest - oldest + parts - 1) / parts, begin = oldest + part * each;
    int64_t end = std::min(begin + each, newest);
    for (int64_t m = 0; m < M; m++) top[m] = -1e30f, total[m] = 0;
    alignas(64) float numbers[TILE][MOST_C], scores[TILE];
    for (int64_t first = begin; first < end; first += TILE) {
      int64_t count = std::min<int64_t>(TILE, end - first);
      auto fetch = [&](const Cache& cache) {
        for (int64_t i = 0; i < count; i++) {
          cache.read(head * S + first + i, numbers[i], C);
          for (int64_t c = C; c < padded; c++) numbers[i][c] = 0;
        }
      };
      alignas(64) float weights[MOST_ROWS][TILE];
      fetch(keys);
      for (int64_t m = 0; m < M; m++) {
        int64_t last = position[b * T + m / per_token];
        float most = -1e30f;
        for (int64_t i = 0; i < TILE; i++) {
          scores[i] = -1e30f;
          if (i >= count || first + i > last || first + i <= last - window) continue;
          Floats products = {};
          for (int64_t c = 0; c < padded; c += L)
            products += load<Floats>(query + m * padded + c) * load<Floats>(numbers[i] + c);
          scores[i] = sum(products) * scale;
          most = scores[i] > most ? scores[i] : most;
        }
        float higher = std::max(top[m], most), fade = std::exp(top[m] - higher);
        Floats all = {};
        for (int64_t i = 0; i < TILE; i += L) {
          Floats weight = exp_of_negative(load<Floats>(scores + i) - higher);
          memcpy(weights[m] + i, &weight, W);
        }
        for (int64_t i = 0; i < TILE; i++)
          if (scores[i] <= -1e30f) weights[m][i] = 0;
        for (int64_t i = 0; i < TILE; i += L) all += load<Floats>(weights[m] + i);
        top[m] = higher, total[m] = total[m] * fade + sum(all);
        for (int64_t c = 0; c < padded; c++) to[m * padded + c] *= fade;
      }
      fetch(values);
      for (int64_t m = 0; m < M; m++)
        for (int64_t c = 0; c < padded; c += L) {
          Floats result = load<Floats>(to + m * padded + c);
          for (int64_t i = 0; i < count; i++) result += weights[m][i] * load<Floats>(numbers[i] + c);
          memcpy(to + m * padded + c, &result, W);
        }
    }
  }
  void join(int64_t head) const {
    int64_t M = rows(), per_token = H / KV, b = head / KV;
    for (int64_t m = 0; m < M; m++) {
      float sink = sinks ? sinks[head % KV * per_token + m % per_token] : -1e30f, top = sink, result[MOST_C] = {};
      for (int64_t p = 0; p < parts; p++) top = std::max(top, tops[(head * parts + p) * M + m]);
      float total = sinks ? std::exp(sink - top) : 0;
      for (int64_t p = 0; p < parts; p++) {
        int64_t at = (head * parts + p) * M + m;
        float share = std::exp(tops[at] - top);
        total += totals[at] * share;
        for (int64_t c = 0; c < C; c++) result[c] += sums[at * padded + c] * share;
      }
      for (int64_t c = 0; c < C; c++) result[c] /= total;
      y.write(((b * T + m / per_token) * H + head % KV * per_token + m % per_token) * C, C, result);
    }
  }
  void run() {
    uint32_t threads;
    torch_get_num_threads(&threads);
    int64_t longest = 0;
    for (int64_t i = 0; i < B * T; i++) longest = std::max(longest, std::min({position[i] + 1, S, window + T}));
    parts = std::min((4 * (int64_t)threads + B * KV - 1) / (B * KV), (longest + TILE - 1) / TILE);
    parts = std::max<int64_t>(parts, 1);
    padded = (C + L - 1) / L * L;
    int64_t all = B * KV * parts * rows();
    queries = zeros<float>(B * T * H * padded), tops = zeros<float>(all), totals = zeros<float>(all);
    sums = zeros<float>(all * padded);
    for (int64_t i = 0; i < B * T; i++) prepare(i);
    auto part = [](int64_t i, int64_t end, void* self) { for (; i < end; i++) ((Attention*)self)->attend(i); };
    torch_parallel_for(0, B * KV * parts, 1, part, this);
    for (int64_t i = 0; i < B * KV; i++) join(i);
  }
};

// Operators: the arguments are those of the functions in Python, the tensors contiguous where nothing else is said.
struct Tensor {
  AtenTensorHandle handle;
  void* data;
  int64_t *sizes, *strides;
  int32_t dtype;
  explicit Tensor(AtenTensorHandle handle) : handle(handle) {
    aoti_torch_get_data_ptr(handle, &data);
    aoti_torch_get_sizes(handle, &sizes);
    aoti_torch_get_strides(handle, &strides);
    aoti_torch_get_dtype(handle, &dtype);
  }
  explicit Tensor(StableIValue value) : Tensor((AtenTensorHandle)value) {}
  bool bf16() const { return dtype == aoti_torch_dtype_bfloat16(); }
  Numbers numbers() const { return {data, bf16()}; }
};
static Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype) {
  int64_t strides[4], stride = 1;
  for (int i = sizes.size() - 1; i >= 0; i--) strides[i] = stride, stride *= sizes.begin()[i];
  AtenTensorHandle handle;
  aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides, dtype, aoti_torch_device_type_cpu(), 0, &handle);
  return Tensor(handle);
}
static void release(StableIValue* stack, int count) {
  for (int i = 0; i < count; i++) aoti_torch_delete_tensor_object((AtenTensorHandle)stack[i]);
}

static void linear(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x(stack[0]), weight(stack[1]), scales(stack[2]), zeros(stack[3]);
  bool gated = (bool)stack[4];
  int64_t T = x.sizes[0], K = x.sizes[1], N = weight.sizes[0];
  Tensor y = empty({T, gated ? N / 2 : N}, x.dtype);
  Job job = {T, N, K};
  job.weight = weight.data, job.scales = scales.data, job.zeros = zeros.data, job.scales_are_bf16 = scales.bf16();
  job.x = x.numbers(), job.y = y.numbers(), job.gated = gated;
  if (weight.dtype == aoti_torch_dtype_uint8()) {
    job.G = K / scales.sizes[1], job.row_bytes = K / 2;
    Product<Int4>(job).run();
  } else if (weight.dtype == aoti_torch_dtype_int8()) {
    job.row_bytes = K;
    Product<Int8>(job).run();
  } else if (weight.bf16()) {
    job.row_bytes = 2 * K;
    Product<Bf16>(job).run();
  } else if (weight.dtype == aoti_torch_dtype_float16()) {
    job.row_bytes = 2 * K;
    Product<Plain<true>>(job).run();
  } else {
    job.row_bytes = 4 * K;
    Product<Plain<false>>(job).run();
  }
  release(stack, 4);
  stack[0] = (StableIValue)y.handle;
}

static void add_norm(StableIValue* stack, uint64_t, uint64_t) {
  Tensor x(stack[0]), update(stack[1]), weight(stack[2]);
  double eps = load<double>(&stack[3]);
  int64_t T = x.sizes[0], D = x.sizes[1];
  Tensor total = empty({T, D}, x.dtype), y = empty({T, D}, x.dtype);
  AddNorm job = {D, x.numbers(), update.numbers(), weight.numbers(), total.numbers(), y.numbers(), (float)eps};
  auto rows = [](int64_t n, int64_t end, void* self) { for (; n < end; n++) ((const AddNorm*)self)->row(n); };
  torch_parallel_for(0, T, std::max<int64_t>(1, 65536 / D), rows, &job);
  release(stack, 3);
  stack[0] = (StableIValue)total.handle, stack[1] = (StableIValue)y.handle;
}

static void attention(StableIValue* stack, uint64_t, uint64_t) {
  Tensor q(stack[0]), k(stack[1]), v(stack[2]), rope(stack[3]), position(stack[4]);
  Tensor keys(stack[5]), values(stack[6]), key_scales(stack[7]), value_scales(stack[8]), sinks(stack[9]);
  bool scaled = keys.dtype == aoti_torch_dtype_int8();
  Attention job = {};
  job.B = q.sizes[0], job.T = q.sizes[1], job.H = q.sizes[2], job.C = q.sizes[3], job.KV = k.sizes[2];
  job.S = keys.sizes[2], job.window = (int64_t)stack[10], job.scale = load<double>(&stack[11]);
  job.q = q.numbers(), job.k = k.numbers(), job.v = v.numbers();
  job.q_strides = q.strides, job.k_strides = k.strides, job.v_strides = v.strides;
  job.rope = rope.dtype == aoti_torch_dtype_float32() ? (const float*)rope.data : nullptr;
  job.sinks = sinks.dtype == aoti_torch_dtype_float32() ? (const float*)sinks.data : nullptr;
  job.position = (const int64_t*)position.data;
  job.keys = {keys.numbers(), scaled ? (uint16_t*)key_scales.data : nullptr};
  job.values = {values.numbers(), scaled ? (uint16_t*)value_scales.data : nullptr};
  Tensor y = empty({job.B, job.T, job.H, job.C}, q.dtype);
  job.y = y.numbers();
  job.run();
  release(stack, 10);
  stack[0] = (StableIValue)y.handle;
}

extern "C" void register_operators() {
  TorchLibraryHandle library;  // stays, as long as the process
  aoti_torch_library_init_impl("gpt_twin", "CPU", __FILE__, __LINE__, &library);
  aoti_torch_library_impl(library, "cpu_linear", linear);
  aoti_torch_library_impl(library, "cpu_add_norm", add_norm);
  aoti_torch_library_impl(library, "cpu_attention", attention);
}
""".replace("UNROLL", '_Pragma("GCC unroll 8")')

FLAGS = {
    "avx512_vnni": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx2 -mfma -mf16c",
    "avx2": "-mavx2 -mfma -mf16c",
}
FEW = 16  # tokens


def instruction_sets() -> list[str]:
    """Those of FLAGS that can be used here, the fastest first; `ATEN_CPU_CAPABILITY` hides some, as from PyTorch."""
    if sys.platform != "linux":
        return []
    capability = torch.backends.cpu.get_cpu_capability()
    vnni = capability == "AVX512" and torch.cpu._is_vnni_supported()
    return ["avx512_vnni"] * vnni + ["avx2"] * (capability in ("AVX2", "AVX512"))


def compile_library(instructions: str) -> Path | None:
    """The library for an instruction set, from the cache or made now; None where nothing makes it."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "c++", "clang++"))), None)
    if compiler is None:
        return None
    torch_folder = Path(torch.__file__).parent
    options = ["-std=c++17", "-O3", "-shared", "-fPIC", "-w", *FLAGS[instructions].split()]
    options += [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    digest = hashlib.sha256(repr((SOURCE, compiler, options, torch.__version__)).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt_twin"
        library = folder / f"cpu_kernels_{instructions}_{digest}.so"
        if library.exists():
            return library
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            source, made = Path(temporary) / "cpu_kernels.cpp", Path(temporary) / library.name
            source.write_text(SOURCE)
            subprocess.run([compiler, source, *options, "-o", made], check=True, capture_output=True)
            os.replace(made, library)
    except (OSError, RuntimeError, subprocess.CalledProcessError):  # no home, no room, another torch
        return None
    return library


@cache
def register_kernels() -> bool:
    """Whether the operators have their kernels. The first call compiles these, which takes some seconds once."""
    for library in filter(None, map(compile_library, instruction_sets())):
        ctypes.CDLL(str(library)).register_operators()
        return True
    return False


def available() -> bool:
    """Whether these kernels run here: on x86 processors with AVX2, under Linux, beside a C++ compiler."""
    return register_kernels()


def has_bf16_instructions() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()


# A graph that is being made calls these two and keeps what they say. torch.compiler.assume_constant_result sets just
# this, and loads the compiler, which takes a second.
available._dynamo_marked_constant = has_bf16_instructions._dynamo_marked_constant = True


def is_certain(condition) -> bool:
    """Whether it holds, of a dynamic T whatever that is, and without a guard. Outside a graph nothing is imported,
    which would take half a second. (`tp.py` has the same, since either file is copied without the other.)"""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def runs_on(x) -> bool:
    """Whether activations x are of a kind that `add_norm` and `attention` take. They have no gradients."""
    plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and plain and available()


def takes(x, weight) -> bool:
    """Whether `linear` takes x [T, K] and this weight, and is the fastest to do so: PyTorch's product of many tokens is
    faster in float32, and in bf16 if the processor has instructions for it."""
    kinds = [torch.int8, torch.uint8]
    if x.dtype == torch.float32:  # 16 bits are read as they are, and no other product does so
        kinds += [torch.bfloat16, torch.float16]
    if is_certain(x.shape[0] <= FEW):  # of a dynamic T this is False, and no guard
        kinds += [torch.float32, torch.bfloat16]
    elif not has_bf16_instructions():
        kinds.append(torch.bfloat16)
    return x.shape[-1] % 32 == 0 and weight.dtype in kinds and runs_on(x)


def linear(x, weight, scales=None, zeros=None, gated: bool = False):
    """y [T, N] of x [T, K], float32 or bf16, and weight [N, K]: float32, bf16, float16, or int8 with scales [N]; or
    packed int4 [N, K/2], as `quantized_linear.Int4Linear` has it, with scales and zeros [N, K/G] in bf16. K is a
    multiple of 32. Call `available` first; `takes` does.

    With `gated`, y [T, N/2] is silu of the first half of the rows' products times the second half's. Raises ValueError
    for x of another width or dtype.
    """
    columns = weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
    if x.shape[1] != columns or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"x is {list(x.shape)} in {x.dtype}; it must have {columns} columns in float32 or bfloat16")
    scales, zeros = weight if scales is None else scales, weight if zeros is None else zeros  # that are not read
    return torch.ops.gpt_twin.cpu_linear(*(t.contiguous() for t in (x, weight, scales, zeros)), gated)


def add_norm(x, update, weight, eps: float):
    """x [..., D] + update and its RMS norm."""
    rows = x.flatten(0, -2).contiguous(), update.flatten(0, -2).contiguous()
    total, y = torch.ops.gpt_twin.cpu_add_norm(*rows, weight.contiguous(), eps)
    return total.view(x.shape), y.view(x.shape)


def attention_takes(q, k_cache) -> bool:
    """Whether `attention` takes queries q [B, T, H, C] beside a cache [B, KV, S, C]."""
    rows = q.shape[1] * q.shape[2] // k_cache.shape[1]
    few = is_certain(q.shape[1] <= FEW) and rows <= 128 and q.shape[3] <= 512
    return few and k_cache.dtype in (q.dtype, torch.int8) and runs_on(q)


def attention(qkv, rope, input_pos, caches, window: int, scale: float, sinks=None):
    """y [B, T, H, C] for `qkv`, which are q [B, T, H, C], k and v [B, T, KV, C], not yet rotated, at `input_pos` [B, T]
    and `rope` [B or 1, T, 1, 2, C/2] in float32 (None: no rotation). `caches` are those of keys and values
    [B, KV, S, C], which get the new ones, and of their bf16 scales [B, KV, S] if they are int8, else None. Each token
    sees the last `window` slots up to its own; `scale` multiplies the scores, to which `sinks` [H] add one of each head
    that has no value.

    It does not declare that it changes the caches, because a nested compile region refuses operators that do (torch
    2.13). So in a graph nothing else may read them after it, and its result has to be used.
    """
    (B, _, _, C), (k_cache, v_cache, k_scales, v_scales) = qkv[0].shape, caches
    q, k, v = (t if t.stride()[2:] == (C, 1) else t.contiguous() for t in qkv)
    rope = input_pos if rope is None else rope.expand(B, -1, -1, -1, -1).contiguous()
    sinks = input_pos if sinks is None else sinks.float().contiguous()
    scales = (k_cache, v_cache) if k_scales is None else (k_scales, v_scales)  # none are read if there are none
    return torch.ops.gpt_twin.cpu_attention(
        q, k, v, rope, input_pos.long().contiguous(), k_cache, v_cache, *scales, sinks, window, scale
    )


OPERATORS = {
    "cpu_linear(Tensor x, Tensor weight, Tensor scales, Tensor zeros, bool gated) -> Tensor": (
        lambda x, weight, scales, zeros, gated: x.new_empty(x.shape[0], weight.shape[0] // (2 if gated else 1))
    ),
    "cpu_add_norm(Tensor x, Tensor update, Tensor weight, float eps) -> (Tensor, Tensor)": (
        lambda x, update, weight, eps: (torch.empty_like(x), torch.empty_like(x))
    ),
    "cpu_attention(Tensor q, Tensor k, Tensor v, Tensor rope, Tensor input_pos, Tensor k_cache, Tensor v_cache, "
    "Tensor k_scales, Tensor v_scales, Tensor sinks, int window, float scale) -> Tensor": lambda q, *others: (
        q.new_empty(q.shape)
    ),
}
for schema, fake in OPERATORS.items():
    name = schema.split("(")[0]
    if not hasattr(torch.ops.gpt_twin, name):  # a lifted copy may be loaded beside this file
        torch.library.define(f"gpt_twin::{name}", schema.removeprefix(name))
        torch.library.register_fake(f"gpt_twin::{name}", fake)
