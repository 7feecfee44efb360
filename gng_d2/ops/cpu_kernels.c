/* Group norm and weight standardization on a CPU, whose threads share the work whatever the number of groups.

   All tensors are contiguous and in float32. A group is summed in pieces of `piece` elements, short enough to stay in the
   first cache, which are merged in float64 in one order: no result depends on the number of threads.

   Python calls these functions by name and cannot check their arguments: with other arguments, give them other names. */
#include <math.h>
#include <stdint.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

/* A cluster may build this on one machine and run it on another. */
#if defined(__x86_64__) && defined(__GLIBC__)
#define VECTORIZED __attribute__((noinline, target_clones("avx512f", "avx2", "default")))
#else
#define VECTORIZED __attribute__((noinline))
#endif

enum { LARGE = 5 << 20 }; /* elements: with its input, more than caches hold */

typedef struct { double mean, m2; } moments_t; /* m2: sum of squared differences from the mean */
typedef struct { double dy, dy_x; } sums_t;    /* of dy, and of dy times (x - mean) or (x - mean) rstd */

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* In two halves at once, as each addition waits for the one before it. */
VECTORIZED static moments_t moments_of_piece(const float *x, int64_t n) {
  float sum = n % 2 ? x[n - 1] : 0, other_sum = 0;
  const float *other_x = x + n / 2;
#pragma omp simd reduction(+ : sum, other_sum)
  for (int64_t i = 0; i < n / 2; i++) sum += x[i], other_sum += other_x[i];
  float shift = (sum + other_sum) / n; /* squares alone would lose the variance of values with a large mean */
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

VECTORIZED static sums_t sums_of_piece(const float *dy, const float *x, int64_t n, float mean) {
  float sum_dy = 0, sum_dy_x = 0;
#pragma omp simd reduction(+ : sum_dy, sum_dy_x)
  for (int64_t i = 0; i < n; i++) {
    sum_dy += dy[i];
    sum_dy_x += dy[i] * (x[i] - mean);
  }
  return (sums_t){sum_dy, sum_dy_x};
}

VECTORIZED static void normalize(float *restrict y, const float *restrict x, int64_t n, float mean, float scale, float bias) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) * scale + bias;
}

/* The same for a y that no cache would hold: an ordinary write first reads what it overwrites. */
static void normalize_past_caches(float *restrict y, const float *restrict x, int64_t n, float mean, float scale, float bias) {
  int64_t i = 0;
#ifdef __SSE__
  i = smaller(n, -(uintptr_t)y / sizeof(float) % 16); /* whole cache lines: a part of one would be slow */
  normalize(y, x, i, mean, scale, bias);
  __m128 means = _mm_set1_ps(mean), scales = _mm_set1_ps(scale), biases = _mm_set1_ps(bias);
  for (int64_t end = i + (n - i) / 16 * 16; i < end; i += 4) {
    __m128 centered = _mm_sub_ps(_mm_loadu_ps(x + i), means);
    _mm_stream_ps(y + i, _mm_add_ps(_mm_mul_ps(centered, scales), biases));
  }
  _mm_sfence();
#endif
  normalize(y + i, x + i, n - i, mean, scale, bias);
}

VECTORIZED static void differentiate(float *restrict dx, const float *restrict dy, const float *restrict x, int64_t n,
                                     float mean, float dy_factor, float x_factor, float constant) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) dx[i] = dy[i] * dy_factor + (x[i] - mean) * x_factor + constant;
}

static moments_t merge(const moments_t *piece_moments, int64_t pieces, int64_t size, int64_t piece) {
  moments_t whole = {0, 0};
  for (int64_t i = 0; i < pieces; i++) whole.mean += piece_moments[i].mean * smaller(piece, size - i * piece);
  whole.mean /= size;
  for (int64_t i = 0; i < pieces; i++) {
    double difference = piece_moments[i].mean - whole.mean;
    whole.m2 += piece_moments[i].m2 + difference * difference * smaller(piece, size - i * piece);
  }
  return whole;
}

/* x, y: (images, channels, positions); weight, bias: (channels) or null; mean, rstd: (images, groups);
   partial: (images, groups, pieces of a group) */
