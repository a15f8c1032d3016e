/* The linear layer, y = activation(x W^T + b), included once for each instruction set.

   NAME(f)  f with the suffix of the instruction set
   TARGET   the attribute that selects it
   LANES    floats in a vector register
   ROWS     batch rows in a register tile of 16 outputs
   WIDEST   outputs in a register tile of panels

   A layer reads x as it comes, in rows, if its blocks are tall (R a multiple of 4): a register tile
   is batch rows x outputs, and a vector of weights meets broadcast inputs. Or it reads x transposed,
   in panels, whatever its blocks: a broadcast weight meets a vector of the batch, and the outputs of
   a tile share the loads of x. */

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

/* `width` outputs of block row i, whose weights are from r0 on in the blocks, for `rows` rows of the
   batch: y = bias + x W^T, with ReLU if asked. Few rows are too few sums to hide the latency of an
   addition: each is then taken in several chains. With each block it asks for some lines of weights
   that are multiplied later. */
INLINE void NAME(tall_tile)(const int rows, const int width, const Layer *l, int64_t i, int64_t r0,
                            const float *later, int64_t lines, const float *bias, const float *x,
                            int64_t ldx, float *y, int64_t ldy)
{
    const int V = width / LANES, S = rows * V; /* sums, acc[chain * S + row * V + v] */
    const int chains = S >= 8 ? 1 : S >= 4 ? 2 : 4;
    const int64_t R = l->R, C = l->C;
    int32_t n = l->crow[i];
    const int32_t last = l->crow[i + 1];
    vec acc[4 * ROWS * 16 / LANES];
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int v = 0; v < V; v++) acc[m * V + v] = LOAD(bias + v * LANES);
    UNROLL for (int a = S; a < chains * S; a++) acc[a] = (vec){0};
    for (; C == 1 && chains > 1 && n + chains <= last; n += chains)
        UNROLL for (int j = 0; j < chains; j++)
            UNROLL for (int v = 0; v < V; v++) {
                const vec weight = LOAD(l->values + (n + j) * R + r0 + v * LANES);
                UNROLL for (int m = 0; m < rows; m++)
                    acc[j * S + m * V + v] += weight * x[l->col[n + j] + m * ldx];
            }
    for (; n < last; n++) {
        const int64_t k = l->col[n] * C, inside = min64(C, l->in - k);
        const int64_t next = l->col[n + 1 < last ? n + 1 : n] * C;
        const float *w = l->values + n * C * R + r0, *p[ROWS * 16 / LANES];
        int64_t c = 0;
        for (int64_t a = 0; a < lines; a++, later += LINE_FLOATS)
            __builtin_prefetch(later, 0, 2);
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
    if (l->relu)
        UNROLL for (int a = 0; a < S; a++) acc[a] = RELU(acc[a]);
    UNROLL for (int m = 0; m < rows; m++, y += ldy)
        UNROLL for (int v = 0; v < V; v++) STORE(y + v * LANES, acc[m * V + v]);
}

/* Block rows i .. end of a layer of tall blocks: x (rows, in) -> y (rows, out). The blocks of a block
   row stay in the first cache while the rows pass. */
