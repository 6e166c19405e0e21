/* Draws and KL divergences on the CPU: what native.py loads, in plain C without a header of Python.

   The noise is that of philox.py. Compiled without contraction of products and sums, so that it has
   the same bits on every processor that rounds as IEEE 754 says. Loops are written for the
   compiler's vectoriser; on x86-64 each function is compiled three times and the best one runs. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

/* What compilers call differently: Microsoft's, and the others. */
#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#pragma fp_contract(off)
#define INLINE static __forceinline
#define RESTRICT __restrict
#define NEXT(counter) _InterlockedExchangeAdd64(&(counter), 1)
#else
#define INLINE static inline __attribute__((always_inline))
#define RESTRICT restrict
#define NEXT(counter) __atomic_fetch_add(&(counter), 1, __ATOMIC_RELAXED)
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT
#endif

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define VERSIONS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VERSIONS
#endif

#define BLOCKS 64              /* Philox blocks at once, */
#define PART (4 * BLOCKS)      /* of four numbers each */
#define CHUNK 8192             /* elements that one thread takes at a time, a multiple of PART */

typedef union {
    uint32_t word;
    float number;
} bits;

INLINE float number_of(uint32_t word) {
    bits value = {.word = word};
    return value.number;
}

INLINE uint32_t word_of(float number) {
    bits value;
    value.number = number;
    return value.word;
}

/* -- elementary functions in float32: the polynomials are those of Cephes (Moshier, 1989) -------- */

/* For x > 0, normal. */
INLINE float logarithm(float x) {
    uint32_t word = word_of(x);
    int32_t exponent = (int32_t)(word - 0x3f3504f3u) >> 23; /* the rest lies in sqrt(1/2) to sqrt(2) */
    float m = number_of(word - ((uint32_t)exponent << 23)) - 1.0f;
    float e = (float)exponent, z = m * m;
    float y = 7.0376836292e-2f;
    y = y * m - 1.1514610310e-1f;
    y = y * m + 1.1676998740e-1f;
    y = y * m - 1.2420140846e-1f;
    y = y * m + 1.4249322787e-1f;
    y = y * m - 1.6668057665e-1f;
    y = y * m + 2.0000714765e-1f;
    y = y * m - 2.4999993993e-1f;
    y = y * m + 3.3333331174e-1f;
    y = y * m * z + e * -2.12194440e-4f - 0.5f * z;
    return m + y + e * 0.693359375f;
}

/* exp(x) = 2^n (1 + r + rest), for x between the logarithms of the least and largest number. */
typedef struct {
    float n, r, rest;
    uint32_t exponent; /* n, where float32 has its exponent */
} power;

INLINE power power_of(float x) {
    float inside = x > 88.72f ? 88.72f : x < -87.0f ? -87.0f : x, y = 1.9875691500e-4f;
    float shifted = inside * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to an integer */
    power p = {.n = shifted - 12582912.0f, .exponent = word_of(shifted) << 23};
    p.r = inside - p.n * 0.693359375f + p.n * 2.12194440e-4f;
    y = y * p.r + 1.3981999507e-3f;
    y = y * p.r + 8.3334519073e-3f;
    y = y * p.r + 4.1665795894e-2f;
    y = y * p.r + 1.6666665459e-1f;
    y = y * p.r + 5.0000001201e-1f;
    p.rest = y * p.r * p.r;
    return p;
}

INLINE float exponential(float x) {
    power p = power_of(x);
    float y = number_of(word_of(p.rest + p.r + 1.0f) + p.exponent);
    y = x > 88.72f ? INFINITY : x < -87.0f ? 0.0f : y;
    return x == x ? y : x;
}

/* exp(x) - 1 - x, also where it is small. */
INLINE float excess(float x) {
    power p = power_of(x);
    float y = number_of(word_of(p.rest + p.r + 1.0f) + p.exponent);
    y = (x > 88.72f ? INFINITY : y) - 1.0f - x;
    y = p.n == 0.0f ? p.rest : y;
    return x == x ? y : x;
}

/* What logf gives, for any x. */
INLINE float any_logarithm(float x) {
    int small = x < 1.17549435e-38f; /* not normal: by 2^24 it is, or it is no number above zero */
    float y = logarithm(small ? x * 16777216.0f : x) - (small ? 16.6355323f : 0.0f);
    y = x > 0.0f ? y : x == 0.0f ? -INFINITY : NAN;
    return x < INFINITY ? y : x;
}