void gng_d2_group_norm(const float *x, const float *weight, const float *bias, float *y, float *mean, float *rstd,
                       moments_t *partial, int64_t images, int64_t channels, int64_t positions, int64_t groups, int64_t piece,
                       double eps, int threads) {
  int64_t per_group = channels / groups, size = per_group * positions, pieces = (size + piece - 1) / piece;
  int past_caches = images * channels * positions > LARGE;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < images * groups * pieces; i++) {
      int64_t start = i % pieces * piece;
      partial[i] = moments_of_piece(x + i / pieces * size + start, smaller(piece, size - start));
    }
#pragma omp for schedule(static)
    for (int64_t group = 0; group < images * groups; group++) {
      moments_t moments = merge(partial + group * pieces, pieces, size, piece);
      mean[group] = moments.mean;
      rstd[group] = 1 / sqrt((moments.m2 < 0 ? 0 : moments.m2 / size) + eps);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < images * channels; row++) {
      int64_t group = row / per_group, channel = row % channels, i = row * positions;
      float scale = rstd[group] * (weight ? weight[channel] : 1), shift = bias ? bias[channel] : 0;
      (past_caches ? normalize_past_caches : normalize)(y + i, x + i, positions, mean[group], scale, shift);
    }
  }
}

/* The same shapes; partial: (images, channels + groups) */
void gng_d2_group_norm_backward(const float *dy, const float *x, const float *mean, const float *rstd, const float *weight,
                                float *dx, float *dweight, float *dbias, sums_t *partial, int64_t images, int64_t channels,
                                int64_t positions, int64_t groups, int64_t piece, int threads) {
  int64_t per_group = channels / groups;
  sums_t *group_sums = partial + images * channels;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < images * channels; row++) {
      sums_t sums = {0, 0};
      for (int64_t i = row * positions, end = i + positions; i < end; i += piece) {
        sums_t more = sums_of_piece(dy + i, x + i, smaller(piece, end - i), mean[row / per_group]);
        sums.dy += more.dy, sums.dy_x += more.dy_x * rstd[row / per_group];
      }
      partial[row] = sums;
    }
#pragma omp for schedule(static) nowait
    for (int64_t channel = 0; channel < channels; channel++) {
      sums_t sums = {0, 0};
      for (int64_t row = channel; row < images * channels; row += channels)
        sums.dy += partial[row].dy, sums.dy_x += partial[row].dy_x;
      dbias[channel] = sums.dy, dweight[channel] = sums.dy_x;
    }
#pragma omp for schedule(static)
    for (int64_t group = 0; group < images * groups; group++) {
      sums_t sums = {0, 0};
      for (int64_t row = group * per_group; row < (group + 1) * per_group; row++) {
        double scale = weight ? weight[row % channels] : 1;
        sums.dy += scale * partial[row].dy, sums.dy_x += scale * partial[row].dy_x;
      }
      group_sums[group] = sums;
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < images * channels; row++) {
      int64_t group = row / per_group, i = row * positions;
      float dy_factor = rstd[group] * (weight ? weight[row % channels] : 1);
      double share = -rstd[group] / (double)(per_group * positions);
      differentiate(dx + i, dy + i, x + i, positions, mean[group], dy_factor, share * rstd[group] * group_sums[group].dy_x,
                    share * group_sums[group].dy);
    }
  }
}

static double deviation(moments_t moments, int64_t size) { return moments.m2 > 0 ? sqrt(moments.m2 / (size - 1)) : 0; }

/* weight, out: (filters, size). Each filter less its mean, over the sum of eps and its unbiased standard deviation. */
void gng_d2_standardize(const float *weight, float *out, int64_t filters, int64_t size, double eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < filters; i++) {
    moments_t moments = moments_of_piece(weight + i * size, size);
    normalize(out + i * size, weight + i * size, size, moments.mean, 1 / (deviation(moments, size) + eps), 0);
  }
}

/* gradient, weight, out: (filters, size) */
void gng_d2_standardize_backward(const float *gradient, const float *weight, float *out, int64_t filters, int64_t size,
                                 double eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < filters; i++) {
    const float *dy = gradient + i * size, *filter = weight + i * size;
    moments_t moments = moments_of_piece(filter, size);
    sums_t sums = sums_of_piece(dy, filter, size, moments.mean);
    double std = deviation(moments, size), scale = 1 / (std + eps);
    double weight_factor = std > 0 ? -sums.dy_x * scale * scale / (std * (size - 1)) : 0;
    differentiate(out + i * size, dy, filter, size, moments.mean, scale, weight_factor, -sums.dy * scale / size);
  }
}
