/* Group norm, with what follows it, and weight standardization on a CPU, whose threads share the work whatever the number
   of groups.

   All tensors are contiguous. They are read and written in pieces of `piece` elements, short enough to stay in the first
   cache, in which bfloat16 and float16 are converted to float32 and back. The sums of pieces are added up in float64 in one
   order: no result depends on the number of threads.

   Python calls these functions by name and cannot check their arguments: with other arguments, give them other names. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* A cluster may build this on one machine and run it on another. */
#if defined(__x86_64__) && defined(__GLIBC__)
#define VECTORIZED __attribute__((noinline, target_clones("avx512f", "avx2", "default")))
#else
#define VECTORIZED __attribute__((noinline))
#endif
#define INLINE static inline __attribute__((always_inline))

enum { NO_ACTIVATION, RELU, SILU };
enum { FLOAT32, BFLOAT16, FLOAT16 };

/* f(..., kept, activation), compiled for each activation, with and without `kept`: no loop asks which it is. */
#define SPECIALIZED(f, kept, activation, ...) \
  ((kept) ? (activation) == RELU   ? f(__VA_ARGS__, kept, RELU) \
            : (activation) == SILU ? f(__VA_ARGS__, kept, SILU) \
                                   : f(__VA_ARGS__, kept, NO_ACTIVATION) \
   : (activation) == RELU ? f(__VA_ARGS__, NULL, RELU) \
   : (activation) == SILU ? f(__VA_ARGS__, NULL, SILU) \
                          : f(__VA_ARGS__, NULL, NO_ACTIVATION))

typedef struct { double mean, m2; } moments_t; /* m2: sum of squared differences from the mean */
typedef struct { double dy, dy_x; } sums_t;    /* of dy, and of dy times (x - mean) or (x - mean) rstd */
typedef struct { double x, constant; } factors_t;   /* dx is dy scale + (x - mean) x + constant */
typedef struct { float mean, scale, shift; } map_t; /* from x to (x - mean) scale + shift */

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE uint32_t bits_of(float number) {
  uint32_t bits;
  memcpy(&bits, &number, sizeof bits);
  return bits;
}

INLINE float number_of(uint32_t bits) {
  float number;
  memcpy(&number, &bits, sizeof number);
  return number;
}

INLINE float from_float16(uint16_t half) {
  uint32_t magnitude = half & 0x7fff;
  float number = number_of(magnitude << 13) * 0x1p112f; /* the exponents of float16 and float32 differ by 112 */
  uint32_t not_finite = magnitude < 0x7c00 ? 0 : 0x7f800000;
  return number_of(bits_of(number) | not_finite | (uint32_t)(half & 0x8000) << 16);
}

/* Adding a power of 2 whose last bit is worth as much as that of the result rounds to the nearest, and of two equally near
   to the even one, as PyTorch does. There is no branch, so that it is vectorized. */
INLINE uint16_t to_float16(float number) {
  uint32_t bits = bits_of(number), magnitude = bits & 0x7fffffff, exponent = magnitude & 0x7f800000;
  float power = number_of((exponent < 0x38800000 ? 0x38800000 : exponent) + 0x07800000);
  uint32_t sum = bits_of(number_of(magnitude) * 0x1p112f * 0x1p-110f + power); /* infinite from 2 to the 16 on */
  uint32_t nan = magnitude > 0x7f800000 ? 0x7e00 : 0;
  return (bits >> 16 & 0x8000) | ((sum >> 13 & 0x7c00) + (sum & 0xfff)) | nan;
}

INLINE uint16_t to_bfloat16(float number) {
  uint32_t bits = bits_of(number);
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

VECTORIZED static void widen(float *restrict to, const uint16_t *restrict from, int64_t n, int type) {
  if (type == BFLOAT16) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] = number_of((uint32_t)from[i] << 16);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] = from_float16(from[i]);
  }
}

VECTORIZED static void narrow(uint16_t *restrict to, const float *restrict from, int64_t n, int type) {
  if (type == BFLOAT16) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] = to_bfloat16(from[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] = to_float16(from[i]);
  }
}

/* n elements of a tensor from `first` on: where they are if they are floats, else converted into `buffer`. */
static const float *load(const void *tensor, int64_t first, int64_t n, int type, float *buffer) {
  if (!tensor) return NULL;
  if (type == FLOAT32) return (const float *)tensor + first;
  widen(buffer, (const uint16_t *)tensor + first, n, type);
  return buffer;
}