INLINE void NAME(tall_rows)(const int width, const Layer *l, int64_t i, int64_t end, const float *x,
                            int64_t ldx, float *y, int64_t ldy, int64_t rows)
{
    static const float no_bias[16];
    const int most = ROWS * 16 / width;
    const int64_t groups = ceil_div(rows, most), block = l->R * l->C;
    const int64_t lines = lines_to_ask_for(l, groups * (l->R / width));
    float edge[ROWS * 16], edge_bias[16] = {0}; /* of outputs that fill no vector */
    for (; i < end; i++) {
        const float *later = l->values + l->crow[i + 1] * block;
        for (int64_t r0 = 0; r0 < l->R && i * l->R + r0 < l->out; r0 += width) {
            const int64_t o = i * l->R + r0, left = min64(width, l->out - o);
            const float *bias = l->bias ? l->bias + o : no_bias;
            if (left < width)
                bias = memcpy(edge_bias, bias, left * sizeof(float));
            for (int64_t g = 0; g < groups; g++) {
                const int64_t m = rows * g / groups, size = rows * (g + 1) / groups - m;
                float *const ym = y + m * ldy + o, *const to = left < width ? edge : ym;
                const int64_t ldto = left < width ? width : ldy;
#define TILE(n)                                                                                    \
    case n:                                                                                        \
        if (n <= most)                                                                             \
            NAME(tall_tile)(n <= most ? n : 1, width, l, i, r0, later, lines, bias, x + m * ldx,   \
                            ldx, to, ldto);                                                        \
        break;
                switch (size) {
                    TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9)
                    TILE(10) TILE(11) TILE(12) TILE(13) TILE(14)
                }
#undef TILE
                later += (l->crow[i + 1] - l->crow[i]) * lines * LINE_FLOATS;
                for (int64_t a = 0; left < width && a < size; a++)
                    memcpy(ym + a * ldy, edge + a * width, left * sizeof(float));
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

#if LANES <= 4
static TARGET void NAME(tall4)(const Layer *l, int64_t begin, int64_t end, const float *x,
                               int64_t ldx, float *y, int64_t ldy, int64_t rows)
{
    NAME(tall_rows)(4, l, begin, end, x, ldx, y, ldy, rows);
}
#endif

/* The inputs begin .. end of a layer, in block columns, that are added to panels: x (panels, in,
   LANES) and y (panels, out, LANES), ldx and ldy floats from panel to panel. */
typedef struct {
    const Layer *layer;
    int64_t begin, end;
    const float *x;
    float *y;
    int64_t ldx, ldy;
    int64_t lines, pass; /* of later weights to ask for with a block; passes before this one */
} NAME(Panels);

/* `width` outputs, whose weights are from r0 on in the blocks, of each of the block rows i .. last,
   for nv panels from p on. Few sums are each taken in several chains. */
INLINE void NAME(panel_tile)(const int width, const int nv, const int64_t R, const NAME(Panels) *s,
                             int64_t i, int64_t last, int64_t r0, int64_t p)
{
    const int S = width * nv; /* sums, acc[chain * S + output * nv + v] */
    const int chains = S >= 8 ? 1 : 8 / S;
    const Layer *l = s->layer;
    const int64_t C = l->C, ldx = s->ldx, ldy = s->ldy;
    const int starts = s->begin == 0, ends = s->end * C >= l->in;
    const float *x = s->x + p * ldx;
    for (; i < last; i++) {
        const int64_t first = i * R + r0;
        float *y = s->y + first * LANES + p * ldy;
        int64_t n = starts ? l->crow[i] : first_from(l, i, s->begin);
        const int64_t after = ends ? l->crow[i + 1] : first_from(l, i, s->end);
        const float *w = l->values + n * C * R + r0;
        const float *later = l->values + after * C * R; /* the next block row, or near it */
        later += s->pass * (after - n) * s->lines * LINE_FLOATS;
        vec acc[16];
        UNROLL for (int o = 0; o < width; o++)
            UNROLL for (int v = 0; v < nv; v++)
                if (starts)
                    acc[o * nv + v] = (vec){0} + (l->bias ? l->bias[first + o] : 0);
                else
                    acc[o * nv + v] = LOAD(y + o * LANES + v * ldy);
        UNROLL for (int a = S; a < chains * S; a++) acc[a] = (vec){0};
#define ADD(j, input)                                                                              \
    {                                                                                              \
        vec in[4];                                                                                 \
        UNROLL for (int v = 0; v < nv; v++) in[v] = LOAD(x + (input) * LANES + v * ldx);           \
        UNROLL for (int o = 0; o < width; o++)                                                     \
            UNROLL for (int v = 0; v < nv; v++) acc[(j) * S + o * nv + v] += w[o] * in[v];         \
        w += R;                                                                                    \
    }
        if (C == 1) {
            for (; n + chains <= after; n += chains)
                UNROLL for (int j = 0; j < chains; j++) ADD(j, (int64_t)l->col[n + j])
            for (; chains > 1 && n < after; n++)
                ADD(0, (int64_t)l->col[n])
        }
        for (; n < after; n++) {
            const int64_t k = l->col[n] * C, inside = min64(C, l->in - k);
            int64_t c = 0;
            for (int64_t a = 0; a < s->lines; a++, later += LINE_FLOATS)
                __builtin_prefetch(later);
            for (; c + chains <= inside; c += chains)
                UNROLL for (int j = 0; j < chains; j++) ADD(j, k + c + j)
            for (; chains > 1 && c < inside; c++)
                ADD(0, k + c)
        }
#undef ADD
        UNROLL for (int j = 1; j < chains; j++)
            UNROLL for (int a = 0; a < S; a++) acc[a] += acc[j * S + a];
        if (ends && l->relu)
            UNROLL for (int a = 0; a < S; a++) acc[a] = RELU(acc[a]);
        UNROLL for (int o = 0; o < width; o++)
            UNROLL for (int v = 0; v < nv; v++) STORE(y + o * LANES + v * ldy, acc[o * nv + v]);
    }
}

#define TILE(width, nv)                                                                            \
    static TARGET void NAME(panel_tile_##width##_##nv)(const NAME(Panels) *s, int64_t i,           \
                                                       int64_t last, int64_t r0, int64_t p)        \
    {                                                                                              \
        if (width == 1 && s->layer->R == 1) /* which addresses then need not be multiplied by */   \
            NAME(panel_tile)(1, nv, 1, s, i, last, r0, p);                                         \
        else                                                                                       \
            NAME(panel_tile)(width, nv, s->layer->R, s, i, last, r0, p);                           \
    }
TILE(1, 1)
TILE(1, 2)
TILE(1, 4)
TILE(2, 1)
TILE(2, 2)
TILE(2, 4)
TILE(4, 1)
TILE(4, 2)
#if WIDEST == 8
TILE(4, 4)
TILE(8, 1)
TILE(8, 2)
#endif
#undef TILE

/* Block rows i .. last: x (panels, in, LANES) -> y (panels, out, LANES). The weights of a tile stay
   in the first cache while the panels pass, and a range of x in the second. */
static TARGET void NAME(panels)(const Layer *l, int64_t i, int64_t last, const float *x,
                                int64_t ldx, float *y, int64_t ldy, int64_t panels)
{
    typedef void (*Tile)(const NAME(Panels) *, int64_t, int64_t, int64_t, int64_t);
    static const Tile tiles[WIDEST + 1][5] = { /* by outputs and panels */
        [1][1] = NAME(panel_tile_1_1), [1][2] = NAME(panel_tile_1_2), [1][4] = NAME(panel_tile_1_4),
        [2][1] = NAME(panel_tile_2_1), [2][2] = NAME(panel_tile_2_2), [2][4] = NAME(panel_tile_2_4),
        [4][1] = NAME(panel_tile_4_1), [4][2] = NAME(panel_tile_4_2),
#if WIDEST == 8
        [4][4] = NAME(panel_tile_4_4), [8][1] = NAME(panel_tile_8_1), [8][2] = NAME(panel_tile_8_2),
#endif
    };
    const int64_t columns = ceil_div(l->in, l->C);
    const int64_t range = ceil_div(columns, ceil_div(panels * LANES * l->in, CACHED));
    NAME(Panels) s = {.layer = l, .x = x, .y = y, .ldx = ldx, .ldy = ldy};
    for (s.begin = 0; s.begin < columns; s.begin = s.end) {
        s.end = s.begin + range;
        for (int64_t row = i, next; row < last; row = next) {
            next = l->R == 1 ? last : row + 1; /* block rows of one output in one go */
            const int64_t outputs = min64(l->R, l->out - row * l->R);
            s.lines = lines_to_ask_for(l, ceil_div(outputs, WIDEST) * ceil_div(panels, 2));
            s.pass = 0;
            for (int64_t r0 = 0, width; r0 < outputs; r0 += width) {
                width = largest_power(outputs - r0, WIDEST);
                for (int64_t p = 0, nv; p < panels; p += nv) {
                    nv = largest_power(panels - p, width < WIDEST ? 4 : 2);
                    tiles[width][nv](&s, row, next, r0, p);
                    s.pass++;
                }
            }
        }
    }
}

/* The sum of v[n R] * x[k[n]]. Gathering numbers into quads costs a shuffle each, but they are then
   multiplied four at a time, and for R = 1 the weights are loaded so. */
INLINE float NAME(gathered)(const float *v, const int64_t R, const int32_t *k, const float *x,
                            int64_t count)
{
    quad a = {0}, b = {0};
    int64_t n = 0;
#define INPUTS(n) ((quad){x[k[n]], x[k[(n) + 1]], x[k[(n) + 2]], x[k[(n) + 3]]})
#define EACH(n) ((quad){v[(n) * R], v[((n) + 1) * R], v[((n) + 2) * R], v[((n) + 3) * R]})
#define WEIGHTS(n) (R == 1 ? *(const quad *)(v + (n)) : EACH(n))
    for (; n + 8 <= count; n += 8) {
        a += WEIGHTS(n) * INPUTS(n);
        b += WEIGHTS(n + 4) * INPUTS(n + 4);
    }
    for (; n + 4 <= count; n += 4)
        a += WEIGHTS(n) * INPUTS(n);
#undef WEIGHTS
#undef EACH
#undef INPUTS
    a += b;
    for (; n < count; n++)
        a[0] += v[n * R] * x[k[n]];
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
            OUTPUT(o, NAME(gathered)(l->values + n, 1, l->col + n, x, last - n));
            n = last;
        }
        return;
    }
    for (int64_t o = begin, i = begin / R, r = begin % R; o < end; o++) {
        const int64_t first = l->crow[i], last = l->crow[i + 1];
        vec sums = {0};
        float sum[4] = {0};
        if (C == 1)
            sum[0] = NAME(gathered)(l->values + first * R + r, R, l->col + first, x, last - first);
        for (int64_t n = first; C > 1 && n < last; n++) {
            const float *w = l->values + n * C * R + r, *xk = x + l->col[n] * C;
            const int64_t inside = min64(C, l->in - l->col[n] * C);
            int64_t c = 0;
            for (; R == 1 && c + LANES <= inside; c += LANES)
                sums += LOAD(w + c) * LOAD(xk + c);
            for (; c + 4 <= inside; c += 4)
                UNROLL for (int j = 0; j < 4; j++) sum[j] += w[(c + j) * R] * xk[c + j];
            UNROLL for (int j = 0; j < 3; j++)
                if (c + j < inside)
                    sum[j] += w[(c + j) * R] * xk[c + j];
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

/* from (m, n) -> to (n, m), at most LANES each, with zeros from m to padded */
static TARGET void NAME(transpose_edge)(const float *from, int64_t ldfrom, int64_t m, int64_t n,
                                        float *to, int64_t ldto, int64_t padded)
{
    vec v[LANES] = {0};
    for (int64_t i = 0; i < m; i++, from += ldfrom)
        if (n == LANES)
            v[i] = LOAD(from);
        else
            memcpy(&v[i], from, n * sizeof(float));
    NAME(transpose_block)(v);
    for (int64_t j = 0; j < n; j++, to += ldto)
        if (padded == LANES)
            STORE(to, v[j]);
        else
            memcpy(to, &v[j], padded * sizeof(float));
}

/* from (m, n) -> to (n, m), with zeros from m to padded. It asks for the lines it comes to next: a
   batch that is not in cache arrives here. */
static TARGET void NAME(transpose)(const float *from, int64_t ldfrom, int64_t m, int64_t n,
                                   float *to, int64_t ldto, int64_t padded)
{
    enum { AHEAD = 64 };
    for (int64_t i = 0; i < padded; i += LANES)
        for (int64_t j = 0; j < n; j += LANES) {
            const float *block = from + i * ldfrom + j;
            float *transposed = to + j * ldto + i;
            vec v[LANES];
            if (i + LANES > m || j + LANES > n) {
                NAME(transpose_edge)(block, ldfrom, max64(0, min64(LANES, m - i)),
                                     min64(LANES, n - j), transposed, ldto,
                                     min64(LANES, padded - i));
                continue;
            }
            UNROLL for (int a = 0; a < LANES; a++) {
                v[a] = LOAD(block + a * ldfrom);
                __builtin_prefetch(block + a * ldfrom + AHEAD);
            }
            NAME(transpose_block)(v);
            UNROLL for (int a = 0; a < LANES; a++) STORE(transposed + a * ldto, v[a]);
        }
}
