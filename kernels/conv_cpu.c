/* The convolution, included after sddmm_cpu.c.

   x lies in a tile of padded planes (conv.c), where weight k meets the pixels offsets[k] + p for
   the outputs at p = 0, 1, ...: a row of weights is a sum of shifted runs, without a gather. A
   vector is LANES such positions. */

#define OUTPUTS (LANES == 16 ? 8 : 4) /* of a block that share a vector of x */

/* `outputs` outputs from o, of one block row, at nv vectors of positions: x -> y (outputs, ldy). An
   output's sum is taken in the order of its weights, whatever the tile. */
INLINE void NAME(conv_tile)(const int outputs, const int nv, const Layer *l, const int32_t *offsets,
                            int64_t o, const float *x, float *y, int64_t ldy)
{
    const int64_t R = l->R, C = l->C, begin = l->crow[o / R], end = l->crow[o / R + 1];
    vec acc[OUTPUTS * 3 > 8 ? OUTPUTS * 3 : 8];
    UNROLL for (int a = 0; a < outputs * nv; a++) acc[a] = (vec){0};
#define ADD(weights, k)                                                                            \
    {                                                                                              \
        const float *w = weights, *p = x + offsets[k];                                             \
        vec in[8];                                                                                 \
        UNROLL for (int v = 0; v < nv; v++) in[v] = LOAD(p + v * LANES);                           \
        UNROLL for (int j = 0; j < outputs; j++)                                                   \
            UNROLL for (int v = 0; v < nv; v++) acc[j * nv + v] += w[j] * in[v];                   \
    }
    const float *values = l->values + o % R;
    if (C == 1)
        for (int64_t n = begin; n < end; n++)
            ADD(values + n * R, l->col[n])
    else
        for (int64_t n = begin; n < end; n++) {
            const int64_t k = l->col[n] * C, inside = min64(C, l->in - k);
            for (int64_t c = 0; c < inside; c++)
                ADD(values + (n * C + c) * R, k + c)
        }
#undef ADD
    UNROLL for (int j = 0; j < outputs; j++) {
        const float bias = l->bias && o + j < l->out ? l->bias[o + j] : 0;
        UNROLL for (int v = 0; v < nv; v++) {
            const vec sum = acc[j * nv + v] + bias;
            STORE(y + j * ldy + v * LANES, l->relu ? RELU(sum) : sum);
        }
    }
}

/* Outputs from o on, at all positions: x -> y (outputs, vectors * LANES); returns how many. */
static TARGET int NAME(conv)(const Layer *l, const int32_t *offsets, int64_t o, const float *x,
                             int64_t vectors, float *y)
{
    const int tall = l->R % OUTPUTS == 0;
    const int64_t groups = ceil_div(vectors, tall ? 3 : 8), ldy = vectors * LANES;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t v = vectors * g / groups, nv = vectors * (g + 1) / groups - v;
        const float *from = x + v * LANES;
        float *to = y + v * LANES;
#define TILE(outputs, n)                                                                           \
    case n: NAME(conv_tile)(outputs, n, l, offsets, o, from, to, ldy); break;
        if (tall)
            switch (nv) {
                TILE(OUTPUTS, 1) TILE(OUTPUTS, 2) TILE(OUTPUTS, 3)
            }
        else
            switch (nv) {
                TILE(1, 1) TILE(1, 2) TILE(1, 3) TILE(1, 4) TILE(1, 5) TILE(1, 6) TILE(1, 7)
                TILE(1, 8)
            }
#undef TILE
    }
    return tall ? OUTPUTS : 1;
}

/* A NaN in either is one in the result, as in torch. */
#define IS_MAX(a, b) (((a) > (b)) | ((a) != (a)))
#define MAX(a, b) ((vec)(((ivec)(a) & IS_MAX(a, b)) | ((ivec)(b) & ~IS_MAX(a, b))))
#if LANES == 4
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#elif LANES == 8
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#endif