/* Where to write elements of a tensor from `first` on, as floats: in their place, or in `buffer`, from which store() converts
   them. */
static float *place(void *tensor, int64_t first, int type, float *buffer) {
  return tensor && type == FLOAT32 ? (float *)tensor + first : buffer;
}

static void store(void *tensor, int64_t first, int64_t n, int type, const float *buffer) {
  if (tensor && type != FLOAT32) narrow((uint16_t *)tensor + first, buffer, n, type);
}

/* e to the v, to 2 units in the last place: 2 to the k times a polynomial of what is left, within half a ln 2. */
INLINE float exponential(float v) {
  v = v > 88.9f ? 88.9f : v; /* beyond 88.7 it is infinite */
  v = v < -87 ? -87 : v;
  float shifted = v * 1.44269504f + 12582912; /* 1.5 times 2 to the 23: the last bits are k */
  float k = shifted - 12582912, r = (v - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.f / 5040;
  p = p * r + 1.f / 720, p = p * r + 1.f / 120, p = p * r + 1.f / 24, p = p * r + 1.f / 6, p = p * r + .5f;
  p = p * r * r + r + 1;
  return p * number_of((bits_of(shifted) + 127) << 23);
}

INLINE float activated(float t, int activation) {
  if (activation == RELU) return t < 0 ? 0 : t; /* NaN stays */
  return activation == SILU ? t / (1 + exponential(-t)) : t;
}

/* What activated() passes back of dy. `kept` is what was added to the normalized x, of RELU the output. */
INLINE float passed_back(float dy, float x, map_t map, const float *kept, int activation) {
  if (activation == NO_ACTIVATION) return dy;
  float t = kept && activation == RELU ? 0 : (x - map.mean) * map.scale + map.shift;
  if (kept) t += *kept;
  if (activation == RELU) { /* t <= 0 ? 0 : dy, which would be compiled to a load of dy that waits for t */
    uint32_t bits = bits_of(t);
    return number_of(bits_of(dy) & ~(uint32_t)((int32_t)(bits | (bits - 1)) >> 31));
  }
  float sigmoid = 1 / (1 + exponential(-t));
  return dy * (sigmoid * (1 + t * (1 - sigmoid)));
}

INLINE moments_t moments_of_short_piece(const float *x, int64_t n) {
  float sum = 0, rest = 0, m2 = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += x[i];
  float shift = sum / n; /* squares alone would lose the variance of values with a large mean */
#pragma omp simd reduction(+ : rest, m2)
  for (int64_t i = 0; i < n; i++) {
    float difference = x[i] - shift;
    rest += difference, m2 += difference * difference;
  }
  double correction = rest;
  return (moments_t){shift + correction / n, m2 - correction * correction / n};
}

/* From some length on in two halves at once, as each addition waits for the one before it. */
VECTORIZED static moments_t moments_of_piece(const float *x, int64_t n) {
  if (n < 1024) return moments_of_short_piece(x, n);
  float sum = n % 2 ? x[n - 1] : 0, other_sum = 0;
  const float *other_x = x + n / 2;
#pragma omp simd reduction(+ : sum, other_sum)
  for (int64_t i = 0; i < n / 2; i++) sum += x[i], other_sum += other_x[i];
  float shift = (sum + other_sum) / n;
  float rest = n % 2 ? x[n - 1] - shift : 0, other_rest = 0, m2 = rest * rest, other_m2 = 0;
#pragma omp simd reduction(+ : rest, m2, other_rest, other_m2)
  for (int64_t i = 0; i < n / 2; i++) {
    float difference = x[i] - shift, other = other_x[i] - shift;
    rest += difference, m2 += difference * difference;
    other_rest += other, other_m2 += other * other;
  }
  double correction = (double)rest + other_rest;
  return (moments_t){shift + correction / n, m2 + other_m2 - correction * correction / n};
}

/* What passes the activation is written to `passed` where there is `kept`, and of SILU, which takes long to compute. */
INLINE sums_t sums_of(float *restrict passed, const float *restrict dy, const float *restrict x, int64_t n, map_t map,
                      const float *restrict kept, int activation) {
  float sum_dy = 0, sum_dy_x = 0;
#pragma omp simd reduction(+ : sum_dy, sum_dy_x)
  for (int64_t i = 0; i < n; i++) {
    float before = passed_back(dy[i], x[i], map, kept ? kept + i : NULL, activation);
    if (kept || activation == SILU) passed[i] = before;
    sum_dy += before;
    sum_dy_x += before * (x[i] - map.mean);
  }
  return (sums_t){sum_dy, sum_dy_x};
}

VECTORIZED static sums_t sums_of_piece(float *passed, const float *dy, const float *x, int64_t n, map_t map,
                                       const float *kept, int activation) {
  return SPECIALIZED(sums_of, kept, activation, passed, dy, x, n, map);
}

INLINE void normalized(float *restrict y, const float *restrict x, int64_t n, map_t map, const float *restrict residual,
                       int activation) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    float t = (x[i] - map.mean) * map.scale + map.shift;
    if (residual) t += residual[i];
    y[i] = activated(t, activation);
  }
}

