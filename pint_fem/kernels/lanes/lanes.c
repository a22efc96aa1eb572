/* Kernels on W lanes of type REAL; this file is compiled for each pair, NAME(x) being x with a suffix for it. A vector of n
   numbers is an array (n + 1, W) with a scratch row; a row is made of V vectors. No lane depends on another one. */
#undef V
#undef VEC
#undef ROW
#define VEC NAME(Vec)
#if W == 1
#define V 1
typedef REAL VEC;
#else
#define V (W * SIZE > VECTOR ? W * SIZE / VECTOR : 1)
typedef REAL VEC __attribute__((vector_size(W * sizeof(REAL) / V), aligned(W * sizeof(REAL) / V), may_alias));
#endif
#define ROW(x, i) ((VEC *)((REAL *)(x) + (int64_t)(i) * W))

#if W > 1
/* Solve L x = x in place for unit lower triangular L, and multiply by the inverse diagonal. */
static void NAME(forward)(const Lower *L, const REAL *inverse_diagonal, REAL *restrict x) {
    const REAL *triangles = L->triangles, *tiles = L->tiles;
    memset(ROW(x, L->n), 0, sizeof(REAL) * W);
    for (int s = 0; s < L->panels; s++) {
        const int c0 = L->starts[s], w = L->starts[s + 1] - c0;
        const int *rows = L->rows + L->row_ptr[s], count = (int)(L->row_ptr[s + 1] - L->row_ptr[s]);
        const REAL *d = triangles + L->triangle_ptr[s], *a = tiles + L->tile_ptr[s];
        VEC *xp = ROW(x, c0);
        for (int i = 1; i < w; i++) {
            VEC y[V];
            for (int v = 0; v < V; v++) y[v] = xp[i * V + v];
            for (int j = 0; j < i; j++) for (int v = 0; v < V; v++) y[v] -= d[i * w + j] * xp[j * V + v];
            for (int v = 0; v < V; v++) xp[i * V + v] = y[v];
        }
        for (int r = 0; r < count; r += 4, a += 4 * w) {
            VEC *y0 = ROW(x, rows[r]), *y1 = ROW(x, rows[r + 1]), *y2 = ROW(x, rows[r + 2]), *y3 = ROW(x, rows[r + 3]);
            VEC t0[V], t1[V], t2[V], t3[V];
            for (int v = 0; v < V; v++) t0[v] = y0[v], t1[v] = y1[v], t2[v] = y2[v], t3[v] = y3[v];
            for (int j = 0; j < w; j++) {
                const REAL *b = a + 4 * j;
                for (int v = 0; v < V; v++) {
                    VEC z = xp[j * V + v];
                    t0[v] -= b[0] * z, t1[v] -= b[1] * z, t2[v] -= b[2] * z, t3[v] -= b[3] * z;
                }
            }
            for (int v = 0; v < V; v++) y0[v] = t0[v], y1[v] = t1[v], y2[v] = t2[v], y3[v] = t3[v];
        }
        for (int i = 0; i < w; i++) for (int v = 0; v < V; v++) xp[i * V + v] *= inverse_diagonal[c0 + i];
    }
}

/* Products of C columns of a panel with its rows number i and i + 1 of each tile, in sums of their own. */
#undef PRODUCTS
#define PRODUCTS(C, i)                                                                                                 \
    VEC t[C][V], u[C][V];                                                                                              \
    memset(t, 0, sizeof(t)), memset(u, 0, sizeof(u));                                                                  \
    for (int r = 0; r < count; r += 4) {                                                                               \
        const REAL *b = a + (int64_t)r * w + 4 * j + i;                                                                \
        const VEC *y = ROW(x, rows[r + i]), *z = ROW(x, rows[r + i + 1]);                                              \
        for (int v = 0; v < V; v++) {                                                                                  \
            const VEC p = y[v], q = z[v];                                                                              \
            for (int c = 0; c < C; c++) t[c][v] += b[4 * c] * p, u[c][v] += b[4 * c + 1] * q;                          \
        }                                                                                                              \
    }
#undef COLUMNS
#define COLUMNS(C)                                                                                                     \
    {                                                                                                                  \
        VEC sum[C][V];                                                                                                 \
        {                                                                                                              \
            PRODUCTS(C, 0)                                                                                             \
            for (int c = 0; c < C; c++) for (int v = 0; v < V; v++) sum[c][v] = t[c][v] + u[c][v];                     \
        }                                                                                                              \
        PRODUCTS(C, 2)                                                                                                 \
        for (int c = 0; c < C; c++)                                                                                    \
            for (int v = 0; v < V; v++) xp[(j + c) * V + v] -= sum[c][v] + (t[c][v] + u[c][v]);                        \
    }