/* Cosine and sine of 2 pi v for v in [0, 1]. */
INLINE void turn(float v, float *cosine, float *sine) {
    int32_t quarter = (int32_t)(4.0f * v + 0.5f);
    float x = (4.0f * v - (float)quarter) * 1.57079633f, z = x * x;
    float s = x + x * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - z * 1.9515295891e-4f));
    float tail = 4.166664568e-2f + z * (-1.388731625e-3f + z * 2.443315711e-5f);
    float c = 1.0f - 0.5f * z + z * z * tail;
    float even = quarter & 1 ? s : c, odd = quarter & 1 ? c : s;
    *cosine = number_of(word_of(even) ^ (uint32_t)((quarter + 1) & 2) << 30);
    *sine = number_of(word_of(odd) ^ (uint32_t)(quarter & 2) << 30);
}

/* -- noise ------------------------------------------------------------------------------------- */

/* Words of 32 bits in lanes of 64, as products need them: of the upper half only zeros. */
INLINE void words(uint64_t seed, uint64_t key, uint64_t block, uint32_t out[4][BLOCKS]) {
    const uint64_t low = 0xffffffffu;
    uint64_t lanes[4][BLOCKS];
    for (int i = 0; i < BLOCKS; i++) {
        uint64_t count = block + (uint64_t)i;
        uint64_t c0 = count & low, c1 = count >> 32, c2 = key & low, c3 = key >> 32;
        uint64_t k0 = seed & low, k1 = seed >> 32;
        for (int round = 0; round < 10; round++) {
            uint64_t first = 0xD2511F53u * c0, second = 0xCD9E8D57u * c2;
            c0 = second >> 32 ^ c1 ^ k0;
            c2 = first >> 32 ^ c3 ^ k1;
            c1 = second & low;
            c3 = first & low;
            k0 = (k0 + 0x9E3779B9u) & low;
            k1 = (k1 + 0xBB67AE85u) & low;
        }
        lanes[0][i] = c0;
        lanes[1][i] = c1;
        lanes[2][i] = c2;
        lanes[3][i] = c3;
    }
    for (int word = 0; word < 4; word++)
        for (int i = 0; i < BLOCKS; i++)
            out[word][i] = (uint32_t)lanes[word][i];
}

/* In (0, 1]. */
INLINE float uniform(uint32_t word) {
    return (float)word * 2.3283064365386963e-10f + 1.1641532182693481e-10f;
}

/* PART numbers from element `first` on, a multiple of 4. */
INLINE void normals(uint64_t seed, uint64_t key, int64_t first, float *RESTRICT out) {
    uint32_t w[4][BLOCKS];
    float n[4][BLOCKS];
    words(seed, key, (uint64_t)first / 4, w);
    for (int pair = 0; pair < 4; pair += 2)
        for (int i = 0; i < BLOCKS; i++) {
            float radius = sqrtf(-2.0f * logarithm(uniform(w[pair][i]))), c, s;
            turn(uniform(w[pair + 1][i]), &c, &s);
            n[pair][i] = radius * c;
            n[pair + 1][i] = radius * s;
        }
    for (int i = 0; i < BLOCKS; i++) {
        out[4 * i] = n[0][i];
        out[4 * i + 1] = n[1][i];
        out[4 * i + 2] = n[2][i];
        out[4 * i + 3] = n[3][i];
    }
}

static void wide_normals(uint64_t seed, uint64_t key, int64_t first, double *RESTRICT out) {
    uint32_t w[4][BLOCKS];
    words(seed, key, (uint64_t)first / 4, w);
    for (int pair = 0; pair < 4; pair += 2)
        for (int i = 0; i < BLOCKS; i++) {
            double radius = sqrt(-2.0 * log((double)uniform(w[pair][i])));
            double angle = 6.283185307179586 * (double)uniform(w[pair + 1][i]);
            out[4 * i + pair] = radius * cos(angle);
            out[4 * i + pair + 1] = radius * sin(angle);
        }
}

/* -- work for threads -------------------------------------------------------------------------- */

typedef void (*region)(void (*)(void *), void *, unsigned, unsigned);
static region start_region; /* GOMP_parallel, of the OpenMP whose threads torch has started */

/* INTERFACE of native.py: another number with every change of arguments. */
EXPORT int bayesify_interface(void) { return 2; }

EXPORT void bayesify_use_threads_of(region found) { start_region = found; }

typedef struct job {
    void (*run)(const struct job *, int64_t row, int64_t chunk, int64_t first, int64_t n);
    const void *rows;
    const int64_t *sizes; /* elements of each row */
    int64_t count;
    double *partial; /* of each chunk, for sums */
    int64_t taken;
} job;

INLINE int64_t chunks_of(int64_t n) { return (n + CHUNK - 1) / CHUNK; }

static int64_t chunks_of_all(const int64_t *sizes, int64_t count) {
    int64_t chunks = 0;
    for (int64_t row = 0; row < count; row++)
        chunks += chunks_of(sizes[row]);
    return chunks;
}