VECTORIZED static void normalize(float *y, const float *x, int64_t n, map_t map, const float *residual, int activation) {
  SPECIALIZED(normalized, residual, activation, y, x, n, map);
}

/* dx may be dy. */
INLINE void differentiated(float *dx, const float *dy, const float *x, int64_t n, map_t map,
                           float x_factor, float constant, const float *kept, int activation) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++)
    dx[i] = passed_back(dy[i], x[i], map, kept, activation) * map.scale + (x[i] - map.mean) * x_factor + constant;
}

VECTORIZED static void differentiate(float *dx, const float *dy, const float *x, int64_t n, map_t map, float x_factor,
                                     float constant, int activation) {
  SPECIALIZED(differentiated, (const float *)NULL, activation, dx, dy, x, n, map, x_factor, constant);
}

static moments_t merge(const moments_t *piece_moments, int64_t pieces, int64_t size, int64_t piece) {
  moments_t whole = {0, 0};
  if (pieces == 1) return *piece_moments;
  for (int64_t i = 0; i < pieces; i++) whole.mean += piece_moments[i].mean * smaller(piece, size - i * piece);
  whole.mean /= size;
  for (int64_t i = 0; i < pieces; i++) {
    double difference = piece_moments[i].mean - whole.mean;
    whole.m2 += piece_moments[i].m2 + difference * difference * smaller(piece, size - i * piece);
  }
  return whole;
}

static map_t map_of_row(int64_t row, const float *mean, const float *rstd, const float *weight, const float *bias,
                        int64_t channels, int64_t per_group) {
  int64_t group = row / per_group, channel = row % channels;
  return (map_t){mean[group], rstd[group] * (weight ? weight[channel] : 1), bias ? bias[channel] : 0};
}

/* x: (images, channels, positions) of `type`; mean, rstd: (images, groups); partial: (images, groups, pieces of a group) */
void gng_d2_group_norm_statistics(const void *x, float *mean, float *rstd, moments_t *partial, int64_t all_groups,
                                  int64_t size, int64_t piece, int64_t type, double eps, int threads) {
  int64_t pieces = (size + piece - 1) / piece;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < all_groups * pieces; i++) {
      float buffer[piece];
      int64_t start = i % pieces * piece, n = smaller(piece, size - start);
      partial[i] = moments_of_piece(load(x, i / pieces * size + start, n, type, buffer), n);
    }
#pragma omp for schedule(static)
    for (int64_t group = 0; group < all_groups; group++) {
      moments_t moments = merge(partial + group * pieces, pieces, size, piece);
      mean[group] = moments.mean;
      rstd[group] = 1 / sqrt((moments.m2 < 0 ? 0 : moments.m2 / size) + eps);
    }
  }
}

/* x, y, residual: (images, channels, positions) of `type`, of which residual may be null; weight, bias: (channels) or null;
   mean, rstd: (images, groups) */
void gng_d2_group_norm_apply(const void *x, const float *mean, const float *rstd, const float *weight, const float *bias,
                             const void *residual, void *y, int64_t images, int64_t channels, int64_t positions,
                             int64_t groups, int64_t piece, int64_t type, int64_t activation, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < images * channels; row++) {
    float buffers[3][piece];
    map_t map = map_of_row(row, mean, rstd, weight, bias, channels, channels / groups);
    for (int64_t i = row * positions, end = i + positions; i < end; i += piece) {
      int64_t n = smaller(piece, end - i);
      normalize(place(y, i, type, buffers[0]), load(x, i, n, type, buffers[1]), n, map,
                load(residual, i, n, type, buffers[2]), activation);
      store(y, i, n, type, buffers[0]);
    }
  }
}

