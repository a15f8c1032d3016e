/* Convolutions on tiles of the batch: images, or rows of one image, as padded planes in cache.

   A tile holds, for each channel and each phase of the stride, the rows and columns of the padded
   image that have this phase. There, weight (c, ky, kx) meets output (oy, ox) at
   offset(c, ky, kx) + oy * width + ox, so outputs are runs, also across rows and images: those
   between width and out_width are computed and left out. */

typedef struct {
    int64_t batch, channels, height, width;           /* x */
    int64_t out, out_height, out_width;               /* y */
    int64_t kernel[2], stride[2], dilation[2], pad[2]; /* vertical, horizontal; pad: top, left */
    int channels_last;                                /* x and y; else channels first */
    int pool;                                         /* 2: y is the maxima of 2 x 2; or 1 */
} Shape;

/* Tiles, and the planes that one of them needs. */
typedef struct {
    int64_t images, rows;  /* of outputs in a tile: rows of each image */
    int64_t groups, tiles; /* groups of images in the batch, tiles in such a group */
    int64_t phases[2], height, width; /* of one image's plane */
    int64_t plane;                    /* floats from plane to plane */
    int64_t vectors;                  /* of positions, which hold all outputs of the tile */
} Plan;

enum {
    TILE_FLOATS = 1 << 16, /* a quarter of a second-level cache */
    FEW_VECTORS = 4,       /* are not enough sums to hide the latency of an addition */
    TOGETHER = 16          /* outputs that are stored together, or loaded */
};

/* How far the last weight of a kernel is from the first, in rows or columns of a plane. */
static int64_t reach(const Shape *s, int axis)
{
    return (s->kernel[axis] - 1) * s->dilation[axis] / s->stride[axis];
}

/* At least `least` tiles, if they can be large enough, and none larger than the cache, where a row
   of outputs needs `channels` rows. `whole`: planes are of whole images all the same. */
static Plan plan(const Shape *s, int64_t lanes, int64_t channels, int64_t least, int whole)
{
    Plan p = {.images = 1, .width = s->out_width + reach(s, 1)};
    for (int axis = 0; axis < 2; axis++)
        p.phases[axis] = min64(s->stride[axis], (s->kernel[axis] - 1) * s->dilation[axis] + 1);
    const int64_t row = channels * p.width, enough = ceil_div(FEW_VECTORS * lanes, p.width);
    p.rows = min64(max64(1, TILE_FLOATS / row - reach(s, 0)),
                   max64(enough, ceil_div(s->out_height, ceil_div(least, s->batch))));
    p.tiles = ceil_div(s->out_height, p.rows);
    p.rows = ceil_div(ceil_div(s->out_height, p.tiles), s->pool) * s->pool;
    p.tiles = ceil_div(s->out_height, p.rows);
    p.height = (whole ? s->out_height : p.rows) + reach(s, 0);
    if (p.tiles == 1)
        p.images = max64(1, min64(s->batch, enough / p.height));
    p.groups = ceil_div(s->batch, p.images);
    p.plane = ceil_div(p.images * p.height * p.width + lanes, 32) * 32 + 16; /* no power of 2 */
    p.vectors =
        ceil_div(((p.images - 1) * p.height + p.rows - 1) * p.width + s->out_width, lanes);
    return p;
}

/* Floats of the planes of so many channels, and of what the last vector touches behind them. */
static int64_t planes_floats(const Plan *p, int64_t channels)
{
    return channels * p->phases[0] * p->phases[1] * p->plane + 64;
}

/* Where in the planes weight k = (channel, ky, kx) meets the first output. */
static void find_offsets(const Shape *s, const Plan *p, int64_t channels, int32_t *offsets)
{
    for (int64_t c = 0; c < channels; c++)
        for (int64_t ky = 0; ky < s->kernel[0]; ky++)
            for (int64_t kx = 0; kx < s->kernel[1]; kx++) {
                const int64_t y = ky * s->dilation[0], x = kx * s->dilation[1];
                const int64_t phase = y % s->stride[0] * p->phases[1] + x % s->stride[1];
                *offsets++ = (int32_t)((c * p->phases[0] * p->phases[1] + phase) * p->plane +
                                       y / s->stride[0] * p->width + x / s->stride[1]);
            }
}

