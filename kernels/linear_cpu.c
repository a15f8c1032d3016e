/* The linear layer, y = activation(x W^T + b), included once for each instruction set.

   NAME(f)  f with the suffix of the instruction set
   TARGET   the attribute that selects it
   LANES    floats in a vector register
   ROWS     batch rows in a register tile of 16 outputs

   Tall blocks (R a multiple of 8) read x as it comes: a register tile is batch rows x outputs, and
   a vector of weights meets broadcast inputs. Wide blocks (every other R) read x transposed: every
   weight meets a vector of the batch. */

typedef float NAME(vec) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t NAME(ivec) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define vec NAME(vec)
#define ivec NAME(ivec)
#define LOAD(p) (*(const vec *)(p))
#define STORE(p, v) (*(vec *)(p) = (v))
#define RELU(v) ((vec)((ivec)(v) & ~(ivec)((v) < 0))) /* NaN stays NaN */
#define INLINE static inline __attribute__((always_inline)) TARGET
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

/* Blocks begin .. end, of one block row. With each of them a tile asks for some lines of weights
   that are multiplied later. */
typedef struct {
    int32_t begin, end;
    const float *later;
    int64_t lines;
} NAME(Part);

/* `width` outputs of a block row, whose weights are from r0 on in the blocks, for `rows` rows of the
   batch: y = start + x W^T, with ReLU if asked. Few rows are too few sums to hide the latency of an
   addition: each is then taken in several chains. */
INLINE void NAME(tall_tile)(const int rows, const int width, const Layer *l, int64_t r0,
                            NAME(Part) part, int relu, const float *start, int64_t ldstart,
                            const float *x, int64_t ldx, float *y, int64_t ldy)
{
    const int V = width / LANES, S = rows * V; /* sums, acc[chain * S + row * V + v] */
    const int chains = S >= 8 ? 1 : S >= 4 ? 2 : 4;
    const int64_t R = l->R, C = l->C;
    vec acc[4 * ROWS * 16 / LANES];
    UNROLL for (int m = 0; m < rows; m++, start += ldstart)
        UNROLL for (int v = 0; v < V; v++) acc[m * V + v] = LOAD(start + v * LANES);
    UNROLL for (int a = S; a < chains * S; a++) acc[a] = (vec){0};
    for (int32_t n = part.begin; n < part.end; n++) {
        const int64_t k = l->col[n] * C, inside = min64(C, l->in - k);
        const int64_t next = l->col[n + 1 < part.end ? n + 1 : n] * C;
        const float *w = l->values + n * C * R + r0, *p[ROWS * 16 / LANES];
        int64_t c = 0;
        for (int64_t a = 0; a < part.lines; a++, part.later += LINE_FLOATS)
            __builtin_prefetch(part.later, 0, 2);
        UNROLL for (int m = 0; m < rows; m++) __builtin_prefetch(x + next + m * ldx);
        UNROLL for (int m = 0; m < rows; m += 3) {
            p[m / 3] = x + k + m * ldx;
            __asm__("" : "+r"(p[m / 3])); /* a pointer for 3 rows: 14 offsets would be spilled */
        }
        for (; c + chains <= inside; c += chains)
            UNROLL for (int j = 0; j < chains; j++)
                UNROLL for (int v = 0; v < V; v++) {
                    const vec weight = LOAD(w + (c + j) * R + v * LANES);
                    UNROLL for (int m = 0; m < rows; m++)
                        acc[j * S + m * V + v] += weight * p[m / 3][m % 3 * ldx + c + j];
                }
        for (; chains > 1 && c < inside; c++)
            UNROLL for (int v = 0; v < V; v++)
                UNROLL for (int m = 0; m < rows; m++)
                    acc[m * V + v] += LOAD(w + c * R + v * LANES) * p[m / 3][m % 3 * ldx + c];
    }
    UNROLL for (int j = 1; j < chains; j++)
        UNROLL for (int a = 0; a < S; a++) acc[a] += acc[j * S + a];
    if (relu)
        UNROLL for (int a = 0; a < S; a++) acc[a] = RELU(acc[a]);
    UNROLL for (int m = 0; m < rows; m++, y += ldy)
        UNROLL for (int v = 0; v < V; v++) STORE(y + v * LANES, acc[m * V + v]);
}