static void work(void *argument) {
    job *all = argument;
    int64_t row = 0, begin = 0; /* the row of a chunk, and its first chunk */
    for (;;) {
        int64_t chunk = NEXT(all->taken);
        while (row < all->count && chunk >= begin + chunks_of(all->sizes[row]))
            begin += chunks_of(all->sizes[row++]);
        if (row == all->count)
            return;
        int64_t first = (chunk - begin) * CHUNK, left = all->sizes[row] - first;
        all->run(all, row, chunk, first, left < CHUNK ? left : CHUNK);
    }
}

static void start(job *all, int64_t threads) {
    int64_t chunks = chunks_of_all(all->sizes, all->count);
    threads = chunks / 2 < threads ? chunks / 2 : threads; /* else the start costs more */
    all->taken = 0;
    if (start_region && threads > 1)
        start_region(work, all, (unsigned)threads, 0);
    else
        work(all);
}

/* -- noise alone ------------------------------------------------------------------------------- */

typedef struct {
    void *out;
    uint64_t seed, key;
} noise_row;

VERSIONS static void noise_chunk(
    const job *all, int64_t row, int64_t chunk, int64_t first, int64_t n) {
    const noise_row *r = (const noise_row *)all->rows + row;
    float *RESTRICT out = (float *)r->out + first, last[PART];
    (void)chunk;
    for (int64_t i = 0; i < n; i += PART) {
        int whole = n - i >= PART;
        normals(r->seed, r->key, first + i, whole ? out + i : last);
        for (int64_t k = 0; !whole && k < n - i; k++)
            out[i + k] = last[k];
    }
}

static void wide_noise_chunk(
    const job *all, int64_t row, int64_t chunk, int64_t first, int64_t n) {
    const noise_row *r = (const noise_row *)all->rows + row;
    double *RESTRICT out = (double *)r->out + first, last[PART];
    (void)chunk;
    for (int64_t i = 0; i < n; i += PART) {
        wide_normals(r->seed, r->key, first + i, last);
        for (int64_t k = 0; k < PART && k < n - i; k++)
            out[i + k] = last[k];
    }
}

/* Fill with the noise of philox.fill_normal, in float32 or float64. */
EXPORT void bayesify_noise(
    void *out, int64_t n, uint64_t seed, uint64_t key, int wide, int64_t threads) {
    noise_row row = {out, seed, key};
    job all = {wide ? wide_noise_chunk : noise_chunk, &row, &n, 1, NULL, 0};
    start(&all, threads);
}

/* -- draws ------------------------------------------------------------------------------------- */

typedef struct {
    const float *mean, *logvar;
    float *value, *half; /* either may be missing */
    uint64_t seed, key;
} draw_row;

/* half = std noise / 2, value = mean + std noise. */
VERSIONS static void draw_chunk(
    const job *all, int64_t row, int64_t chunk, int64_t first, int64_t n) {
    const draw_row *r = (const draw_row *)all->rows + row;
    const float *mean = r->mean + first, *logvar = r->logvar + first;
    (void)chunk;
    for (int64_t i = 0; i < n; i += PART) {
        float noise[PART];
        int m = n - i < PART ? (int)(n - i) : PART;
        normals(r->seed, r->key, first + i, noise);
        for (int k = 0; k < m; k++)
            noise[k] *= exponential(0.5f * logvar[i + k]);
        if (r->value) {
            float *RESTRICT value = r->value + first + i;
            for (int k = 0; k < m; k++)
                value[k] = mean[i + k] + noise[k];
        }
        if (r->half) {
            float *RESTRICT half = r->half + first + i;
            for (int k = 0; k < m; k++)
                half[k] = 0.5f * noise[k];
        }
    }
}

EXPORT void bayesify_draw(
    const draw_row *rows, const int64_t *sizes, int64_t count, int64_t threads) {
    job all = {draw_chunk, rows, sizes, count, NULL, 0};
    start(&all, threads);
}

/* -- the KL divergence ------------------------------------------------------------------------- */

typedef struct {
    const float *mean, *logvar;
    const float *prior_mean, *prior_var; /* of each element, or missing: then the numbers */
    float one_mean, one_var;
    float least; /* below this log variance a weight is pruned or fixed, without a KL */
} kl_row;

/* Sums run in lanes of their own, which the vectoriser may not make of one sum of floats. */
#define LANES 16

