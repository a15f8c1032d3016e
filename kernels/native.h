/* What the kernels share: the layer they read, and the threads they run on. */

#ifndef NATIVE_H
#define NATIVE_H

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));

enum {
    CACHED = 1 << 17, /* floats of x that stay in the second cache while all outputs read them */
    LINE_FLOATS = 16, /* in a line of the caches */
};

/* Machine code for the pattern of a layer; see jit.c. */
typedef struct Program Program;
typedef struct Code Code;

/* A block-sparse (out, in) weight; a dense row-major weight is one with R = 1 and C = in. */
typedef struct {
    const float *values;       /* (nnz, C, R) */
    const float *bias;         /* (out,) or NULL */
    const int32_t *crow, *col; /* (block_rows + 1,), (nnz,) */
    int64_t R, C, in, out;
    int relu;
    Program *program; /* of its pattern, or NULL */
} Layer;

/* The gradient of `values`; what is padding there must be 0 before. */
typedef struct {
    const float *grad, *x; /* (batch, out), (batch, in) */
    float *values;         /* (nnz, C, R) */
    const int32_t *crow, *col;
    int64_t ldg, ldx, batch, R, C, in, out;
} Gradient;

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* The largest of 1, 2, 4 .. most that is not above n. */
static inline int64_t largest_power(int64_t n, int64_t most)
{
    while (most > n)
        most /= 2;
    return most;
}

static inline int64_t block_rows(const Layer *l) { return ceil_div(l->out, l->R); }