/* from (rows, n) -> to */
static void NAME(copy_rows)(const float *from, int64_t ldfrom, float *to, int64_t ldto,
                            int64_t rows, int64_t n)
{
    for (int64_t m = 0; m < rows; m++)
        memcpy(to + m * ldto, from + m * ldfrom, n * sizeof(float));
}

/* Block rows begin .. end of a layer of tall blocks: x (rows, in) -> y (rows, out). The blocks of a
   block row stay in the first cache while the rows pass, and a range of x in the second. */
INLINE void NAME(tall_rows)(const int width, const Layer *l, int64_t begin, int64_t end,
                            const float *x, int64_t ldx, float *y, int64_t ldy, int64_t rows)
{
    static const float no_bias[16];
    const int most = ROWS * 16 / width;
    const int64_t groups = ceil_div(rows, most), ranges = ceil_div(rows * l->in, CACHED);
    const int64_t range = ceil_div(ceil_div(l->in, ranges), l->C); /* block columns */
    /* The processor foresees weights that are read once, in order. Where rows pass several times
       over a block row, each pass asks for its share of the next one. */
    const int64_t passes = groups * (l->R / width), block = l->R * l->C;
    const int64_t lines = passes > 1 ? ceil_div(block, LINE_FLOATS * passes) : 0;
    float edge[ROWS * 16] = {0}, edge_bias[16] = {0}; /* of outputs that fill no vector */
    for (int64_t t = 0; t < ranges; t++)
        for (int64_t i = begin; i < end; i++) {
            const int first = t == 0, last = t == ranges - 1;
            NAME(Part) part = {.begin = first_from(l, i, t * range),
                               .end = last ? l->crow[i + 1] : first_from(l, i, (t + 1) * range),
                               .lines = lines};
            const int32_t next = part.begin + l->crow[i + 1] - l->crow[i]; /* or near it */
            part.later = l->values + next * block;
            for (int64_t r0 = 0; r0 < l->R && i * l->R + r0 < l->out; r0 += width) {
                const int64_t o = i * l->R + r0, left = l->out - o;
                const float *bias = l->bias ? l->bias + o : no_bias;
                if (left < width)
                    bias = memcpy(edge_bias, bias, left * sizeof(float));
                for (int64_t g = 0; g < groups; g++) {
                    const int64_t m = rows * g / groups, size = rows * (g + 1) / groups - m;
                    const float *xm = x + m * ldx;
                    float *const ym = y + m * ldy + o, *to = left < width ? edge : ym;
                    const int64_t ldto = left < width ? width : ldy;
                    if (left < width && !first)
                        NAME(copy_rows)(ym, ldy, edge, width, size, left);
                    const float *start = first ? bias : to;
#define TILE(n)                                                                                    \
    case n:                                                                                        \
        if (n <= most)                                                                             \
            NAME(tall_tile)(n <= most ? n : 1, width, l, r0, part, last && l->relu, start,         \
                            first ? 0 : ldto, xm, ldx, to, ldto);                                  \
        break;
                    switch (size) {
                        TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9)
                        TILE(10) TILE(11) TILE(12) TILE(13) TILE(14)
                    }
#undef TILE
                    part.later += (part.end - part.begin) * lines * LINE_FLOATS;
                    if (left < width)
                        NAME(copy_rows)(edge, width, ym, ldy, size, left);
                }
            }
        }
}

static TARGET void NAME(tall16)(const Layer *l, int64_t begin, int64_t end, const float *x,
                                int64_t ldx, float *y, int64_t ldy, int64_t rows)
{
    NAME(tall_rows)(16, l, begin, end, x, ldx, y, ldy, rows);
}

#if LANES <= 8
static TARGET void NAME(tall8)(const Layer *l, int64_t begin, int64_t end, const float *x,
                               int64_t ldx, float *y, int64_t ldy, int64_t rows)
{
    NAME(tall_rows)(8, l, begin, end, x, ldx, y, ldy, rows);
}
#endif

/* Outputs begin .. end for nv panels: x (in, LANES) and y (out, LANES), ldx and ldy floats from
   panel to panel. The sum of an output is taken in several chains, to hide the latency of an
   addition. */
