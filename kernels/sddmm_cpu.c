/* The weight gradient at the kept blocks (SDDMM), included after linear_cpu.c.

   Tall blocks (R a multiple of 8) read grad and x as they come: a register tile is inputs x outputs
   of one block. Wide blocks read both transposed, and a weight is a dot product over the batch. */

#define INPUTS (LANES == 16 ? 16 : ROWS)

/* values[n] (C, R) += grad (rows, R)^T x (rows, C) for `inputs` inputs and `width` outputs of a
   block; the first panel of the batch sets. */
INLINE void NAME(sddmm_tile)(const int inputs, const int width, const float *grad, int64_t ldg,
                             const float *x, int64_t ldx, int64_t rows, float *values, int64_t R,
                             int first)
{
    const int V = width / LANES;
    vec acc[INPUTS * 16 / LANES];
    UNROLL for (int c = 0; c < inputs; c++)
        UNROLL for (int v = 0; v < V; v++)
            acc[c * V + v] = first ? (vec){0} : LOAD(values + c * R + v * LANES);
    for (int64_t m = 0; m < rows; m++, grad += ldg, x += ldx)
        UNROLL for (int v = 0; v < V; v++) {
            const vec g = LOAD(grad + v * LANES);
            UNROLL for (int c = 0; c < inputs; c++) acc[c * V + v] += g * x[c];
        }
    UNROLL for (int c = 0; c < inputs; c++)
        UNROLL for (int v = 0; v < V; v++) STORE(values + c * R + v * LANES, acc[c * V + v]);
}

/* Block row i of a layer of tall blocks, a panel of the batch at a time, so that the rows of grad
   and x that its blocks share stay in cache. Outputs beyond the last have zero gradients. */
INLINE void NAME(sddmm_tall)(const int width, const Gradient *s, int64_t i)
{
    enum { PANEL = 128 };
    const int most = INPUTS * 16 / width < 16 ? INPUTS * 16 / width : 16;
    const int64_t R = s->R, C = s->C;
    float edge[PANEL * 16];
    for (int64_t r0 = 0; r0 < R; r0 += width)
        for (int64_t m = 0; m < s->batch; m += PANEL) {
            const int64_t rows = min64(PANEL, s->batch - m);
            const int64_t left = max64(0, min64(width, s->out - i * R - r0));
            const float *grad = s->grad + m * s->ldg + i * R + r0;
            int64_t ldg = s->ldg;
            if (left < width) {
                memset(edge, 0, sizeof edge);
                for (int64_t a = 0; a < rows; a++)
                    memcpy(edge + a * width, grad + a * ldg, left * sizeof(float));
                grad = edge, ldg = width;
            }
            for (int64_t n = s->crow[i]; n < s->crow[i + 1]; n++) {
                const int64_t k = s->col[n] * C, inside = min64(C, s->in - k);
                const int64_t groups = ceil_div(inside, most);
                float *values = s->values + n * C * R + r0;
                for (int64_t g = 0; g < groups; g++) {
                    const int64_t c = inside * g / groups, size = inside * (g + 1) / groups - c;
                    const float *x = s->x + m * s->ldx + k + c;
#define TILE(n)                                                                                    \
    case n:                                                                                        \
        if (n <= most)                                                                             \
            NAME(sddmm_tile)(n <= most ? n : 1, width, grad, ldg, x, s->ldx, rows,                 \
                             values + c * R, R, m == 0);                                           \
        break;
                    switch (size) {
                        TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9)
                        TILE(10) TILE(11) TILE(12) TILE(13) TILE(14) TILE(15) TILE(16)
                    }
#undef TILE
                }
            }
        }
}

static TARGET void NAME(sddmm_tall16)(const Gradient *s, int64_t begin, int64_t end)
{
    for (int64_t i = begin; i < end; i++)
        NAME(sddmm_tall)(16, s, i);
}

#if LANES <= 8
static TARGET void NAME(sddmm_tall8)(const Gradient *s, int64_t begin, int64_t end)
{
    for (int64_t i = begin; i < end; i++)
        NAME(sddmm_tall)(8, s, i);
}
#endif

/* Adds up each of the vectors v[0 .. LANES] and puts `count` of the sums where `to` says. */
INLINE void NAME(flush)(vec *v, float **to, int count, int first)
{
    NAME(transpose_block)(v);
    vec sum = v[0];
    UNROLL for (int a = 1; a < LANES; a++) sum += v[a];
    for (int a = 0; a < count; a++)
        *to[a] = sum[a] + (first ? 0 : *to[a]);
}

/* Outputs begin .. end on a panel of nv vectors: grad (out, nv * LANES), x (in, nv * LANES). The
   dot products are added up LANES at a time, by a transpose. */
INLINE void NAME(sddmm_wide_rows)(const int nv, const Gradient *s, int64_t begin, int64_t end,
                                  const float *grad, const float *x, int first)
{
    const int64_t R = s->R, C = s->C, lanes = nv * LANES;
    vec dots[LANES] = {{0}};
    float *to[LANES];
    int count = 0;
    for (int64_t o = begin; o < end; o++) {
        vec g[8];
        UNROLL for (int v = 0; v < nv; v++) g[v] = LOAD(grad + o * lanes + v * LANES);
        for (int64_t n = s->crow[o / R]; n < s->crow[o / R + 1]; n++) {
            const int64_t k = s->col[n] * C, inside = min64(C, s->in - k);
            for (int64_t c = 0; c < inside; c++) {
                const float *xk = x + (k + c) * lanes;
                vec even = g[0] * LOAD(xk), odd = {0};
                UNROLL for (int v = 1; v < nv; v += 2) odd += g[v] * LOAD(xk + v * LANES);
                UNROLL for (int v = 2; v < nv; v += 2) even += g[v] * LOAD(xk + v * LANES);
                dots[count] = even + odd;
                to[count++] = s->values + (n * C + c) * R + o % R;
                if (count == LANES) {
                    NAME(flush)(dots, to, count, first);
                    count = 0;
                }
            }
        }
    }
    NAME(flush)(dots, to, count, first);
}

static TARGET void NAME(sddmm_wide)(const Gradient *s, int64_t begin, int64_t end,
                                    const float *grad, const float *x, int64_t lanes, int first)
{
    switch (lanes / LANES) {
    case 1: NAME(sddmm_wide_rows)(1, s, begin, end, grad, x, first); break;
    case 2: NAME(sddmm_wide_rows)(2, s, begin, end, grad, x, first); break;
    case 4: NAME(sddmm_wide_rows)(4, s, begin, end, grad, x, first); break;
    default: NAME(sddmm_wide_rows)(8, s, begin, end, grad, x, first);
    }
}

#undef INPUTS