/* Solve L^T x = x in place; there are four sums of products, one for each row of the tiles, as for single states. */
static void NAME(backward)(const Lower *L, REAL *restrict x) {
    const REAL *triangles = L->triangles, *tiles = L->tiles;
    memset(ROW(x, L->n), 0, sizeof(REAL) * W);
    for (int s = L->panels - 1; s >= 0; s--) {
        const int c0 = L->starts[s], w = L->starts[s + 1] - c0;
        const int *rows = L->rows + L->row_ptr[s], count = (int)(L->row_ptr[s + 1] - L->row_ptr[s]);
        const REAL *d = triangles + L->triangle_ptr[s], *a = tiles + L->tile_ptr[s];
        VEC *xp = ROW(x, c0);
        int j = 0;
#if V < 4
        for (; j + 4 <= w; j += 4) COLUMNS(4)
#endif
        for (; j + 2 <= w; j += 2) COLUMNS(2)
        if (j < w) COLUMNS(1)
        for (int k = w - 2; k >= 0; k--) {
            VEC y[V];
            for (int v = 0; v < V; v++) y[v] = xp[k * V + v];
            for (int i = w - 1; i > k; i--) for (int v = 0; v < V; v++) y[v] -= d[i * w + k] * xp[i * V + v];
            for (int v = 0; v < V; v++) xp[k * V + v] = y[v];
        }
    }
}
#endif

/* y = c A x, or y = s y + c A x. */
static void NAME(multiply)(const Matrix *A, double factor, double scale, const REAL *x, REAL *y, int add) {
    const REAL *values = A->values, c = (REAL)factor, s = (REAL)scale;
    for (int i = 0; i < A->rows; i++) {
        VEC t[V] = {0}, *out = ROW(y, i);
        for (int k = A->ptr[i]; k < A->ptr[i + 1]; k++) {
            const VEC *z = ROW(x, A->columns[k]);
            for (int v = 0; v < V; v++) t[v] += values[k] * z[v];
        }
        if (add) for (int v = 0; v < V; v++) out[v] = s * out[v] + c * t[v];
        else for (int v = 0; v < V; v++) out[v] = c * t[v];
    }
}

/* x = x - b (a . x). */
static void NAME(project)(const Projection *p, int rows, REAL *x) {
    const REAL *a = p->a, *b = p->b;
    VEC t[V] = {0};
    for (int i = 0; i < rows; i++) for (int v = 0; v < V; v++) t[v] += a[i] * ROW(x, i)[v];
    for (int i = 0; i < rows; i++) for (int v = 0; v < V; v++) ROW(x, i)[v] -= b[i] * t[v];
}

/* x = c x + (1 - c) y, by one pass over the rows. */
static void NAME(blend)(int64_t rows, double factor, REAL *x, const REAL *y) {
    const REAL c = (REAL)factor, d = (REAL)(1.0 - factor);
    for (int64_t i = 0; i < rows * V; i++) ((VEC *)x)[i] = c * ((VEC *)x)[i] + d * ((VEC *)y)[i];
}

