/* Panels of a sparse lower triangular matrix L, given by columns with sorted rows.

A panel is a set of adjacent columns c0 .. c0+w-1 that are stored with the same rows: the dense triangle of the panel's
own rows, and below it the union of the columns' rows, explicit zeros included. Columns are merged where the arithmetic
with zeros costs less than another pass over the rows (a supernode of a Cholesky factor is the case without zeros). */
#include <stdlib.h>

#define WIDEST 16
/* costs of a panel: of itself, of each row, and of each entry */
static double cost(double w, double r, const double *c) { return c[0] + r * (c[1] + c[2] * w) + 0.5 * c[2] * w * w; }

static int merged(const int *a, int na, const int *b, int nb, int stop, int *out) {
    /* the union of two sorted lists without what is below `stop` */
    int i = 0, j = 0, n = 0;
    while (i < na && a[i] < stop) i++;
    while (j < nb && b[j] < stop) j++;
    while (i < na || j < nb) {
        if (j == nb || (i < na && a[i] < b[j])) out[n++] = a[i++];
        else if (i == na || b[j] < a[i]) out[n++] = b[j++];
        else { out[n++] = a[i++]; j++; }
    }
    return n;
}

/* Find the panels. starts (n+1) receives their first columns and n; counts (n) their numbers of rows below; rows is
   allocated here, freed by release(). Returns the number of panels, or -1 without memory. */
int64_t find_panels(int n, const int64_t *ptr, const int *index, const double *costs, int *starts, int *counts, int **rows) {
    int **of = calloc(n ? n : 1, sizeof(int *)), *work = malloc(sizeof(int) * (n + 1));
    int64_t total = 0;
    int count = 0;
    if (!of || !work) return -1;
    for (int j = 0; j < n; j++) {  /* equal columns, then panels before them that are cheaper together with them */
        int m = 0;
        for (int64_t k = ptr[j]; k < ptr[j + 1]; k++) if (index[k] > j) work[m++] = index[k];
        of[count] = malloc(sizeof(int) * (m + 1));
        if (!of[count]) return -1;
        memcpy(of[count], work, sizeof(int) * m);
        starts[count] = j, counts[count] = m, count++, starts[count] = j + 1;
        while (count > 1) {
            int a = count - 2, b = count - 1, wa = starts[b] - starts[a], wb = j + 1 - starts[b];
            if (wa + wb > WIDEST) break;
            int both = merged(of[a], counts[a], of[b], counts[b], j + 1, work);
            int last = 0;  /* whether the next column continues this one: then its panel is not complete yet */
            if (j + 1 < n && counts[b] && of[b][0] == j + 1) {
                int64_t next = 0;
                for (int64_t k = ptr[j + 1]; k < ptr[j + 2]; k++) next += index[k] > j + 1;
                last = next == counts[b] - 1;
            }
            if (last && both != counts[a] - wb) break;
            if (cost(wa + wb, both, costs) > cost(wa, counts[a], costs) + cost(wb, counts[b], costs)) break;
            free(of[a]);
            free(of[b]);
            of[b] = NULL;
            of[a] = malloc(sizeof(int) * (both + 1));
            if (!of[a]) return -1;
            memcpy(of[a], work, sizeof(int) * both);
            counts[a] = both, starts[b] = j + 1, count--;
        }
    }
    for (int s = 0; s < count; s++) total += counts[s];
    *rows = malloc(sizeof(int) * (total + 1));
    if (!*rows) return -1;
    total = 0;
    for (int s = 0; s < count; s++) {
        memcpy(*rows + total, of[s], sizeof(int) * counts[s]);
        total += counts[s];
        free(of[s]);
    }
    free(of);
    free(work);
    return count;
}

/* The number of nonzeros below the diagonal of a factor of a symmetric pattern, given by sorted or unsorted rows; work (2 n). */
int64_t count_fill(int n, const int64_t *ptr, const int *index, int *work) {
    int *parent = work, *seen = work + n;
    int64_t total = 0;
    for (int i = 0; i < n; i++) {  /* row i of the factor: the subtree of the elimination tree that its entries span */
        parent[i] = -1, seen[i] = i;
        for (int64_t k = ptr[i]; k < ptr[i + 1]; k++)
            for (int j = index[k]; j < i && seen[j] != i; j = parent[j]) {
                if (parent[j] < 0) parent[j] = i;
                seen[j] = i, total++;
            }
    }
    return total;
}

void release(void *memory) { free(memory); }

/* Store the entries of L: of a panel its triangle, w x w by rows, and its rows below in tiles of four rows, within a tile
   by columns. `rows` has each panel's rows, padded to whole tiles by row n. Returns 0, or -1 where an entry has no place. */
int pack_panels(int n, const int64_t *ptr, const int *index, const double *value, int panels, const int *starts,
                const int64_t *row_ptr, const int *rows, const int64_t *triangle_ptr, double *triangle,
                const int64_t *tile_ptr, double *tiles, int *place) {
    for (int s = 0; s < panels; s++) {
        int c0 = starts[s], c1 = starts[s + 1], w = c1 - c0;
        for (int64_t k = row_ptr[s]; k < row_ptr[s + 1]; k++) if (rows[k] < n) place[rows[k]] = (int)(k - row_ptr[s]);
        for (int j = c0; j < c1; j++)
            for (int64_t k = ptr[j]; k < ptr[j + 1]; k++) {
                int i = index[k];
                if (i <= j) continue;
                if (i < c1) { triangle[triangle_ptr[s] + (int64_t)(i - c0) * w + (j - c0)] = value[k]; continue; }
                int r = place[i];
                if (r >= row_ptr[s + 1] - row_ptr[s] || rows[row_ptr[s] + r] != i) return -1;
                tiles[tile_ptr[s] + ((int64_t)(r / 4) * w + (j - c0)) * 4 + r % 4] = value[k];
            }
    }
    return 0;
}