INLINE void NAME(wide_rows)(const int nv, const Layer *l, int64_t begin, int64_t end,
                            const float *x, int64_t ldx, float *y, int64_t ldy)
{
    const int chains = 8 / nv;
    const int64_t R = l->R, C = l->C;
    for (int64_t o = begin; o < end; o++) {
        const int64_t i = o / R, r = o % R, last = l->crow[i + 1];
        vec acc[8];
        UNROLL for (int a = 0; a < 8; a++) acc[a] = (vec){0};
        int64_t n = l->crow[i];
#define ADD(j, weight, input)                                                                      \
    UNROLL for (int v = 0; v < nv; v++)                                                            \
        acc[(j) * nv + v] += (weight) * LOAD(x + (input) * LANES + v * ldx);
        if (C == 1) {
            for (; n + chains <= last; n += chains)
                UNROLL for (int j = 0; j < chains; j++)
                    ADD(j, l->values[(n + j) * R + r], l->col[n + j])
            for (; n < last; n++)
                ADD(0, l->values[n * R + r], l->col[n])
        } else {
            for (; n < last; n++) {
                const int64_t k = l->col[n] * C, inside = min64(C, l->in - k);
                const float *w = l->values + n * C * R + r;
                int64_t c = 0;
                for (; c + chains <= inside; c += chains)
                    UNROLL for (int j = 0; j < chains; j++) ADD(j, w[(c + j) * R], k + c + j)
                for (; c < inside; c++)
                    ADD(0, w[c * R], k + c)
            }
        }
#undef ADD
        UNROLL for (int v = 0; v < nv; v++) {
            vec sum = acc[v];
            UNROLL for (int j = 1; j < chains; j++) sum += acc[j * nv + v];
            if (l->bias)
                sum += l->bias[o];
            STORE(y + o * LANES + v * ldy, l->relu ? RELU(sum) : sum);
        }
    }
}

static TARGET void NAME(wide)(const Layer *l, int64_t begin, int64_t end, const float *x,
                              int64_t ldx, float *y, int64_t ldy, int64_t panels)
{
    switch (panels) {
    case 1: NAME(wide_rows)(1, l, begin, end, x, ldx, y, ldy); break;
    case 2: NAME(wide_rows)(2, l, begin, end, x, ldx, y, ldy); break;
    default: NAME(wide_rows)(4, l, begin, end, x, ldx, y, ldy);
    }
}

/* The sum of v[n] * x[k[n]]. Gathering inputs into quads costs a shuffle each, but the weights are
   then loaded and multiplied four at a time. */
INLINE float NAME(gathered)(const float *v, const int32_t *k, const float *x, int64_t count)
{
    quad a = {0}, b = {0};
    int64_t n = 0;
#define GATHER(n) ((quad){x[k[n]], x[k[(n) + 1]], x[k[(n) + 2]], x[k[(n) + 3]]})
    for (; n + 8 <= count; n += 8) {
        a += *(const quad *)(v + n) * GATHER(n);
        b += *(const quad *)(v + n + 4) * GATHER(n + 4);
    }
    for (; n + 4 <= count; n += 4)
        a += *(const quad *)(v + n) * GATHER(n);
#undef GATHER
    a += b;
    for (; n < count; n++)
        a[0] += v[n] * x[k[n]];
    return (a[0] + a[1]) + (a[2] + a[3]);
}

/* Outputs begin .. end for one row of the batch: x (in,) -> y (out,) */
static TARGET void NAME(single)(const Layer *l, int64_t begin, int64_t end, const float *x,
                                float *y)
{
    const int64_t R = l->R, C = l->C;
    const float floor = l->relu ? 0 : -INFINITY;
#define OUTPUT(o, sum)                                                                             \
    {                                                                                              \
        const float total = (sum) + (l->bias ? l->bias[o] : 0);                                    \
        y[o] = total < floor ? floor : total;                                                      \
    }
    if (R == 1 && C == 1) {
        for (int64_t o = begin, n = l->crow[o]; o < end; o++) {
            const int64_t last = l->crow[o + 1];
            OUTPUT(o, NAME(gathered)(l->values + n, l->col + n, x, last - n));
            n = last;
        }
        return;
    }
    for (int64_t o = begin, i = begin / R, r = begin % R; o < end; o++) {
        vec sums = {0};
        float sum[4] = {0};
        for (int64_t n = l->crow[i]; n < l->crow[i + 1]; n++) {
            const float *w = l->values + n * C * R + r, *xk = x + l->col[n] * C;
            const int64_t inside = min64(C, l->in - l->col[n] * C);
            int64_t c = 0;
            for (; R == 1 && c + LANES <= inside; c += LANES)
                sums += LOAD(w + c) * LOAD(xk + c);
            for (; c + 4 <= inside; c += 4)
                UNROLL for (int j = 0; j < 4; j++) sum[j] += w[(c + j) * R] * xk[c + j];
            for (; c < inside; c++)
                sum[0] += w[c * R] * xk[c];
        }
        UNROLL for (int j = 0; j < LANES; j++) sum[j % 4] += sums[j];
        OUTPUT(o, (sum[0] + sum[1]) + (sum[2] + sum[3]));
        if (++r == R)
            r = 0, i++;
    }
#undef OUTPUT
}

