/* The kernels on bf16 and int8 of every instruction set, and which of them this machine can run. */

#include "words.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define BF16_TABLE(set, n)                                                                         \
    {                                                                                              \
        .name = #set, .lanes = 2 * (n), .most_lanes = 4 * (n), .panel = 16 * (n),                  \
        .height = (n), .tall = tall_bf16_##set, .pack = pack_bf16_##set, .enter = enter_bf16_##set, .outputs = outputs_bf16_##set,         \
        .leave = leave_bf16_##set, .sddmm = sddmm_bf16_##set, .round = round_bf16_##set            \
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
#endif

/* What this machine can run on one type, the best first. */
typedef struct {
    const WordKernels *kernels[5];
    int n;
} WordSets;

static WordSets bf16_sets;

static void find_usable_words(void)
{
#ifdef __x86_64__
    for (int i = 0; i < n_usable; i++) {
        if (usable[i] == &kernels_avx512) {
            if (__builtin_cpu_supports("avx512bf16"))
                bf16_sets.kernels[bf16_sets.n++] = &bf16_avx512_bf16;
            bf16_sets.kernels[bf16_sets.n++] = &bf16_avx512;
        } else if (usable[i] == &kernels_avx2) {
            bf16_sets.kernels[bf16_sets.n++] = &bf16_avx2;
        }
    }
#endif
    bf16_sets.kernels[bf16_sets.n++] = &bf16_baseline;
}
