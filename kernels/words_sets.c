/* The kernels on bf16 and int8 of every instruction set, and which of them this machine can run. */

#include "words.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define BF16_TABLE(set, n)                                                                         \
    {                                                                                              \
        .name = #set, .lanes = 2 * (n), .most_lanes = 4 * (n), .panel = 16 * (n),                  \
        .height = (n), .tall = tall_bf16_##set, .pack = pack_bf16_##set,                           \
        .enter = enter_bf16_##set, .reenter = reenter_bf16_##set,                                  \
        .outputs = outputs_bf16_##set, .leave = leave_bf16_##set,                                  \
        .sddmm = sddmm_bf16_##set, .round = round_bf16_##set                                       \
    }

#define INT8_TABLE(set, n)                                                                         \
    {                                                                                              \
        .name = #set, .lanes = (n), .most_lanes = 4 * (n), .height = (n),                          \
        .tall = tall_int8_##set, .pack = pack_int8_##set, .enter = enter_int8_##set,               \
        .reenter = reenter_int8_##set, .outputs = outputs_int8_##set,                              \
        .leave = leave_int8_##set, .measure = measure_int8_##set,                                  \
        .quantize = quantize_int8_##set                                                            \
    }

#define NAME(f) f##_bf16_baseline
#define FLOATS(f) f##_baseline
#define TARGET
#define LANES 4
#define PER_WORD 2
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#define DOT(acc, w, x) \
    ((floats)vbfdotq_f32((float32x4_t)(acc), (bfloat16x8_t)(w), (bfloat16x8_t)(x)))
#endif
#include "words_cpu.c"
static const WordKernels bf16_baseline = BF16_TABLE(baseline, 4);

#define NAME(f) f##_int8_baseline
#define FLOATS(f) f##_baseline
#define TARGET
#define LANES 4
#define PER_WORD 4
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define DOT(acc, w, x) ((ints)vusdotq_s32((int32x4_t)(acc), (uint8x16_t)(x), (int8x16_t)(w)))
#elif defined(__x86_64__)
#define ADD_PAIRS(a, b) ((ints)_mm_madd_epi16((__m128i)(a), (__m128i)(b)))
#endif
#include "words_cpu.c"
static const WordKernels int8_baseline = INT8_TABLE(baseline, 4);

#ifdef __x86_64__
#define AVX2 "avx2,fma"
#define AVX512 "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"

#define NAME(f) f##_bf16_avx2
#define FLOATS(f) f##_avx2
#define TARGET __attribute__((target(AVX2)))
#define LANES 8
#define PER_WORD 2
#include "words_cpu.c"
static const WordKernels bf16_avx2 = BF16_TABLE(avx2, 8);

#define NAME(f) f##_bf16_avx512
#define FLOATS(f) f##_avx512
#define TARGET __attribute__((target(AVX512)))
#define LANES 16
#define PER_WORD 2
#define WIDEN(p) ((words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))))
#include "words_cpu.c"
static const WordKernels bf16_avx512 = BF16_TABLE(avx512, 16);

#define NAME(f) f##_bf16_avx512_bf16
#define FLOATS(f) f##_avx512
#define TARGET __attribute__((target(AVX512 ",avx512bf16")))
#define LANES 16
#define PER_WORD 2
#define WIDEN(p) ((words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))))
#define DOT(acc, w, x) \
    ((floats)_mm512_dpbf16_ps((__m512)(acc), (__m512bh)(w), (__m512bh)(x)))
#include "words_cpu.c"
static const WordKernels bf16_avx512_bf16 = BF16_TABLE(avx512_bf16, 16);

#define NAME(f) f##_int8_avx2
#define FLOATS(f) f##_avx2
#define TARGET __attribute__((target(AVX2)))
#define LANES 8
#define PER_WORD 4
#define ADD_PAIRS(a, b) ((ints)_mm256_madd_epi16((__m256i)(a), (__m256i)(b)))
#define MAX_INTS(a, b) ((ints)_mm256_max_epi32((__m256i)(a), (__m256i)(b)))
#define MAX_WORDS(a, b) ((words)_mm256_max_epu32((__m256i)(a), (__m256i)(b)))
#include "words_cpu.c"
static const WordKernels int8_avx2 = INT8_TABLE(avx2, 8);