/* The first block of block row i with a column from `column` on. */
static inline int32_t first_from(const Layer *l, int64_t i, int64_t column)
{
    int32_t low = l->crow[i], high = l->crow[i + 1];
    while (low < high) {
        const int32_t middle = low + (high - low) / 2;
        if (l->col[middle] < column)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The processor foresees weights that are read once, in order. Where a block row is passed over
   several times, each pass asks for its share of the next one: so many lines with each block. */
static inline int64_t lines_to_ask_for(const Layer *l, int64_t passes)
{
    return l->R > 1 && passes > 1 ? ceil_div(l->R * l->C, LINE_FLOATS * passes) : 0;
}

static inline int64_t kept_weights(const Layer *l) { return l->crow[block_rows(l)] * l->C * l->R; }

/* The kernels of one instruction set. A panel is `lanes` rows of the batch transposed: (features,
   lanes). */
typedef struct {
    const char *name;
    int lanes; /* floats in a vector register */
    /* block rows begin .. end: x (rows, in) -> y (rows, out); R a multiple of 16, of 8, of 4 */
    void (*tall16)(const Layer *, int64_t begin, int64_t end, const float *x, int64_t ldx, float *y,
                   int64_t ldy, int64_t rows);
    void (*tall8)(const Layer *, int64_t begin, int64_t end, const float *x, int64_t ldx, float *y,
                  int64_t ldy, int64_t rows);
    void (*tall4)(const Layer *, int64_t begin, int64_t end, const float *x, int64_t ldx, float *y,
                  int64_t ldy, int64_t rows);
    /* any blocksize: block rows begin .. end, panels of x, ldx floats from one to the next, -> panels
       of y; outputs begin .. end, one row, x (in,) -> y (out,) */
    void (*panels)(const Layer *, int64_t begin, int64_t end, const float *x, int64_t ldx, float *y,
                   int64_t ldy, int64_t panels);
    void (*single)(const Layer *, int64_t begin, int64_t end, const float *x, float *y);
    /* (m, n) -> (n, m), with zeros from m to padded */
    void (*transpose)(const float *from, int64_t ldfrom, int64_t m, int64_t n, float *to,
                      int64_t ldto, int64_t padded);
    /* the code of a program, or NULL; groups begin .. end of such a layer, for any panels. Both are
       NULL in all instruction sets but one */
    const Code *(*code_of)(Program *);
    void (*run_code)(const Code *, const Layer *, int64_t begin, int64_t end, const float *x,
                     int64_t ldx, float *y, int64_t ldy, int64_t panels);
    /* block rows begin .. end of the weight gradient; R a multiple of 16, of 8 */
    void (*sddmm_tall16)(const Gradient *, int64_t begin, int64_t end);
    void (*sddmm_tall8)(const Gradient *, int64_t begin, int64_t end);
    /* outputs begin .. end, for a panel: grad (out, lanes), x (in, lanes), 1 to 8 times `lanes` */
    void (*sddmm_wide)(const Gradient *, int64_t begin, int64_t end, const float *grad,
                       const float *x, int64_t lanes, int first);
    /* convolutions: offsets (in,) into x, vectors of positions; see conv_cpu.c */
    int (*conv)(const Layer *, const int32_t *offsets, int64_t o, const float *x, int64_t vectors,
                float *y);
    void (*pool)(float *y, int64_t ldy, int64_t rows, int64_t columns);
    void (*conv_grad_input)(const Layer *, const int32_t *slots, const int32_t *offsets,
                            int64_t begin, int64_t end, const float *grad, int64_t ldg,
                            int64_t vectors, float *dx);
    void (*conv_grad_weight)(const Gradient *, const int32_t *offsets, int64_t o, const float *grad,
                             const float *x, int64_t vectors);
} Kernels;

/* Threads. `task(arg, i, worker)` runs once for each i < tasks; workers take the next i as they
   come, so results must not depend on who ran what. worker < threads names who runs it. */

typedef void (*Task)(void *arg, int64_t i, int worker);
typedef void (*Parallel)(void (*fn)(void *), void *data, unsigned threads, unsigned flags);

enum { MAX_THREADS = 256, MAX_LAYERS = 64 };

typedef struct {
    Task task;
    void *arg;
    int64_t tasks;
    atomic_llong next;
    atomic_int workers;
} Job;

/* GOMP_parallel of the OpenMP runtime that the process already runs, so that we use the threads
   of torch instead of contending with them. NULL where there is none, and in a forked child, where
   those threads are gone and the runtime would wait for them forever. */
static Parallel openmp;

static void after_fork(void) { openmp = NULL; }

/* Threads that find a processor. The threads of OpenMP wait for each other, so that a call on a
   busy machine takes as long as the one that waits longest for a processor: several times what it
   takes on one thread. Linux says in /proc/loadavg how many threads run or want to ("0.2 0.3 0.3
   2/345 .." are 2), of which this one and the `wanted - 1` that spin in our pool are ours. It is
   read every 2 ms, and what is busy only for an instant is not counted. */
static int load_file = -1;
static long processors;

static int runnable(void)
{
    char text[64] = {0};
    if (load_file < 0 || pread(load_file, text, sizeof text - 1, 0) <= 0)
        return 0;
    const char *end = strchr(text, '/');
    while (end && end > text && end[-1] != ' ')
        end--;
    return end ? atoi(end) : 0;
}

static int threads_now(int wanted)
{
    enum { PERIOD = 2000000 }; /* ns */
    static atomic_llong read_at;
    static atomic_int before, others;
    struct timespec now;
    if (wanted == 1)
        return 1;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    const long long ns = now.tv_sec * 1000000000LL + now.tv_nsec;
    if (ns - atomic_load(&read_at) > PERIOD) {
        const int seen = runnable(), last = atomic_exchange(&before, seen);
        atomic_store(&read_at, ns);
        atomic_store(&others, (int)min64(seen, last) - wanted);
    }
    const int64_t left = processors - max64(0, atomic_load(&others));
    return (int)max64(1, min64(wanted, left));
}

static void work(void *data)
{
    Job *job = data;
    int worker = atomic_fetch_add(&job->workers, 1);
    for (int64_t i; (i = atomic_fetch_add(&job->next, 1)) < job->tasks;)
        job->task(job->arg, i, worker);
}

static void *work_thread(void *data)
{
    work(data);
    return NULL;
}

static void parallel_for(int threads, int64_t tasks, Task task, void *arg)
{
    Job job = {.task = task, .arg = arg, .tasks = tasks};
    pthread_t started[MAX_THREADS];
    int n = 0;
    threads = (int)min64(min64(threads, tasks), MAX_THREADS);
    if (threads > 1 && openmp) {
        openmp(work, &job, threads, 0);
        return;
    }
    while (n < threads - 1 && pthread_create(&started[n], NULL, work_thread, &job) == 0)
        n++;
    work(&job);
    while (n)
        pthread_join(started[--n], NULL);
}

#endif
