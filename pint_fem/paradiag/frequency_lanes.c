/* Sparse complex systems of W frequencies at once: LDL^T or LDU without pivoting on a common pattern.
 *
 * REAL (float or double) and W are given by the compiler's flags. A complex number of each of W frequencies is a pair of
 * vectors, real and imaginary parts. Columns are grouped in panels of at most four with the same rows below them; a panel
 * stores its strict lower triangle by rows and then, row by row, the entries of its columns: one stream of memory, which
 * forward and backward substitution read once each. Upper factors are stored transposed, in the same way.
 *
 * No operation combines lanes, and their order does not depend on W: the results of a frequency are bitwise identical in
 * every lane and for every W.
 */
#include <stdint.h>
#include <string.h>

#define WIDEST 4
typedef REAL V __attribute__((vector_size(W * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));
typedef struct { V re, im; } Z;
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 4")

/* a -= b c */
INLINE void subtract(Z *a, const Z *b, const Z *c) {
    V re = a->re, im = a->im;
    re -= b->re * c->re;
    im -= b->re * c->im;
    re += b->im * c->im;
    im -= b->im * c->re;
    a->re = re;
    a->im = im;
}

INLINE Z times(const Z *b, const Z *c) {
    Z a;
    a.re = b->re * c->re;
    a.im = b->re * c->im;
    a.re -= b->im * c->im;
    a.im += b->im * c->re;
    return a;
}

INLINE Z inverse(const Z *a) {
    V size = a->re * a->re;
    size += a->im * a->im;
    Z b = {a->re / size, -a->im / size};
    return b;
}

/* ---- the pattern -------------------------------------------------------------------------------------------------- */

/* Elimination tree of a symmetric pattern (rows ptr, idx); work has n entries. */
void elimination_tree(int32_t n, const int32_t *ptr, const int32_t *idx, int32_t *parent, int32_t *work) {
    for (int32_t i = 0; i < n; i++) {
        parent[i] = work[i] = -1;
        for (int32_t p = ptr[i]; p < ptr[i + 1]; p++)
            for (int32_t k = idx[p], next; k != -1 && k < i; k = next) {
                next = work[k];
                work[k] = i;
                if (next == -1) parent[k] = i;
            }
    }
}

/* Order in which children come right before their parents; work has 3 n entries. */
void postorder(int32_t n, const int32_t *parent, int32_t *order, int32_t *work) {
    int32_t *head = work, *next = work + n, *stack = work + 2 * (int64_t)n, count = 0;
    for (int32_t i = 0; i < n; i++) head[i] = -1;
    for (int32_t i = n; i-- > 0;)
        if (parent[i] >= 0) next[i] = head[parent[i]], head[parent[i]] = i;
    for (int32_t root = 0; root < n; root++) {
        if (parent[root] >= 0) continue;
        int32_t top = 0;
        stack[0] = root;
        while (top >= 0) {
            int32_t i = stack[top], child = head[i];
            if (child < 0) order[count++] = i, top--;
            else head[i] = next[child], stack[++top] = child;
        }
    }
}

/* Entries below the diagonal of each column of the factor; mark has n entries. */
void column_counts(int32_t n, const int32_t *ptr, const int32_t *idx, const int32_t *parent, int64_t *count, int32_t *mark) {
    for (int32_t i = 0; i < n; i++) {
        count[i] = 0;
        mark[i] = i;
        for (int32_t p = ptr[i]; p < ptr[i + 1]; p++)
            for (int32_t k = idx[p]; k < i && mark[k] != i; k = parent[k]) mark[k] = i, count[k]++;
    }
}

/* First columns of the panels, whose columns have the same rows below them; the number of panels. */
int32_t panels(int32_t n, const int32_t *parent, const int64_t *count, int32_t *first) {
    int32_t number = 0;
    for (int32_t j = 0; j < n; j++) {
        int same = j > 0 && parent[j - 1] == j && count[j - 1] == count[j] + 1;
        if (!same || j - first[number - 1] == WIDEST) first[number++] = j;
    }
    first[number] = n;
    return number;
}

/* Rows below each panel, those of its last column; fill has as many entries as there are panels, of zero. */
void panel_rows(int32_t n, const int32_t *ptr, const int32_t *idx, const int32_t *parent, const int32_t *first,
                const int32_t *panel, const int64_t *begin, int32_t *rows, int32_t *mark, int64_t *fill) {
    for (int32_t i = 0; i < n; i++) {
        mark[i] = i;
        for (int32_t p = ptr[i]; p < ptr[i + 1]; p++)
            for (int32_t k = idx[p]; k < i && mark[k] != i; k = parent[k]) {
                int32_t q = panel[k];
                mark[k] = i;
                if (k == first[q + 1] - 1) rows[begin[q] + fill[q]++] = i;
            }
    }
}

/* Places of entries (i, j), i > j, in the panels' memory. */
void places(int64_t entries, const int32_t *i, const int32_t *j, const int32_t *first, const int32_t *panel,
            const int64_t *begin, const int32_t *rows, const int64_t *start, int64_t *place) {
    for (int64_t e = 0; e < entries; e++) {
        int32_t q = panel[j[e]], w = first[q + 1] - first[q], r = i[e] - first[q], c = j[e] - first[q];
        if (r < w) {
            place[e] = start[q] + r * (r - 1) / 2 + c;
            continue;
        }
        int64_t low = begin[q], high = begin[q + 1];
        while (high - low > 1) {
            int64_t middle = (low + high) / 2;
            if (rows[middle] <= i[e]) low = middle;
            else high = middle;
        }
        place[e] = start[q] + w * (w - 1) / 2 + (low - begin[q]) * w + c;
    }
}

/* ---- factorisation ------------------------------------------------------------------------------------------------ */

/* Entries of the weighted sum of real parts, (parts, entries), at given places of an array of zeros; weights are (parts)
 * complex numbers for each of W frequencies. */
void weighted_sum(int32_t parts, int64_t entries, const double *values, const double *weights, const int64_t *place, Z *out) {
    for (int64_t e = 0; e < entries; e++) {
        double sum[2 * W];
        for (int v = 0; v < 2 * W; v++) sum[v] = 0.0;
        for (int32_t p = 0; p < parts; p++)
            for (int v = 0; v < 2 * W; v++) sum[v] += values[p * entries + e] * weights[p * 2 * W + v];
        REAL *target = (REAL *)(out + (place ? place[e] : e));
        for (int v = 0; v < 2 * W; v++) target[v] = (REAL)sum[v];
    }
}

/* Subtract the product of w columns of a panel with q multipliers each from columns of another panel. */
INLINE void update_of(const int w, const int q, int64_t m, const int32_t *rows, const int32_t *place, const Z *L,
                      const Z *factor, const int32_t *column, Z *target, int width) {
    for (int64_t i = 0; i < m; i++, L += w) {
        Z *t = target + (int64_t)place[rows[i]] * width;
        UNROLL for (int j = 0; j < q; j++) {
            Z sum = t[column[j]];
            UNROLL for (int c = 0; c < w; c++) subtract(&sum, L + c, factor + j * w + c);
            t[column[j]] = sum;
        }
    }
}

#define UPDATE(w, q) case 4 * (w) + (q): update_of(w, q, m, rows, place, L, factor, column, target, width); break;

static void update(int w, int q, int64_t m, const int32_t *rows, const int32_t *place, const Z *L, const Z *factor,
                   const int32_t *column, Z *target, int width) {
    switch (4 * w + q) {
        UPDATE(1, 1) UPDATE(1, 2) UPDATE(1, 3) UPDATE(1, 4) UPDATE(2, 1) UPDATE(2, 2) UPDATE(2, 3) UPDATE(2, 4)
        UPDATE(3, 1) UPDATE(3, 2) UPDATE(3, 3) UPDATE(3, 4) UPDATE(4, 1) UPDATE(4, 2) UPDATE(4, 3) UPDATE(4, 4)
    }
}

/* The columns of a panel of w columns, once all others have been subtracted: `other` is its triangle of the other factor. */
INLINE void divide_of(const int w, int64_t m, Z *L, const Z *other, const Z *invD) {
    for (int64_t i = 0; i < m; i++, L += w) {
        UNROLL for (int c = 1; c < w; c++)
            UNROLL for (int k = 0; k < c; k++) subtract(L + c, L + k, other + c * (c - 1) / 2 + k);
        UNROLL for (int c = 0; c < w; c++) L[c] = times(L + c, invD + c);
    }
}

static void divide(int w, int64_t m, Z *L, const Z *other, const Z *invD) {
    switch (w) {
        case 1: divide_of(1, m, L, other, invD); break;
        case 2: divide_of(2, m, L, other, invD); break;
        case 3: divide_of(3, m, L, other, invD); break;
        case 4: divide_of(4, m, L, other, invD); break;
    }
}

/* The triangles of a panel and its diagonal D, which becomes its inverse in invD. */
static void triangles(int w, Z *L, Z *U, Z *D, Z *invD) {
    for (int r = 0; r < w; r++) {
        Z *l = L + r * (r - 1) / 2, *u = U + r * (r - 1) / 2;
        for (int c = 1; c < r; c++)
            for (int k = 0; k < c; k++) {
                subtract(l + c, l + k, U + c * (c - 1) / 2 + k);
                if (U != L) subtract(u + c, u + k, L + c * (c - 1) / 2 + k);
            }
        for (int c = 0; c < r; c++) {
            Z scaled = times(u + c, invD + c);
            subtract(D + r, l + c, &scaled);
            l[c] = times(l + c, invD + c);
            if (U != L) u[c] = scaled;
        }
        invD[r] = inverse(D + r);
    }
}

/* Factor: L, and U where the matrix is not symmetric (else U = L), have the matrix's entries below the diagonal, and of
 * its transpose, D those of the diagonal. On return D's inverse is in invD. work: 2 panels + n; at: panels. */
void factorise(int32_t count, const int32_t *first, const int32_t *panel, const int64_t *begin, const int32_t *rows,
               const int64_t *start, Z *L, Z *U, Z *D, Z *invD, int32_t *work, int64_t *at) {
    int32_t *head = work, *next = work + count, *place = work + 2 * (int64_t)count;
    Z factor[WIDEST * WIDEST];
    int32_t column[WIDEST];
    for (int32_t p = 0; p < count; p++) head[p] = -1;
    for (int32_t t = 0; t < count; t++) {
        int32_t c0 = first[t], width = first[t + 1] - c0;
        int64_t triangle = width * (width - 1) / 2, m = begin[t + 1] - begin[t];
        for (int64_t i = 0; i < m; i++) place[rows[begin[t] + i]] = (int32_t)i;
        for (int32_t d = head[t], after; d >= 0; d = after) {
            after = next[d];
            int w = first[d + 1] - first[d], q = 0;
            int64_t k = at[d], rest;
            while (k + q < begin[d + 1] && rows[k + q] < first[t + 1]) column[q] = rows[k + q] - c0, q++;
            rest = begin[d + 1] - k - q;
            int64_t from = start[d] + w * (w - 1) / 2 + (k - begin[d]) * w;
            for (int side = 0; side < (U == L ? 1 : 2); side++) {
                const Z *A = (side ? U : L) + from, *B = (side ? L : U) + from;
                Z *target = (side ? U : L) + start[t];
                for (int j = 0; j < q; j++)
                    for (int c = 0; c < w; c++) factor[j * w + c] = times(B + j * w + c, D + first[d] + c);
                for (int j = 0; j < q; j++)
                    for (int i = j + side; i < q; i++) {
                        Z *entry = i == j ? D + c0 + column[j] : target + column[i] * (column[i] - 1) / 2 + column[j];
                        for (int c = 0; c < w; c++) subtract(entry, A + i * w + c, factor + j * w + c);
                    }
                update(w, q, rest, rows + k + q, place, A + (int64_t)q * w, factor, column, target + triangle, width);
            }
            at[d] = k + q;
            if (rest) {
                int32_t s = panel[rows[k + q]];
                next[d] = head[s];
                head[s] = d;
            }
        }
        triangles(width, L + start[t], U + start[t], D + c0, invD + c0);
        divide(width, m, L + start[t] + triangle, U + start[t], invD + c0);
        if (U != L) divide(width, m, U + start[t] + triangle, L + start[t], invD + c0);
        at[t] = begin[t];
        if (m) {
            int32_t s = panel[rows[begin[t]]];
            next[t] = head[s];
            head[s] = t;
        }
    }
}

/* ---- solves ------------------------------------------------------------------------------------------------------- */

INLINE void forward_of(const int w, int64_t m, const int32_t *rows, const Z *L, Z *x, Z *all) {
    Z own[WIDEST];
    UNROLL for (int c = 0; c < w; c++) {
        own[c] = x[c];
        UNROLL for (int k = 0; k < c; k++) subtract(own + c, L + c * (c - 1) / 2 + k, own + k);
        x[c] = own[c];
    }
    L += w * (w - 1) / 2;
    for (int64_t i = 0; i < m; i++, L += w) {
        Z sum = all[rows[i]];
        UNROLL for (int c = 0; c < w; c++) subtract(&sum, L + c, own + c);
        all[rows[i]] = sum;
    }
}

INLINE void backward_of(const int w, int64_t m, const int32_t *rows, const Z *L, Z *x, const Z *all, const Z *invD) {
    Z own[WIDEST];
    UNROLL for (int c = 0; c < w; c++) own[c] = times(x + c, invD + c);
    const Z *entry = L + w * (w - 1) / 2;
    for (int64_t i = 0; i < m; i++, entry += w) {
        const Z *y = all + rows[i];
        UNROLL for (int c = 0; c < w; c++) subtract(own + c, entry + c, y);
    }
    UNROLL for (int c = w - 1; c >= 0; c--) {
        UNROLL for (int r = c + 1; r < w; r++) subtract(own + c, L + r * (r - 1) / 2 + c, own + r);
        x[c] = own[c];
    }
}

/* out = (L D U)^-1 b for each of `batch` right-hand sides (n, 2, W), reordered and scaled on the way in and out; x is a
 * scratch array of batch * n. A panel is read once for all right-hand sides. */
void solve(int32_t n, int32_t count, const int32_t *first, const int64_t *begin, const int32_t *rows, const int64_t *start,
           const Z *L, const Z *U, const Z *invD, const int32_t *order, const REAL *scale, int32_t batch, const Z *b, Z *out,
           Z *x) {
    for (int32_t s = 0; s < batch; s++)
        for (int32_t i = 0; i < n; i++) {
            const Z *from = b + (int64_t)s * n + order[i];
            Z *to = x + (int64_t)s * n + i;
            to->re = from->re * scale[i];
            to->im = from->im * scale[i];
        }
    for (int32_t p = 0; p < count; p++) {
        const int32_t *r = rows + begin[p];
        int64_t m = begin[p + 1] - begin[p];
        for (int32_t s = 0; s < batch; s++) {
            Z *all = x + (int64_t)s * n, *own = all + first[p];
            switch (first[p + 1] - first[p]) {
                case 1: forward_of(1, m, r, L + start[p], own, all); break;
                case 2: forward_of(2, m, r, L + start[p], own, all); break;
                case 3: forward_of(3, m, r, L + start[p], own, all); break;
                case 4: forward_of(4, m, r, L + start[p], own, all); break;
            }
        }
    }
    for (int32_t p = count; p-- > 0;) {
        const int32_t *r = rows + begin[p];
        int64_t m = begin[p + 1] - begin[p];
        const Z *d = invD + first[p];
        for (int32_t s = 0; s < batch; s++) {
            Z *all = x + (int64_t)s * n, *own = all + first[p];
            switch (first[p + 1] - first[p]) {
                case 1: backward_of(1, m, r, U + start[p], own, all, d); break;
                case 2: backward_of(2, m, r, U + start[p], own, all, d); break;
                case 3: backward_of(3, m, r, U + start[p], own, all, d); break;
                case 4: backward_of(4, m, r, U + start[p], own, all, d); break;
            }
        }
    }
    for (int32_t s = 0; s < batch; s++)
        for (int32_t i = 0; i < n; i++) {
            const Z *from = x + (int64_t)s * n + i;
            Z *to = out + (int64_t)s * n + order[i];
            to->re = from->re * scale[i];
            to->im = from->im * scale[i];
        }
}

/* ---- products and sums -------------------------------------------------------------------------------------------- */

/* out = A x for a real matrix by rows and `batch` arrays (columns, 2, W). */
void product(int32_t rows, int32_t columns, const int32_t *ptr, const int32_t *idx, const REAL *values, int32_t batch,
             const Z *x, Z *out) {
    for (int32_t s = 0; s < batch; s++, x += columns, out += rows)
        for (int32_t i = 0; i < rows; i++) {
            Z sum = {{0}, {0}};
            for (int32_t p = ptr[i]; p < ptr[i + 1]; p++) {
                const Z *y = x + idx[p];
                sum.re += y->re * values[p];
                sum.im += y->im * values[p];
            }
            out[i] = sum;
        }
}

/* y += factor x, where factor is a complex number for each frequency; with y = NULL: x *= factor. */
void add_multiple(int64_t size, const Z *factor, Z *x, Z *y) {
    Z a = *factor;
    for (int64_t i = 0; i < size; i++) {
        Z scaled = times(&a, x + i);
        if (y) y[i].re += scaled.re, y[i].im += scaled.im;
        else x[i] = scaled;
    }
}

/* y = the sum of count products of arrays x with a complex number for each frequency, one of them at each array. */
void combine(int32_t count, int64_t size, const Z *factors, const Z *const *x, Z *y) {
    for (int64_t i = 0; i < size; i++) {
        Z sum = times(factors, x[0] + i);
        for (int32_t k = 1; k < count; k++) {
            Z scaled = times(factors + k, x[k] + i);
            sum.re += scaled.re, sum.im += scaled.im;
        }
        y[i] = sum;
    }
}

/* r += y A^-1 M r for a frequency's matrix A and the rows of M or, transposed, r += y M^T A^-T r for those of M^T, where L
 * and U are exchanged by the caller; t and x are scratch arrays of batch * n. */
void stage(int32_t transposed, int32_t n, int32_t count, const int32_t *first, const int64_t *begin, const int32_t *rows,
           const int64_t *start, const Z *L, const Z *U, const Z *invD, const int32_t *order, const REAL *scale,
           const int32_t *ptr, const int32_t *idx, const REAL *values, int32_t batch, const Z *y, Z *r, Z *t, Z *x) {
    if (transposed) {
        solve(n, count, first, begin, rows, start, L, U, invD, order, scale, batch, r, t, x);
        product(n, n, ptr, idx, values, batch, t, x);
        add_multiple((int64_t)batch * n, y, x, r);
    } else {
        product(n, n, ptr, idx, values, batch, r, t);
        solve(n, count, first, begin, rows, start, L, U, invD, order, scale, batch, t, t, x);
        add_multiple((int64_t)batch * n, y, t, r);
    }
}

/* ---- layouts ------------------------------------------------------------------------------------------------------ */

/* Rows of frequencies, (count, n) complex numbers of this precision, to lanes (n, 2, W); rows that are missing are zero.
 * The rows begin at multiples of `stride` complex numbers. */
void to_lanes(int32_t count, int64_t n, int64_t stride, const REAL *rows, REAL *lanes) {
    for (int64_t from = 0; from < n; from += 64) {
        int64_t to = from + 64 < n ? from + 64 : n;
        for (int32_t w = 0; w < W; w++) {
            const REAL *row = rows + 2 * w * stride;
            REAL *target = lanes + w;
            if (w < count)
                for (int64_t i = from; i < to; i++) target[2 * W * i] = row[2 * i], target[2 * W * i + W] = row[2 * i + 1];
            else
                for (int64_t i = from; i < to; i++) target[2 * W * i] = target[2 * W * i + W] = 0;
        }
    }
}

/* The way back. */
void from_lanes(int32_t count, int64_t n, int64_t stride, const REAL *lanes, REAL *rows) {
    for (int64_t from = 0; from < n; from += 64) {
        int64_t to = from + 64 < n ? from + 64 : n;
        for (int32_t w = 0; w < count; w++) {
            REAL *row = rows + 2 * w * stride;
            const REAL *source = lanes + w;
            for (int64_t i = from; i < to; i++) row[2 * i] = source[2 * W * i], row[2 * i + 1] = source[2 * W * i + W];
        }
    }
}
