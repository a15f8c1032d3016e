/* What the kernels on bf16 and int8 share. Both are read by words of 32 bits: 2 bf16 or 4 int8 of
   inputs that belong to one output, which one instruction multiplies and adds up. */

#ifndef WORDS_H
#define WORDS_H

#include "native.h"

typedef uint32_t Word __attribute__((may_alias, aligned(1)));

/* A block-sparse (out, in) weight, its inputs in groups of a word.

   The kept inputs of a block row, block after block, are cut into groups, each of which is a word
   for an output; the last one is filled up with zeros. */
typedef struct {
    const int32_t *crow, *col; /* (block_rows + 1,), (nnz,) */
    int64_t R, C, in, out;
    int per_word;          /* numbers in a word */
    int tall;              /* whether it is taken by rows of the batch, by `tall` below, ... */
    int planes;            /* or else whether x is (in, lanes) numbers, not (words, lanes) words */
    char *memory;          /* what packed and inputs lie in, or NULL */
    const char *packed;    /* for each block row (groups, R) words, see row_of */
    const char *values;    /* (nnz, C, R), where nothing is packed */
    const int32_t *inputs; /* for each block row, its kept inputs, or words of them */
    const void *bias;      /* (out,) of bf16 or, with int8, floats; or NULL */
    int relu;
    const float *scales;   /* int8: (out,), what a 1 of the weight stands for */
    const int32_t *totals; /* int8: (out,), the sum of an output's weights */
} WordLayer;

/* One block row. */
typedef struct {
    const char *weights; /* (groups, R) words */
    const int32_t *inputs;
    int64_t count; /* of inputs */
} WordRow;

/* Inputs of the blocks of row i, without those of a last block that are beyond the layer. */
static inline int64_t kept_inputs(const WordLayer *l, int64_t i)
{
    const int64_t begin = l->crow[i], end = l->crow[i + 1];
    return begin == end ? 0
                        : (end - begin) * l->C - max64(0, (l->col[end - 1] + 1) * l->C - l->in);
}

/* Groups before those of block row i: at least one more than full for each row. */
static inline int64_t groups_before(const WordLayer *l, int64_t i)
{
    return l->crow[i] * l->C / l->per_word + i;
}

/* Whether the inputs of a block row come in whole groups, as its words do. */
static inline int in_groups(const WordLayer *l) { return l->planes && l->per_word == 4; }

static inline WordRow row_of(const WordLayer *l, int64_t i)
{
    const int64_t first = l->crow[i] * l->C;
    return (WordRow){.weights = l->packed ? l->packed + 4 * groups_before(l, i) * l->R
                                          : l->values + first * (4 / l->per_word),
                     .inputs = l->inputs + (in_groups(l) ? 4 * groups_before(l, i)
                                            : l->planes  ? first
                                                         : first / l->per_word),
                     .count = kept_inputs(l, i)};
}

/* The blocks that pack reads: block n is values[slots ? slots[n] : n], and there output r and
   input c is the number r * output_step + c * input_step. */
typedef struct {
    const void *values;
    const int32_t *slots;
    int64_t output_step, input_step;
} Blocks;

/* Rows of the batch in int8, which stand for scale * (number - zero); a number is the whole part of
   x * inverse + shift, at most 255. All are (lanes,). */
typedef struct {
    float *scales, *inverses, *shifts;
    int32_t *zeros;
} Scaling;

/* The weight gradient before it is rounded. */
typedef struct {
    const WordLayer *layer;
    float *values; /* (nnz, C, R) */
} WordGradient;

/* The kernels of one instruction set on one type. A tile is `lanes` rows of the batch transposed,
   as words or numbers; what they come to leaves as (out, lanes), numbers of bf16 or floats. */
typedef struct {
    const char *name;
    int lanes, most_lanes; /* a tile has the one or the other */
    int panel;             /* lanes of a tile of the weight gradient */
    int height;            /* `tall` takes layers whose R is a multiple of this */
    void (*tall)(const WordLayer *, int64_t begin, int64_t end, const char *x, int64_t ldx,
                 const Scaling *, char *y, int64_t ldy, int64_t rows);
    /* block rows begin .. end of what a layer reads */
    void (*pack)(const WordLayer *, const Blocks *, int64_t begin, int64_t end, char *packed,
                 int32_t *inputs);
    /* words begin .. end of rows (rows, ldx) of words -> x; in int8 planes are made of floats */
    void (*enter)(const float *rows, int64_t ldx, int64_t n, int64_t begin, int64_t end,
                  const WordLayer *, char *x, int64_t lanes, const Scaling *);
    /* y (features, lanes) as outputs makes it -> x of the next layer */
    void (*reenter)(const char *y, int64_t features, int64_t lanes, int planes, char *x,
                    const Scaling *);
    /* block rows begin .. end -> y, of which their first output is the first */
    void (*outputs)(const WordLayer *, int64_t begin, int64_t end, const char *x, int64_t lanes,
                    const Scaling *, char *y);
    /* y (outputs, lanes) -> rows of y, `first` the first of the outputs */
    void (*leave)(const char *y, int64_t lanes, int64_t first, int64_t outputs, char *to,
                  int64_t ldto, int64_t rows);
    /* bf16: block rows begin .. end for a panel: grad (out, lanes), x (in, lanes) numbers */
    void (*sddmm)(const WordGradient *, int64_t begin, int64_t end, const char *grad,
                  const char *x, int64_t lanes, int first);
    /* floats -> bf16 */
    void (*round)(const float *, int64_t n, uint16_t *);
    /* int8: of x (rows, in), floats */
    void (*measure)(const float *x, int64_t ldx, int64_t rows, int64_t in, int64_t lanes,
                    const Scaling *);
    /* int8: x -> (rows, words) words, zeros behind `in` */
    void (*quantize)(const float *x, int64_t ldx, int64_t rows, int64_t in, uint8_t *to,
                     int64_t words, const Scaling *);
} WordKernels;

#endif
