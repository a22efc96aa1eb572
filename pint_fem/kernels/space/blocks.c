/* Kernels on blocks of W states of type REAL, stored by rows: row i of a block has the W states' numbers of unknown i. This
   file is compiled for each pair, NAME(x) being x with a suffix for it. No state depends on another one, and none of its
   roundings on W: sums run over rows and columns in the same order. */
#undef V
#undef VEC
#undef ROW
#define VEC NAME(Vec)
#if W == 1
#define V 1
typedef REAL VEC;
#else
#define V (W * SIZE > VECTOR ? W * SIZE / VECTOR : 1)
typedef REAL VEC __attribute__((vector_size(W * SIZE / V), aligned(SIZE), may_alias));
#endif
#define ROW(x, i) ((VEC *)((REAL *)(x) + (int64_t)(i) * W))

/* t = A x in row i */
#undef PRODUCT
#define PRODUCT                                                                                                        \
    VEC t[V] = {0};                                                                                                    \
    for (int64_t k = ptr[i]; k < ptr[i + 1]; k++) {                                                                    \
        const REAL a = values[k];                                                                                      \
        const VEC *z = ROW(x, columns[k]);                                                                             \
        for (int v = 0; v < V; v++) t[v] += a * z[v];                                                                  \
    }

/* y = s y + c A x; without reading y where s is zero. */
void NAME(product)(int rows, const int64_t *ptr, const int *columns, const REAL *values, double c_, double s_,
                   const REAL *x, REAL *y) {
    const REAL c = (REAL)c_, s = (REAL)s_;
    for (int i = 0; i < rows; i++) {
        PRODUCT
        VEC *out = ROW(y, i);
        if (s_ == 0.0) for (int v = 0; v < V; v++) out[v] = c * t[v];
        else for (int v = 0; v < V; v++) out[v] = s * out[v] + c * t[v];
    }
}

/* r = b - A x */
void NAME(residual)(int rows, const int64_t *ptr, const int *columns, const REAL *values, const REAL *b, const REAL *x,
                    REAL *r) {
    for (int i = 0; i < rows; i++) {
        PRODUCT
        const VEC *from = ROW(b, i);
        VEC *out = ROW(r, i);
        for (int v = 0; v < V; v++) out[v] = from[v] - t[v];
    }
}

/* d = a d + c D (b - A x) with a diagonal D; without reading d where a is zero. */
void NAME(smooth)(int rows, const int64_t *ptr, const int *columns, const REAL *values, const REAL *diagonal, double a_,
                  double c_, const REAL *b, const REAL *x, REAL *d) {
    const REAL a = (REAL)a_;
    for (int i = 0; i < rows; i++) {
        PRODUCT
        const REAL c = (REAL)c_ * diagonal[i];
        const VEC *from = ROW(b, i);
        VEC *out = ROW(d, i);
        if (a_ == 0.0) for (int v = 0; v < V; v++) out[v] = c * (from[v] - t[v]);
        else for (int v = 0; v < V; v++) out[v] = a * out[v] + c * (from[v] - t[v]);
    }
}

/* x = c D b, d = x */
void NAME(start)(int rows, const REAL *diagonal, double c_, const REAL *b, REAL *x, REAL *d) {
    for (int i = 0; i < rows; i++) {
        const REAL c = (REAL)c_ * diagonal[i];
        for (int v = 0; v < V; v++) ROW(d, i)[v] = ROW(x, i)[v] = c * ROW(b, i)[v];
    }
}

/* x += d */
void NAME(add)(int rows, const REAL *d, REAL *x) {
    for (int64_t i = 0; i < (int64_t)rows * V; i++) ((VEC *)x)[i] += ((const VEC *)d)[i];
}

/* Sums of the products of the states of two blocks, four rows at a time. */
void NAME(dots)(int rows, const REAL *x, const REAL *y, REAL *out) {
    VEC t[4][V];
    memset(t, 0, sizeof(t));
    int i = 0;
    for (; i + 4 <= rows; i += 4)
        for (int k = 0; k < 4; k++) for (int v = 0; v < V; v++) t[k][v] += ROW(x, i + k)[v] * ROW(y, i + k)[v];
    for (int k = 0; i < rows; i++, k++) for (int v = 0; v < V; v++) t[k][v] += ROW(x, i)[v] * ROW(y, i)[v];
    for (int v = 0; v < V; v++) ROW(out, 0)[v] = (t[0][v] + t[1][v]) + (t[2][v] + t[3][v]);
}

/* Sums of the squares of the states of a block, each with the weight of its row. */
void NAME(squares)(int rows, const REAL *weights, const REAL *x, REAL *out) {
    VEC t[4][V];
    memset(t, 0, sizeof(t));
    int i = 0;
    for (; i + 4 <= rows; i += 4)
        for (int k = 0; k < 4; k++)
            for (int v = 0; v < V; v++) t[k][v] += weights[i + k] * ROW(x, i + k)[v] * ROW(x, i + k)[v];
    for (int k = 0; i < rows; i++, k++) for (int v = 0; v < V; v++) t[k][v] += weights[i] * ROW(x, i)[v] * ROW(x, i)[v];
    for (int v = 0; v < V; v++) ROW(out, 0)[v] = (t[0][v] + t[1][v]) + (t[2][v] + t[3][v]);
}

/* y = a x + b y for each state with its own numbers */
void NAME(combine)(int rows, const REAL *a, const REAL *x, const REAL *b, REAL *y) {
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < V; v++) ROW(y, i)[v] = ROW(a, 0)[v] * ROW(x, i)[v] + ROW(b, 0)[v] * ROW(y, i)[v];
}

/* Rows of a block, one after another. */
void NAME(gather)(int count, const int *rows, const REAL *x, REAL *out) {
    for (int i = 0; i < count; i++) memcpy(ROW(out, i), ROW(x, rows[i]), W * SIZE);
}

/* y = A x with a full matrix of some rows, c columns; four columns at a time have sums of their own. */
void NAME(full)(int rows, int count, const REAL *A, const REAL *x, REAL *y) {
    for (int i = 0; i < rows; i++) {
        const REAL *a = A + (int64_t)i * count;
        VEC t[4][V];
        memset(t, 0, sizeof(t));
        int j = 0;
        for (; j + 4 <= count; j += 4)
            for (int k = 0; k < 4; k++) for (int v = 0; v < V; v++) t[k][v] += a[j + k] * ROW(x, j + k)[v];
        for (int k = 0; j < count; j++, k++) for (int v = 0; v < V; v++) t[k][v] += a[j] * ROW(x, j)[v];
        for (int v = 0; v < V; v++) ROW(y, i)[v] = (t[0][v] + t[1][v]) + (t[2][v] + t[3][v]);
    }
}

#if SIZE == 4
/* A block of float64, each state times its own number, in single precision, and back. */
void NAME(narrow)(int rows, const double *a, const double *x, REAL *y) {
    for (int i = 0; i < rows; i++) for (int w = 0; w < W; w++) y[(int64_t)i * W + w] = (REAL)(a[w] * x[(int64_t)i * W + w]);
}
void NAME(widen)(int rows, const double *a, const REAL *x, double *y) {
    for (int i = 0; i < rows; i++) for (int w = 0; w < W; w++) y[(int64_t)i * W + w] = a[w] * x[(int64_t)i * W + w];
}
#endif