/* Images as they lie in memory, and in planes: row i of phase r is row top + i * stride[0] + r of
   an image, and so for columns. */
typedef struct {
    float *data;
    int64_t channels, height, width;
    int64_t stride[2], phases[2], left;
    int channels_last;
} Images;

static Images inputs(const Shape *s, const Plan *p, const float *x)
{
    return (Images){.data = (float *)x, .channels = s->channels, .height = s->height,
                    .width = s->width, .stride = {s->stride[0], s->stride[1]},
                    .phases = {p->phases[0], p->phases[1]}, .left = -s->pad[1],
                    .channels_last = s->channels_last};
}

static Images results(const Shape *s, const float *y)
{
    return (Images){.data = (float *)y, .channels = s->out, .height = s->out_height / s->pool,
                    .width = s->out_width / s->pool, .stride = {1, 1}, .phases = {1, 1},
                    .channels_last = s->channels_last};
}

enum Direction { LOAD_PLANES, STORE_PLANES };

/* Columns first .. last of a row of so many channels, `distance` floats from plane to plane. */
static void copy_row(const Kernels *k, const Images *im, enum Direction direction, float *data,
                     int64_t channels, float *row, int64_t n, int64_t distance)
{
    const int64_t step = im->stride[1], pixel = step * im->channels;
    if (im->channels_last && direction == LOAD_PLANES)
        k->transpose(data, pixel, n, channels, row, distance, n);
    else if (im->channels_last)
        k->transpose(row, distance, channels, n, data, pixel, channels);
    else
        for (int64_t c = 0; c < channels; c++, row += distance, data += im->height * im->width)
            if (step == 1 && direction == LOAD_PLANES)
                memcpy(row, data, n * sizeof(float));
            else if (step == 1)
                memcpy(data, row, n * sizeof(float));
            else if (direction == LOAD_PLANES)
                for (int64_t j = 0; j < n; j++)
                    row[j] = data[j * step];
            else
                for (int64_t j = 0; j < n; j++)
                    data[j * step] = row[j];
}

/* `rows` rows, from row `top` of image `image`, of channels begin .. end; rows that the image has
   not are zeros. What lies left and right of the image is never written. */
static void copy_planes(const Kernels *k, const Images *im, enum Direction direction, int64_t image,
                        int64_t begin, int64_t end, int64_t top, int64_t rows, int64_t width,
                        int64_t plane, float *planes)
{
    const int64_t step = im->stride[1], distance = im->phases[0] * im->phases[1] * plane;
    const int64_t pixel = im->channels_last ? im->channels : 1;
    float *data = im->data + image * im->channels * im->height * im->width;
    data += begin * (im->channels_last ? 1 : im->height * im->width);
    for (int64_t ry = 0; ry < im->phases[0]; ry++)
        for (int64_t rx = 0; rx < im->phases[1]; rx++, planes += plane) {
            const int64_t left = im->left + rx, first = left < 0 ? ceil_div(-left, step) : 0,
                          n = min64(width, ceil_div(im->width - left, step)) - first;
            for (int64_t i = 0; i < rows && n > 0; i++) {
                const int64_t y = top + i * im->stride[0] + ry;
                float *row = planes + i * width + first;
                if (y >= 0 && y < im->height)
                    copy_row(k, im, direction, data + (y * im->width + left + first * step) * pixel,
                             end - begin, row, n, distance);
                else if (direction == LOAD_PLANES)
                    for (int64_t c = begin; c < end; c++)
                        memset(row + (c - begin) * distance, 0, n * sizeof(float));
            }
        }
}

typedef struct {
    const Kernels *kernels;
    const Layer *layer; /* its `in` is channels * kernel */
    const Gradient *gradient;
    const Shape *shape;
    const int32_t *slots;
    Plan plan;
    Images x, y;
    int64_t parts, part; /* of the outputs, or of the channels of dx; how many are in one */
    int32_t *offsets;
    float *scratch; /* (workers, floats) */
    int64_t floats;
} Conv;

/* What of the batch is in a tile. */
typedef struct {
    int64_t image, images, top, rows;
} Tile;

static Tile tile_of(const Conv *f, int64_t group, int64_t tile)
{
    const Plan *p = &f->plan;
    const int64_t image = group * p->images, top = tile * p->rows;
    return (Tile){image, min64(p->images, f->shape->batch - image), top,
                  min64(p->rows, f->shape->out_height - top)};
}