VERSIONS static void kl_chunk(const job *all, int64_t row, int64_t chunk, int64_t first, int64_t n) {
    const kl_row *r = (const kl_row *)all->rows + row;
    const float *mean = r->mean + first, *logvar = r->logvar + first;
    float inverse = 1.0f / r->one_var, shift = logf(r->one_var), lanes[LANES];
    double total = 0.0;
    for (int64_t i = 0; i < n; i += PART) {
        float terms[PART];
        int m = n - i < PART ? (int)(n - i) : PART;
        if (r->prior_mean)
            for (int k = 0; k < m; k++)
                terms[k] = mean[i + k] - r->prior_mean[first + i + k];
        else
            for (int k = 0; k < m; k++)
                terms[k] = mean[i + k] - r->one_mean;
        if (r->prior_var)
            for (int k = 0; k < m; k++) {
                float var = r->prior_var[first + i + k];
                terms[k] = terms[k] * terms[k] / var + excess(logvar[i + k] - any_logarithm(var));
            }
        else
            for (int k = 0; k < m; k++)
                terms[k] = terms[k] * terms[k] * inverse + excess(logvar[i + k] - shift);
        for (int k = 0; k < m; k++)
            terms[k] = logvar[i + k] < r->least ? 0.0f : terms[k];
        for (int k = m; k < PART; k++)
            terms[k] = 0.0f;
        for (int lane = 0; lane < LANES; lane++)
            lanes[lane] = 0.0f;
        for (int k = 0; k < PART; k += LANES)
            for (int lane = 0; lane < LANES; lane++)
                lanes[lane] += terms[k + lane];
        for (int lane = 0; lane < LANES; lane++)
            total += lanes[lane];
    }
    all->partial[chunk] = total;
}

/* Twice the KL divergence, summed in the same order however many threads there are; NaN if memory
   is short. */
EXPORT double bayesify_kl(const kl_row *rows, const int64_t *sizes, int64_t count, int64_t threads) {
    int64_t chunks = chunks_of_all(sizes, count);
    double *partial = malloc((size_t)(chunks + 1) * sizeof *partial), total = partial ? 0.0 : NAN;
    if (partial) {
        job all = {kl_chunk, rows, sizes, count, partial, 0};
        start(&all, threads);
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            total += partial[chunk];
    }
    free(partial);
    return total;
}

typedef struct {
    kl_row kl;
    const float *grad; /* of the draw, or missing */
    float *by_mean, *by_logvar;
    float factor;
} gradient_row;

VERSIONS static void gradient_chunk(
    const job *all, int64_t row, int64_t chunk, int64_t first, int64_t n) {
    const gradient_row *r = (const gradient_row *)all->rows + row;
    const float *mean = r->kl.mean + first, *logvar = r->kl.logvar + first;
    const float factor = r->factor, inverse = 1.0f / r->kl.one_var, shift = logf(r->kl.one_var);
    (void)chunk;
    for (int64_t i = 0; i < n; i += PART) {
        float to_mean[PART], to_logvar[PART];
        int m = n - i < PART ? (int)(n - i) : PART;
        if (r->kl.prior_mean)
            for (int k = 0; k < m; k++)
                to_mean[k] = mean[i + k] - r->kl.prior_mean[first + i + k];
        else
            for (int k = 0; k < m; k++)
                to_mean[k] = mean[i + k] - r->kl.one_mean;
        if (r->kl.prior_var)
            for (int k = 0; k < m; k++) {
                float var = r->kl.prior_var[first + i + k], ratio = logvar[i + k] - any_logarithm(var);
                to_mean[k] = factor * to_mean[k] / var;
                to_logvar[k] = 0.5f * factor * (excess(ratio) + ratio);
            }
        else
            for (int k = 0; k < m; k++) {
                float ratio = logvar[i + k] - shift;
                to_mean[k] = factor * inverse * to_mean[k];
                to_logvar[k] = 0.5f * factor * (excess(ratio) + ratio);
            }
        for (int k = 0; k < m; k++) {
            to_mean[k] = logvar[i + k] < r->kl.least ? 0.0f : to_mean[k];
            to_logvar[k] = logvar[i + k] < r->kl.least ? 0.0f : to_logvar[k];
        }
        float *RESTRICT by_mean = r->by_mean + first + i, *RESTRICT by_logvar = r->by_logvar + first + i;
        if (r->grad) {
            const float *RESTRICT grad = r->grad + first + i;
            for (int k = 0; k < m; k++) {
                by_mean[k] = grad[k] + to_mean[k];
                by_logvar[k] = grad[k] * by_logvar[k] + to_logvar[k];
            }
        } else
            for (int k = 0; k < m; k++) {
                by_mean[k] = to_mean[k];
                by_logvar[k] = to_logvar[k];
            }
    }
}

/* by_logvar, which holds std noise / 2, becomes grad std noise / 2 + factor (e^l / v - 1) / 2;
   by_mean = grad + factor (mean - m) / v. */
EXPORT void bayesify_gradient(
    const float *mean, const float *logvar, const float *prior_mean, const float *prior_var,
    float one_mean, float one_var, float least, const float *grad, float *by_mean, float *by_logvar,
    float factor, int64_t n, int64_t threads) {
    gradient_row row = {
        {mean, logvar, prior_mean, prior_var, one_mean, one_var, least},
        grad, by_mean, by_logvar, factor};
    job all = {gradient_chunk, &row, &n, 1, NULL, 0};
    start(&all, threads);
}