/* Copy states of some lanes to x (`set`), or add them to x, where there are any; then copy x to `put`. */
static void NAME(transfer)(const States *set, const States *sum, const States *put, int64_t first, int lanes,
                           int64_t step, REAL *x) {
    const States *s = set ? set : sum, *any = s ? s : put;
    const double *from = s ? s->base + first * s->lane + step * s->step : 0;
    double *to = put ? put->base + first * put->lane + step * put->step : 0;
    const int *place = any->place, size = any->size;
#if W == 1
    if (set) for (int c = 0; c < size; c++) x[place[c]] = (REAL)from[c];
    else if (sum) for (int c = 0; c < size; c++) x[place[c]] += (REAL)from[c];
    if (put) for (int c = 0; c < size; c++) to[c] = x[place[c]];
#else
    typedef REAL Part __attribute__((vector_size(8 * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));
    for (int l = 0; l < W; l += 8) {
        const int own = lanes - l < 0 ? 0 : lanes - l < 8 ? lanes - l : 8;
        if (!own && !set) break;
        for (int c = 0; c < size; c += 8) {
            const int width = size - c < 8 ? size - c : 8;
            Eight v[8];
            if (s) {
                for (int i = 0; i < 8; i++) {
                    const double *row = from + (l + i) * s->lane + c;
                    if (i < own && width == 8) v[i] = *(const Eight *)row;
                    else {
                        v[i] = (Eight){0};
                        if (i < own) memcpy(&v[i], row, sizeof(double) * width);
                    }
                }
                transpose(v);
                for (int i = 0; i < width; i++) {
                    Part *at = (Part *)(x + (int64_t)place[c + i] * W + l), new = __builtin_convertvector(v[i], Part);
                    if (!set) new += *at;
                    *at = new;
                    if (put) v[i] = __builtin_convertvector(new, Eight);
                }
            } else
                for (int i = 0; i < width; i++)
                    v[i] = __builtin_convertvector(*(Part *)(x + (int64_t)place[c + i] * W + l), Eight);
            if (put) {
                for (int i = width; i < 8; i++) v[i] = (Eight){0};
                transpose(v);
                for (int i = 0; i < own; i++) {
                    double *row = to + (l + i) * put->lane + c;
                    if (width == 8) *(Eight *)row = v[i];
                    else memcpy(row, &v[i], sizeof(double) * width);
                }
            }
        }
    }
#endif
}

/* Take `steps` steps of the program from the states `start` of all lanes, W at a time: vector 0 begins as the start and
   is the result of each step; `added` is added to it, then it is copied to `ends`. The operations LOAD and STORE refer to
   states by their number. */
void NAME(run)(const Program *program, int64_t lanes, int64_t steps, const States *states) {
    for (int64_t first = 0; first < lanes; first += W) {
        const int own = (int)(lanes - first < W ? lanes - first : W);
        NAME(transfer)(&states[0], 0, 0, first, own, 0, program->vector[0]);
        for (int64_t step = 0; step < steps; step++) {
            for (int o = 0; o < program->count; o++) {
                const Operation *p = program->operations + o;
                REAL *out = (REAL *)program->vector[p->out] + (int64_t)p->out_row * W;
                const REAL *in = (REAL *)program->vector[p->in] + (int64_t)p->in_row * W;
                const void *object = p->object < 0 ? 0 : program->object[p->object];
                const REAL c = (REAL)p->factor;
                switch (p->code) {
                case MULTIPLY: NAME(multiply)(object, p->factor, p->scale, in, out, p->flag); break;
                case SOLVE: {
                    const Factor *f = object;
                    NAME(forward)(p->flag ? f->right : f->left, f->inverse_diagonal, out);
                    NAME(backward)(p->flag ? f->left : f->right, out);
                    break;
                }
                case COPY: for (int64_t i = 0; i < (int64_t)p->rows * V; i++) ((VEC *)out)[i] = c * ((VEC *)in)[i]; break;
                case ADD: for (int64_t i = 0; i < (int64_t)p->rows * V; i++) ((VEC *)out)[i] += c * ((VEC *)in)[i]; break;
                case BLEND: NAME(blend)(p->rows, p->factor, out, in); break;
                case EXCHANGE: {
                    void *kept = program->vector[p->out];
                    program->vector[p->out] = program->vector[p->in];
                    program->vector[p->in] = kept;
                    break;
                }
                case ZERO: memset(out, 0, (int64_t)p->rows * W * sizeof(REAL)); break;
                case CLEAR_ROWS: for (int i = 0; i < p->rows; i++) memset(ROW(out, ((int *)object)[i]), 0, W * sizeof(REAL)); break;
                case PERMUTE: for (int i = 0; i < p->rows; i++) memcpy(ROW(out, i), ROW(in, ((int *)object)[i]), W * sizeof(REAL)); break;
                case LOAD: if (states[p->flag].base) NAME(transfer)(0, &states[p->flag], 0, first, own, step, out); break;
                case STORE: if (states[p->flag].base) NAME(transfer)(0, 0, &states[p->flag], first, own, step, (REAL *)in); break;
                case PROJECT: NAME(project)(object, p->rows, out); break;
                }
            }
            const States *added = states[2].base ? &states[2] : 0;
            NAME(transfer)(0, added, &states[1], first, own, step, program->vector[0]);
        }
    }
}

/* The products of a matrix with states, W at a time; x and y are work vectors on lanes. */
void NAME(product)(const Matrix *A, int64_t lanes, const States *in, const States *out, REAL *x, REAL *y) {
    for (int64_t first = 0; first < lanes; first += W) {
        const int own = (int)(lanes - first < W ? lanes - first : W);
        NAME(transfer)(in, 0, 0, first, own, 0, x);
        NAME(multiply)(A, 1.0, 0.0, x, y, 0);
        NAME(transfer)(0, 0, out, first, own, 0, y);
    }
}