static void load_inputs(const Conv *f, Tile t, float *planes)
{
    const Plan *p = &f->plan;
    const Shape *s = f->shape;
    for (int64_t a = 0; a < t.images; a++)
        copy_planes(f->kernels, &f->x, LOAD_PLANES, t.image + a, 0, s->channels,
                    t.top * s->stride[0] - s->pad[0], p->height, p->width, p->plane,
                    planes + a * p->height * p->width);
}

/* Outputs begin .. end of a gradient, zero wherever there is no output. */
static void load_results(const Conv *f, Tile t, int64_t begin, int64_t end, float *to, int64_t ldto)
{
    const Plan *p = &f->plan;
    if (t.rows < p->rows || t.images < p->images)
        memset(to, 0, (end - begin) * ldto * sizeof(float));
    for (int64_t a = 0; a < t.images; a++)
        copy_planes(f->kernels, &f->y, LOAD_PLANES, t.image + a, begin, end, t.top, t.rows,
                    p->width, ldto, to + a * p->height * p->width);
}

static void conv_forward_part(void *arg, int64_t i, int worker)
{
    const Conv *f = arg;
    const Plan *p = &f->plan;
    const Shape *s = f->shape;
    const int64_t ldy = p->vectors * f->kernels->lanes, begin = i % f->parts * f->part;
    const int64_t end = min64(s->out, begin + f->part);
    const Tile t = tile_of(f, i / f->parts / p->tiles, i / f->parts % p->tiles);
    float *x = f->scratch + worker * f->floats, *y = x + planes_floats(p, s->channels);
    load_inputs(f, t, x);
    for (int64_t o = begin; o < end; o += TOGETHER) {
        const int64_t last = min64(end, o + TOGETHER);
        for (int64_t j = o; j < last;)
            j += f->kernels->conv(f->layer, f->offsets, j, x, p->vectors, y + (j - o) * ldy);
        for (int64_t a = 0; a < t.images; a++) {
            float *image = y + a * p->height * p->width;
            for (int64_t j = o; j < last && s->pool == 2; j++)
                f->kernels->pool(image + (j - o) * ldy, p->width, t.rows, s->out_width);
            copy_planes(f->kernels, &f->y, STORE_PLANES, t.image + a, o, last, t.top / s->pool,
                        t.rows / s->pool, p->width, ldy, image);
        }
    }
}

/* The gradient of channels of a group of images: a tile of grad after the other is added to their
   planes. */
static void conv_grad_input_part(void *arg, int64_t i, int worker)
{
    const Conv *f = arg;
    const Plan *p = &f->plan;
    const Shape *s = f->shape;
    const int64_t ldg = p->vectors * f->kernels->lanes, begin = i % f->parts * f->part;
    const int64_t end = min64(s->channels, begin + f->part), size = s->kernel[0] * s->kernel[1];
    float *dx = f->scratch + worker * f->floats, *grad = dx + planes_floats(p, f->part);
    memset(dx, 0, planes_floats(p, end - begin) * sizeof(float));
    for (int64_t tile = 0; tile < p->tiles; tile++) {
        const Tile t = tile_of(f, i / f->parts, tile);
        load_results(f, t, 0, s->out, grad, ldg);
        f->kernels->conv_grad_input(f->layer, f->slots, f->offsets, begin * size, end * size, grad,
                                    ldg, p->vectors, dx + t.top * p->width);
    }
    const Tile t = tile_of(f, i / f->parts, 0);
    for (int64_t a = 0; a < t.images; a++)
        copy_planes(f->kernels, &f->x, STORE_PLANES, t.image + a, begin, end, -s->pad[0], p->height,
                    p->width, p->plane, dx + a * p->height * p->width);
}

/* The gradient of the weights of some outputs: tile after tile is added. */
static void conv_grad_weight_part(void *arg, int64_t i, int worker)
{
    const Conv *f = arg;
    const Plan *p = &f->plan;
    const int64_t ldg = p->vectors * f->kernels->lanes;
    const int64_t begin = i * f->part, end = min64(f->shape->out, begin + f->part);
    float *x = f->scratch + worker * f->floats, *grad = x + planes_floats(p, f->shape->channels);
    for (int64_t tile = 0; tile < p->groups * p->tiles; tile++) {
        const Tile t = tile_of(f, tile / p->tiles, tile % p->tiles);
        load_inputs(f, t, x);
        for (int64_t o = begin; o < end; o += TOGETHER) {
            const int64_t last = min64(end, o + TOGETHER);
            load_results(f, t, o, last, grad, ldg);
            for (int64_t j = o; j < last; j++)
                f->kernels->conv_grad_weight(f->gradient, f->offsets, j, grad + (j - o) * ldg, x,
                                             p->vectors);
        }
    }
}