/* The sums of each row, and in `passed`, if there is one, what passes the activation. Every thread of a team calls this. */
static void sum_rows(const void *dy, const void *x, const float *mean, const float *rstd, const float *weight,
                     const float *bias, const void *kept, void *passed, sums_t *sums_of_row, int64_t rows, int64_t channels,
                     int64_t positions, int64_t per_group, int64_t piece, int64_t type, int64_t activation) {
#pragma omp for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    float buffers[4][piece];
    map_t map = map_of_row(row, mean, rstd, weight, bias, channels, per_group);
    sums_t sums = {0, 0};
    for (int64_t i = row * positions, end = i + positions; i < end; i += piece) {
      int64_t n = smaller(piece, end - i);
      sums_t more = sums_of_piece(place(passed, i, type, buffers[0]), load(dy, i, n, type, buffers[1]),
                                  load(x, i, n, type, buffers[2]), n, map, load(kept, i, n, type, buffers[3]),
                                  activation);
      store(passed, i, n, type, buffers[0]);
      sums.dy += more.dy, sums.dy_x += more.dy_x * rstd[row / per_group];
    }
    sums_of_row[row] = sums;
  }
}

/* dx of each row, with the factors of its group. Every thread of a team calls this. dx may be dy. */
static void differentiate_rows(const void *dy, const void *x, const float *mean, const float *rstd, const float *weight,
                               const float *bias, const factors_t *factors, void *dx, int64_t rows, int64_t channels,
                               int64_t positions, int64_t per_group, int64_t piece, int64_t type, int64_t activation) {
#pragma omp for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    float buffers[3][piece];
    map_t map = map_of_row(row, mean, rstd, weight, bias, channels, per_group);
    factors_t f = factors[row / per_group];
    for (int64_t i = row * positions, end = i + positions; i < end; i += piece) {
      int64_t n = smaller(piece, end - i);
      differentiate(place(dx, i, type, buffers[0]), load(dy, i, n, type, buffers[1]), load(x, i, n, type, buffers[2]), n,
                    map, f.x, f.constant, activation);
      store(dx, i, n, type, buffers[0]);
    }
  }
}

/* The same shapes; row_sums: (images, channels); factors: (images, groups). With an activation, `kept` is null or what was
   added to the normalized x, of RELU the output, and dresidual takes the gradient of what was added. */
void gng_d2_group_norm_gradients(const void *dy, const void *x, const float *mean, const float *rstd, const float *weight,
                                 const float *bias, const void *kept, void *dx, float *dweight, float *dbias,
                                 void *dresidual, sums_t *row_sums, factors_t *factors, int64_t images, int64_t channels,
                                 int64_t positions, int64_t groups, int64_t piece, int64_t type, int64_t activation,
                                 int threads) {
  int64_t per_group = channels / groups, rows = images * channels;
  void *passed = kept ? dresidual : activation == SILU ? dx : NULL;
#pragma omp parallel num_threads(threads)
  {
    sum_rows(dy, x, mean, rstd, weight, bias, kept, passed, row_sums, rows, channels, positions, per_group, piece, type,
             activation);
#pragma omp for schedule(static) nowait
    for (int64_t channel = 0; channel < channels; channel++) {
      sums_t sums = {0, 0};
      for (int64_t row = channel; row < rows; row += channels)
        sums.dy += row_sums[row].dy, sums.dy_x += row_sums[row].dy_x;
      dbias[channel] = sums.dy, dweight[channel] = sums.dy_x;
    }
#pragma omp for schedule(static)
    for (int64_t group = 0; group < images * groups; group++) {
      sums_t sums = {0, 0};
      for (int64_t row = group * per_group; row < (group + 1) * per_group; row++) {
        double scale = weight ? weight[row % channels] : 1;
        sums.dy += scale * row_sums[row].dy, sums.dy_x += scale * row_sums[row].dy_x;
      }
      double share = -rstd[group] / (double)(per_group * positions);
      factors[group] = (factors_t){share * rstd[group] * sums.dy_x, share * sums.dy};
    }
    differentiate_rows(passed ? passed : dy, x, mean, rstd, weight, bias, factors, dx, rows, channels, positions, per_group,
                       piece, type, passed ? NO_ACTIVATION : activation);
  }
}

/* Learned group norm, in whose arrays each channel of each image has its own mean and rstd: groups of one channel. */
void gng_d2_row_sums(const void *dy, const void *x, const float *mean, const float *rstd, sums_t *sums, int64_t rows,
                     int64_t positions, int64_t piece, int64_t type, int threads) {
#pragma omp parallel num_threads(threads)
  sum_rows(dy, x, mean, rstd, NULL, NULL, NULL, NULL, sums, rows, rows, positions, 1, piece, type, NO_ACTIVATION);
}

