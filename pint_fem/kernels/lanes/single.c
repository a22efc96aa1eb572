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

static void backward_d1(const Lower *L, double *restrict x) {
    const double *triangles = L->triangles, *tiles = L->tiles;
    x[L->n] = 0.0;
    for (int s = L->panels - 1; s >= 0; s--) {
        const int c0 = L->starts[s], w = L->starts[s + 1] - c0;
        const int *rows = L->rows + L->row_ptr[s], count = (int)(L->row_ptr[s + 1] - L->row_ptr[s]);
        const double *d = triangles + L->triangle_ptr[s], *a = tiles + L->tile_ptr[s];
        double *xp = x + c0;
        Four t[WIDEST];
        for (int j = 0; j < w; j++) t[j] = (Four){0, 0, 0, 0};
        for (int r = 0; r < count; r += 4, a += 4 * w) {
            const int *at = rows + r;
            const Four z = {x[at[0]], x[at[1]], x[at[2]], x[at[3]]};
            for (int j = 0; j < w; j++) t[j] += *(const Four *)(a + 4 * j) * z;
        }
        for (int j = 0; j < w; j++) xp[j] -= (t[j][0] + t[j][1]) + (t[j][2] + t[j][3]);
        for (int k = w - 2; k >= 0; k--)
            for (int i = w - 1; i > k; i--) xp[k] -= d[i * w + k] * xp[i];
    }
}

/* Solve with a factor or its transpose for one vector of n + 1 numbers, in place. */
void solve(const Factor *f, double *x, int transposed) {
    forward_d1(transposed ? f->right : f->left, f->inverse_diagonal, x);
    backward_d1(transposed ? f->left : f->right, x);
}
