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

/* Adds up each of the vectors v[0 .. LANES]; v[0] is then the sums. Each round halves the vectors. */
INLINE void NAME(add_up)(vec *v)
{
#define FOLD(d, LO, HI)                                                                            \
    UNROLL for (int i = 0; i < LANES; i += 2 * (d))                                                \
        v[i] = __builtin_shufflevector(v[i], v[i + (d)], LO) +                                     \
               __builtin_shufflevector(v[i], v[i + (d)], HI);
    FOLD(1, EACH4(LO1), EACH4(HI1))
    FOLD(2, EACH4(LO2), EACH4(HI2))
#if LANES >= 8
    FOLD(4, LO4, HI4)
#endif
#if LANES >= 16
    FOLD(8, LO8, HI8)
#endif
#undef FOLD
}

/* to[j * R] (+)= the dot product of g, nv vectors of grad, with those of input inputs[j], for the
   first `count` of LANES inputs. Those of input k are at x + offsets[k], or follow each other. */
INLINE void NAME(dots)(const int nv, const vec *g, const float *x, const int32_t *offsets,
                       const int32_t *inputs, int count, float *to, int64_t R, int first)
{
    vec sums[LANES];
    UNROLL for (int j = 0; j < LANES; j++) {
        const int64_t k = inputs[j];
        const float *xk = x + (offsets ? offsets[k] : k * nv * LANES);
        vec even = g[0] * LOAD(xk), odd = {0};
        UNROLL for (int v = 1; v < nv; v += 2) odd += g[v] * LOAD(xk + v * LANES);
        UNROLL for (int v = 2; v < nv; v += 2) even += g[v] * LOAD(xk + v * LANES);
        sums[j] = even + odd;
    }
    NAME(add_up)(sums);
    if (R == 1 && count == LANES)
        STORE(to, first ? sums[0] : (vec)(sums[0] + LOAD(to)));
    else
        for (int j = 0; j < count; j++)
            to[j * R] = sums[0][j] + (first ? 0 : to[j * R]);
}

/* The weights of output o for nv vectors of grad and of each input, as `dots` reads them; the first
   such vectors of a call set what the others add to. The weights of an output lie R apart, whatever
   C is, and padding is the last of them. */
INLINE void NAME(gradient_of)(const int nv, const Gradient *s, int64_t o, const float *grad,
                              const float *x, const int32_t *offsets, int first)
{
    const int64_t R = s->R, C = s->C, begin = s->crow[o / R], blocks = s->crow[o / R + 1] - begin;
    const int32_t *col = s->col + begin;
    const int64_t padding = blocks ? max64(0, (col[blocks - 1] + 1) * C - s->in) : 0;
    float *to = s->values + begin * C * R + o % R;
    int64_t n = 0, c = 0;
    vec g[8];
    UNROLL for (int v = 0; v < nv; v++) g[v] = LOAD(grad + v * LANES);
    for (int64_t left = blocks * C - padding; left > 0; left -= LANES, to += LANES * R) {
        const int count = (int)min64(left, LANES);
        int32_t some[LANES] = {0};
        const int32_t *inputs = some;
        if (C == 1 && count == LANES) {
            inputs = col + n;
            n += LANES;
        } else
            for (int j = 0; j < count; j++) {
                some[j] = (int32_t)(col[n] * C + c);
                if (++c == C)
                    c = 0, n++;
            }
        NAME(dots)(nv, g, x, offsets, inputs, count, to, R, first);
    }
}

/* Outputs begin .. end on a panel of nv vectors: grad (out, nv * LANES), x (in, nv * LANES). */
INLINE void NAME(sddmm_wide_rows)(const int nv, const Gradient *s, int64_t begin, int64_t end,
                                  const float *grad, const float *x, int first)
{
    for (int64_t o = begin; o < end; o++)
        NAME(gradient_of)(nv, s, o, grad + o * nv * LANES, x, NULL, first);
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