/* The maxima of 2 x 2 pixels, in place: y (rows, columns) -> (rows / 2, columns / 2), rows `ldy`
   apart. It may read two vectors behind y. */
static TARGET void NAME(pool)(float *y, int64_t ldy, int64_t rows, int64_t columns)
{
    for (int64_t i = 0; i < rows / 2; i++)
        for (int64_t j = 0; j < columns / 2; j += LANES) {
            const float *top = y + 2 * i * ldy + 2 * j, *bottom = top + ldy;
            const vec a = MAX(LOAD(top), LOAD(bottom)),
                      b = MAX(LOAD(top + LANES), LOAD(bottom + LANES)),
                      even = __builtin_shufflevector(a, b, EVEN),
                      odd = __builtin_shufflevector(a, b, ODD), most = MAX(even, odd);
            memcpy(y + i * ldy + j, &most, min64(LANES, columns / 2 - j) * sizeof(float));
        }
}

#undef IS_MAX
#undef MAX
#undef EVEN
#undef ODD

/* What input k gets from nv vectors of grad (out, ldg), added to dx. The weight is transposed: its
   rows are l->crow, its blocks values[slots[n]]. */
INLINE void NAME(conv_grad_input_tile)(const int nv, const Layer *l, const int32_t *slots,
                                       int64_t k, const float *grad, int64_t ldg, float *dx)
{
    const int64_t C = l->R, R = l->C, i = k / C, last = l->crow[i + 1];
    vec acc[8];
    UNROLL for (int v = 0; v < nv; v++) acc[v] = (vec){0};
    for (int64_t n = l->crow[i]; n < last; n++) {
        const int64_t o = l->col[n] * R, inside = min64(R, l->in - o);
        const float *w = l->values + (slots[n] * C + k % C) * R, *g = grad + o * ldg;
        for (int64_t r = 0; r < inside; r++, g += ldg)
            UNROLL for (int v = 0; v < nv; v++) acc[v] += w[r] * LOAD(g + v * LANES);
    }
    UNROLL for (int v = 0; v < nv; v++)
        STORE(dx + v * LANES, LOAD(dx + v * LANES) + acc[v]);
}

/* Inputs begin .. end, of whole channels: grad (out, ldg) is added to their planes, dx. */
static TARGET void NAME(conv_grad_input)(const Layer *l, const int32_t *slots,
                                         const int32_t *offsets, int64_t begin, int64_t end,
                                         const float *grad, int64_t ldg, int64_t vectors, float *dx)
{
    const int64_t groups = ceil_div(vectors, 8);
    for (int64_t k = begin; k < end; k++)
        for (int64_t g = 0; g < groups && l->crow[k / l->R] < l->crow[k / l->R + 1]; g++) {
            const int64_t v = vectors * g / groups, nv = vectors * (g + 1) / groups - v;
            const float *from = grad + v * LANES;
            float *to = dx + offsets[k - begin] + v * LANES;
#define TILE(n)                                                                                    \
    case n: NAME(conv_grad_input_tile)(n, l, slots, k, from, ldg, to); break;
            switch (nv) {
                TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8)
            }
#undef TILE
        }
}

/* Adds to the gradient of the weights of output o: grad (vectors * LANES), x as in conv_tile */
static TARGET void NAME(conv_grad_weight)(const Gradient *s, const int32_t *offsets, int64_t o,
                                          const float *grad, const float *x, int64_t vectors)
{
    const int64_t groups = ceil_div(vectors, 8);
    for (int64_t a = 0; a < groups; a++) {
        const int64_t v = vectors * a / groups, nv = vectors * (a + 1) / groups - v;
        const float *from = grad + v * LANES, *with = x + v * LANES;
#define TILE(n)                                                                                    \
    case n: NAME(gradient_of)(n, s, o, from, with, offsets, 0); break;
        switch (nv) {
            TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8)
        }
#undef TILE
    }
}

#undef OUTPUTS