/* The rounds of a transpose in registers: round d swaps the off-diagonal d x d blocks of each
   2d x 2d block. LO and HI say which lanes of a pair (a, b) its two results take. */
#define LO1(q) q, LANES + q, q + 2, LANES + q + 2
#define HI1(q) q + 1, LANES + q + 1, q + 3, LANES + q + 3
#define LO2(q) q, q + 1, LANES + q, LANES + q + 1
#define HI2(q) q + 2, q + 3, LANES + q + 2, LANES + q + 3
#define RUN4(q) q, q + 1, q + 2, q + 3
#if LANES == 4
#define EACH4(f) f(0)
#elif LANES == 8
#define EACH4(f) f(0), f(4)
#define LO4 RUN4(0), RUN4(8)
#define HI4 RUN4(4), RUN4(12)
#else
#define EACH4(f) f(0), f(4), f(8), f(12)
#define LO4 RUN4(0), RUN4(16), RUN4(8), RUN4(24)
#define HI4 RUN4(4), RUN4(20), RUN4(12), RUN4(28)
#define LO8 RUN4(0), RUN4(4), RUN4(16), RUN4(20)
#define HI8 RUN4(8), RUN4(12), RUN4(24), RUN4(28)
#endif
INLINE void NAME(transpose_block)(vec *v)
{
#define SWAP(d, LO, HI)                                                                            \
    UNROLL for (int i = 0; i < LANES; i++) if (!(i & d))                                           \
    {                                                                                              \
        const vec a = v[i], b = v[i + d];                                                          \
        v[i] = __builtin_shufflevector(a, b, LO);                                                  \
        v[i + d] = __builtin_shufflevector(a, b, HI);                                              \
    }
    SWAP(1, EACH4(LO1), EACH4(HI1))
    SWAP(2, EACH4(LO2), EACH4(HI2))
#if LANES >= 8
    SWAP(4, LO4, HI4)
#endif
#if LANES >= 16
    SWAP(8, LO8, HI8)
#endif
#undef SWAP
}

/* from (m, n) -> to (n, m), with zeros from m to padded. It asks for the lines it comes to next: a
   batch that is not in cache arrives here. */
static TARGET void NAME(transpose)(const float *from, int64_t ldfrom, int64_t m, int64_t n,
                                   float *to, int64_t ldto, int64_t padded)
{
    enum { AHEAD = 64 };
    for (int64_t i = 0; i < padded; i += LANES)
        for (int64_t j = 0; j < n; j += LANES) {
            const int64_t in = min64(LANES, n - j), out = min64(LANES, padded - i);
            vec v[LANES];
            if (in == LANES && i + LANES <= m)
                UNROLL for (int a = 0; a < LANES; a++) {
                    v[a] = LOAD(from + (i + a) * ldfrom + j);
                    __builtin_prefetch(from + (i + a) * ldfrom + j + AHEAD);
                }
            else
                for (int a = 0; a < LANES; a++) {
                    v[a] = (vec){0};
                    if (i + a < m)
                        memcpy(&v[a], from + (i + a) * ldfrom + j, in * sizeof(float));
                }
            NAME(transpose_block)(v);
            if (in == LANES && out == LANES)
                UNROLL for (int a = 0; a < LANES; a++) STORE(to + (j + a) * ldto + i, v[a]);
            else
                for (int a = 0; a < in; a++)
                    memcpy(to + (j + a) * ldto + i, &v[a], out * sizeof(float));
        }
}
