/* Triangular solves for one state: the operations of those on lanes (lanes.c) in the same order, with vectors along the rows
   or the columns of a panel instead of lanes. */
typedef double Four __attribute__((vector_size(32), aligned(8), may_alias));

static void forward_d1(const Lower *L, const double *inverse_diagonal, double *restrict x) {
    const double *triangles = L->triangles, *tiles = L->tiles;
    x[L->n] = 0.0;
    for (int s = 0; s < L->panels; s++) {
        const int c0 = L->starts[s], w = L->starts[s + 1] - c0;
        const int *rows = L->rows + L->row_ptr[s], count = (int)(L->row_ptr[s + 1] - L->row_ptr[s]);
        const double *d = triangles + L->triangle_ptr[s], *a = tiles + L->tile_ptr[s];
        double *xp = x + c0;
        for (int i = 1; i < w; i++) {
            double y = xp[i];
            for (int j = 0; j < i; j++) y -= d[i * w + j] * xp[j];
            xp[i] = y;
        }
        for (int r = 0; r < count; r += 4, a += 4 * w) {
            const int *at = rows + r;
            Four t = {x[at[0]], x[at[1]], x[at[2]], x[at[3]]};
            for (int j = 0; j < w; j++) t -= *(const Four *)(a + 4 * j) * xp[j];
            x[at[0]] = t[0], x[at[1]] = t[1], x[at[2]] = t[2], x[at[3]] = t[3];
        }
        for (int i = 0; i < w; i++) xp[i] *= inverse_diagonal[c0 + i];
    }
}

/* Subtract the products with a panel's rows from 4 C of its columns, in two sums that do not wait for each other. */
#define FOURS(C)                                                                                                       \
    {                                                                                                                  \
        Four t[C], u[C];                                                                                               \
        const double *b = a + (int64_t)half * 4 * C;                                                                   \
        int r = 0;                                                                                                     \
        for (int c = 0; c < C; c++) t[c] = *(Four *)(y + 4 * c), u[c] = (Four){0, 0, 0, 0};                            \
        for (; r < count - half; r++, a += 4 * C, b += 4 * C) {                                                        \
            const double z = x[rows[r]], z2 = x[rows[half + r]];                                                       \
            for (int c = 0; c < C; c++) t[c] -= *(Four *)(a + 4 * c) * z, u[c] -= *(Four *)(b + 4 * c) * z2;           \
        }                                                                                                              \
        for (; r < half; r++, a += 4 * C) {                                                                            \
            const double z = x[rows[r]];                                                                               \
            for (int c = 0; c < C; c++) t[c] -= *(Four *)(a + 4 * c) * z;                                              \
        }                                                                                                              \
        for (int c = 0; c < C; c++) *(Four *)(y + 4 * c) = t[c];                                                       \
        if (count > half) for (int c = 0; c < C; c++) *(Four *)(y + 4 * c) += u[c];                                    \
        break;                                                                                                         \
    }

static void backward_d1(const Lower *L, double *restrict x) {
    const double *triangles = L->triangles;
    x[L->n] = 0.0;
    for (int s = L->panels - 1; s >= 0; s--) {
        const int c0 = L->starts[s], w = L->starts[s + 1] - c0;
        const int *rows = L->rows + L->row_ptr[s], count = (int)(L->row_ptr[s + 1] - L->row_ptr[s]);
        const int half = (count / 4 + 1) / 2 * 4;
        const double *d = triangles + L->triangle_ptr[s];
        double *xp = x + c0, y[16], *a = (double *)L->by_rows + L->by_rows_ptr[s];
        for (int j = 0; j < 16; j++) y[j] = j < w ? xp[j] : 0.0;
        switch ((w + 3) / 4) {
        case 1: FOURS(1)
        case 2: FOURS(2)
        case 3: FOURS(3)
        case 4: FOURS(4)
        }
        for (int k = w - 2; k >= 0; k--)
            for (int i = w - 1; i > k; i--) y[k] -= d[i * w + k] * y[i];
        for (int j = 0; j < w; j++) xp[j] = y[j];
    }
}

/* Solve with a factor or its transpose for one vector of n + 1 numbers, in place. */
void solve(const Factor *f, double *x, int transposed) {
    forward_d1(transposed ? f->right : f->left, f->inverse_diagonal, x);
    backward_d1(transposed ? f->left : f->right, x);
}