void gng_d2_row_gradients(const void *dy, const void *x, const float *mean, const float *rstd, const float *weight,
                          const factors_t *factors, void *dx, int64_t images, int64_t channels, int64_t positions,
                          int64_t piece, int64_t type, int threads) {
#pragma omp parallel num_threads(threads)
  differentiate_rows(dy, x, mean, rstd, weight, NULL, factors, dx, images * channels, channels, positions, 1, piece, type,
                     NO_ACTIVATION);
}

/* Groups of sizes[k] channels are level k; level 0 is the channels, the last level one group of all, and each group consists
   of groups of the level before. The arrays of mixed moments hold all levels, one behind the other: 2 channels at most. */

/* Of one image: mean and variance of the groups of each level, from those of its channels. */
VECTORIZED static void moments_of_levels(float *mean, float *variance, const int64_t *sizes, int64_t count,
                                         int64_t channels) {
  for (int64_t k = 0; k + 1 < count; k++) {
    int64_t n = channels / sizes[k], ratio = sizes[k + 1] / sizes[k];
    float *next_mean = mean + n, *next_variance = variance + n;
    for (int64_t group = 0; group < n / ratio; group++, mean += ratio, variance += ratio) {
      float sum = 0, within = 0, between = 0;
      for (int64_t i = 0; i < ratio; i++) sum += mean[i], within += variance[i];
      sum /= ratio;
      for (int64_t i = 0; i < ratio; i++) between += (mean[i] - sum) * (mean[i] - sum);
      next_mean[group] = sum, next_variance[group] = (within + between) / ratio;
    }
  }
}

/* For each channel, in place: the sums over the levels of `factors` times what its group has. */
VECTORIZED static void mix(float *values, const float *factors, const int64_t *sizes, int64_t count, int64_t channels) {
  float *next = values;
  for (int64_t k = 0; k + 1 < count; k++) next += channels / sizes[k];
  *next *= factors[count - 1];
  for (int64_t k = count - 2; k >= 0; k--) {
    int64_t n = channels / sizes[k], ratio = sizes[k + 1] / sizes[k];
    float *level = next - n;
    for (int64_t group = 0; group < n / ratio; group++)
      for (int64_t i = 0; i < ratio; i++) level[group * ratio + i] = factors[k] * level[group * ratio + i] + next[group];
    next = level;
  }
}

/* Of one image, whose moments of all levels are `mean` and `variance`: replaces the gradients of the mixed moments by those of
   the channels' own, and writes those of the two mixtures. */
VECTORIZED static void mix_backward(float *dmean, float *dvariance, const float *mean, const float *variance,
                                    const float *of_mean, const float *of_variance, const int64_t *sizes, int64_t count,
                                    int64_t channels, float *dof_mean, float *dof_variance) {
  int64_t at = 0;
  for (int64_t k = 0; k < count; k++) {
    int64_t n = channels / sizes[k], ratio = k + 1 < count ? sizes[k + 1] / sizes[k] : 1;
    double sum_mean = 0, sum_variance = 0;
    for (int64_t i = at; i < at + n; i++) sum_mean += dmean[i] * mean[i], sum_variance += dvariance[i] * variance[i];
    dof_mean[k] = sum_mean, dof_variance[k] = sum_variance;
    if (k + 1 == count) break;
    for (int64_t group = 0; group < n / ratio; group++) {
      float of_group = 0, other = 0;
      for (int64_t i = at + group * ratio; i < at + (group + 1) * ratio; i++) of_group += dmean[i], other += dvariance[i];
      dmean[at + n + group] = of_group, dvariance[at + n + group] = other;
    }
    at += n;
  }
  float through_mean[2 * channels]; /* the part of dmean that passes the variances of groups */
  dmean[at] *= of_mean[count - 1] / channels, dvariance[at] *= of_variance[count - 1] / channels, through_mean[at] = 0;
  for (int64_t k = count - 2; k >= 0; k--) {
    int64_t n = channels / sizes[k], ratio = sizes[k + 1] / sizes[k], next = at;
    at -= n;
    for (int64_t group = next; group < next + n / ratio; group++)
      for (int64_t i = at + (group - next) * ratio; i < at + (group - next + 1) * ratio; i++) {
        through_mean[i] = through_mean[group] + 2 * dvariance[group] * (mean[i] - mean[group]);
        dmean[i] = of_mean[k] / sizes[k] * dmean[i] + dmean[group];
        dvariance[i] = of_variance[k] / sizes[k] * dvariance[i] + dvariance[group];
      }
  }
  for (int64_t c = 0; c < channels; c++) dmean[c] += through_mean[c];
}