/* Threads that so many multiply-adds are worth. */
static int worth(int threads, const Shape *s, int64_t kept)
{
    const int64_t work = s->batch * s->out_height * s->out_width * kept;
    return threads_now((int)max64(1, min64(threads, work / WORTH_A_THREAD)));
}

/* A worker has the planes of `channels`, and `more` outputs. 0, or -1 if there is no memory. */
static int run_conv(Conv *f, Task task, int64_t tasks, int threads, int64_t channels, int64_t more)
{
    const Shape *s = f->shape;
    const int64_t ldy = f->plan.vectors * f->kernels->lanes;
    const int64_t floats = planes_floats(&f->plan, channels) + more * ldy + 64;
    threads = (int)min64(threads, tasks);
    f->floats = ceil_div(floats, 16) * 16;
    f->scratch = allocate(threads * f->floats);
    f->offsets = malloc(channels * s->kernel[0] * s->kernel[1] * sizeof *f->offsets);
    if (f->scratch && f->offsets) {
        memset(f->scratch, 0, threads * f->floats * sizeof(float));
        find_offsets(s, &f->plan, channels, f->offsets);
        parallel_for(threads, tasks, task, f);
    }
    const int failed = !f->scratch || !f->offsets;
    free(f->scratch);
    free(f->offsets);
    return failed ? -1 : 0;
}

static int conv_forward(const Kernels *k, const Shape *s, const Layer *l, const float *x, float *y,
                        int threads)
{
    if (!s->batch)
        return 0;
    threads = worth(threads, s, kept_weights(l));
    Conv f = {.kernels = k, .shape = s, .layer = l, .y = results(s, y)};
    f.plan = plan(s, k->lanes, s->channels * s->stride[0] * s->stride[1], threads, 0);
    f.x = inputs(s, &f.plan, x);
    const int64_t tiles = f.plan.groups * f.plan.tiles;
    f.part = ceil_div(ceil_div(s->out, ceil_div(threads, tiles)), TOGETHER) * TOGETHER;
    f.parts = ceil_div(s->out, f.part);
    return run_conv(&f, conv_forward_part, tiles * f.parts, threads, s->channels, TOGETHER);
}

/* l: the transposed weight, as in grad_input */
static int conv_grad_input(const Kernels *k, const Shape *s, const Layer *l, const int32_t *slots,
                           const float *grad, float *dx, int threads)
{
    if (!s->batch)
        return 0;
    threads = worth(threads, s, kept_weights(l));
    Conv f = {.kernels = k, .shape = s, .layer = l, .slots = slots, .y = results(s, grad)};
    f.plan = plan(s, k->lanes, s->out, 1, 1);
    f.x = inputs(s, &f.plan, dx);
    f.part = max64(1, TILE_FLOATS / planes_floats(&f.plan, 1));
    f.part = min64(f.part, ceil_div(s->channels, ceil_div(threads, f.plan.groups)));
    f.parts = ceil_div(s->channels, f.part);
    return run_conv(&f, conv_grad_input_part, f.plan.groups * f.parts, threads, f.part,
                    s->out);
}

static int conv_grad_weight(const Kernels *k, const Shape *s, const Gradient *g, int threads)
{
    if (!s->batch)
        return 0;
    threads = worth(threads, s, g->crow[ceil_div(g->out, g->R)] * g->R * g->C);
    Conv f = {.kernels = k, .shape = s, .gradient = g, .y = results(s, g->grad)};
    f.plan = plan(s, k->lanes, s->channels * s->stride[0] * s->stride[1], 1, 0);
    f.x = inputs(s, &f.plan, g->x);
    f.part = ceil_div(s->out, threads);
    f.parts = ceil_div(s->out, f.part);
    return run_conv(&f, conv_grad_weight_part, f.parts, threads, s->channels, TOGETHER);
}