#define NAME(f) f##_int8_avx_vnni
#define FLOATS(f) f##_avx2
#define TARGET __attribute__((target(AVX2 ",avxvnni")))
#define LANES 8
#define PER_WORD 4
#define DOT(acc, w, x) \
    ((ints)_mm256_dpbusd_avx_epi32((__m256i)(acc), (__m256i)(x), (__m256i)(w)))
#define MAX_INTS(a, b) ((ints)_mm256_max_epi32((__m256i)(a), (__m256i)(b)))
#define MAX_WORDS(a, b) ((words)_mm256_max_epu32((__m256i)(a), (__m256i)(b)))
#include "words_cpu.c"
static const WordKernels int8_avx_vnni = INT8_TABLE(avx_vnni, 8);

#define NAME(f) f##_int8_avx512
#define FLOATS(f) f##_avx512
#define TARGET __attribute__((target(AVX512)))
#define LANES 16
#define PER_WORD 4
#define WIDEN(p) ((words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define NARROW(p, v) _mm_storeu_si128((__m128i *)(p), _mm512_cvtepi32_epi8((__m512i)(v)))
#define ADD_PAIRS(a, b) ((ints)_mm512_madd_epi16((__m512i)(a), (__m512i)(b)))
#define MAX_INTS(a, b) ((ints)_mm512_max_epi32((__m512i)(a), (__m512i)(b)))
#define MAX_WORDS(a, b) ((words)_mm512_max_epu32((__m512i)(a), (__m512i)(b)))
#include "words_cpu.c"
static const WordKernels int8_avx512 = INT8_TABLE(avx512, 16);

#define NAME(f) f##_int8_avx512_vnni
#define FLOATS(f) f##_avx512
#define TARGET __attribute__((target(AVX512 ",avx512vnni")))
#define LANES 16
#define PER_WORD 4
#define WIDEN(p) ((words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define NARROW(p, v) _mm_storeu_si128((__m128i *)(p), _mm512_cvtepi32_epi8((__m512i)(v)))
#define DOT(acc, w, x) ((ints)_mm512_dpbusd_epi32((__m512i)(acc), (__m512i)(x), (__m512i)(w)))
#define MAX_INTS(a, b) ((ints)_mm512_max_epi32((__m512i)(a), (__m512i)(b)))
#define MAX_WORDS(a, b) ((words)_mm512_max_epu32((__m512i)(a), (__m512i)(b)))
#include "words_cpu.c"
static const WordKernels int8_avx512_vnni = INT8_TABLE(avx512_vnni, 16);
#endif

/* What this machine can run on one type, the best first. */
typedef struct {
    const WordKernels *kernels[5];
    int n;
} WordSets;

static WordSets bf16_sets, int8_sets;

static void add_set(WordSets *sets, const WordKernels *k) { sets->kernels[sets->n++] = k; }

#ifdef __x86_64__
/* Not every clang knows its name; where there is AVX2, the system saves the registers of both. */
static int has_avx_vnni(void)
{
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

static void find_usable_words(void)
{
    bf16_sets.n = int8_sets.n = 0;
#ifdef __x86_64__
    for (int i = 0; i < n_usable; i++) {
        if (usable[i] == &kernels_avx512) {
            if (__builtin_cpu_supports("avx512bf16"))
                add_set(&bf16_sets, &bf16_avx512_bf16);
            add_set(&bf16_sets, &bf16_avx512);
            if (__builtin_cpu_supports("avx512vnni"))
                add_set(&int8_sets, &int8_avx512_vnni);
            add_set(&int8_sets, &int8_avx512);
        }
        if (usable[i] == &kernels_avx2) {
            add_set(&bf16_sets, &bf16_avx2);
            if (has_avx_vnni())
                add_set(&int8_sets, &int8_avx_vnni);
            add_set(&int8_sets, &int8_avx2);
        }
    }
#endif
    add_set(&bf16_sets, &bf16_baseline);
    add_set(&int8_sets, &int8_baseline);
}