static void read_moments(const float *own_mean, const float *own_rstd, float *mean, float *variance, int64_t channels) {
  for (int64_t c = 0; c < channels; c++) mean[c] = own_mean[c], variance[c] = 1 / (own_rstd[c] * own_rstd[c]); /* with eps */
}

/* mean, rstd: (images, channels), of each channel; mixtures: (2, count), of the mean and of the variance; sizes: (count), the
   channels in a group; mixed_mean, mixed_rstd: (images, channels) */
void gng_d2_mix_moments(const float *mean, const float *rstd, const float *mixtures, const int64_t *sizes, float *mixed_mean,
                        float *mixed_rstd, int64_t images, int64_t channels, int64_t count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t first = 0; first < images * channels; first += channels) {
    float means[2 * channels], variances[2 * channels];
    read_moments(mean + first, rstd + first, means, variances, channels);
    moments_of_levels(means, variances, sizes, count, channels);
    mix(means, mixtures, sizes, count, channels);
    mix(variances, mixtures + count, sizes, count, channels);
    for (int64_t c = 0; c < channels; c++)
      mixed_mean[first + c] = means[c], mixed_rstd[first + c] = 1 / sqrtf(variances[c]);
  }
}

/* sums: (images, channels), of gng_d2_row_sums with the mixed moments; dmixtures: (images, 2, count) */
void gng_d2_mix_moments_backward(const sums_t *sums, const float *mean, const float *rstd, const float *mixed_mean,
                                 const float *mixed_rstd, const float *weight, const float *mixtures, const int64_t *sizes,
                                 factors_t *factors, float *dmixtures, int64_t images, int64_t channels, int64_t positions,
                                 int64_t count, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t image = 0; image < images; image++) {
    float means[2 * channels], variances[2 * channels], dmean[2 * channels], dvariance[2 * channels];
    int64_t first = image * channels;
    read_moments(mean + first, rstd + first, means, variances, channels);
    moments_of_levels(means, variances, sizes, count, channels);
    for (int64_t c = 0; c < channels; c++) {
      float scale = mixed_rstd[first + c] * (weight ? weight[c] : 1);
      dmean[c] = -scale * sums[first + c].dy;
      dvariance[c] = -.5f * scale * mixed_rstd[first + c] * sums[first + c].dy_x;
    }
    float *dof_mean = dmixtures + image * 2 * count;
    mix_backward(dmean, dvariance, means, variances, mixtures, mixtures + count, sizes, count, channels, dof_mean,
                 dof_mean + count);
    for (int64_t c = 0; c < channels; c++) {
      double x_factor = 2.0 * dvariance[c] / positions, shift = mixed_mean[first + c] - means[c];
      factors[first + c] = (factors_t){x_factor, dmean[c] / positions + x_factor * shift};
    }
  }
}

static double deviation(moments_t moments, int64_t size) { return moments.m2 > 0 ? sqrt(moments.m2 / (size - 1)) : 0; }

/* weight, out: (filters, size). Each filter less its mean, over the sum of eps and its unbiased standard deviation. */
void gng_d2_standardize(const float *weight, float *out, int64_t filters, int64_t size, double eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < filters; i++) {
    moments_t moments = moments_of_piece(weight + i * size, size);
    map_t map = {moments.mean, 1 / (deviation(moments, size) + eps), 0};
    normalize(out + i * size, weight + i * size, size, map, NULL, NO_ACTIVATION);
  }
}

/* gradient, weight, out: (filters, size) */
void gng_d2_standardize_backward(const float *gradient, const float *weight, float *out, int64_t filters, int64_t size,
                                 double eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < filters; i++) {
    const float *dy = gradient + i * size, *filter = weight + i * size;
    moments_t moments = moments_of_piece(filter, size);
    double std = deviation(moments, size), scale = 1 / (std + eps);
    map_t map = {moments.mean, scale, 0};
    sums_t sums = sums_of_piece(NULL, dy, filter, size, map, NULL, NO_ACTIVATION);
    double weight_factor = std > 0 ? -sums.dy_x * scale * scale / (std * (size - 1)) : 0;
    differentiate(out + i * size, dy, filter, size, map, weight_factor, -sums.dy * scale / size, NO_ACTIVATION);
  }
}
