/* The elimination tree of a symmetric pattern, of whose n unknowns the first m are eliminated. */
#include <stdint.h>
#include <stdlib.h>

/* parent (m): the next unknown that an unknown is coupled to when it is eliminated, m or more where that is not
   eliminated, -1 where there is none; count (m): the nonzeros of its column in the factor, below the diagonal. The pattern
   is given by rows, sorted or not; seen (n) is work memory. The count stops above `most`. Returns the number of nonzeros. (Liu, ACM Trans. Math. Softw.
   12, 1986: row i of the factor is the subtree of the tree that the entries of row i span.) */
int64_t elimination_tree(int n, int m, const int64_t *ptr, const int *index, int *parent, int64_t *count, int *seen,
                         int64_t most) {
    int64_t total = 0;
    for (int j = 0; j < m; j++) parent[j] = -1, count[j] = 0;
    for (int i = 0; i < n; i++) seen[i] = -1;
    for (int i = 0; i < n && total <= most; i++) {
        if (i < m) seen[i] = i;
        for (int64_t k = ptr[i]; k < ptr[i + 1]; k++)
            for (int j = index[k]; j < i && j < m && j >= 0 && seen[j] != i; j = parent[j]) {
                if (parent[j] < 0) parent[j] = i;
                seen[j] = i, count[j]++, total++;
            }
    }
    return total;
}

/* An order in which the unknowns of each subtree follow one another; size (m): unknowns of the subtree. Children come
   before their parent, in their own order. Returns -1 without memory. */
int postorder(int m, const int *parent, int *order, int *size) {
    int *first = malloc(sizeof(int) * (m + 1)), *next = malloc(sizeof(int) * (m + 1)), *stack = malloc(sizeof(int) * (m + 1));
    if (!first || !next || !stack) return -1;
    int count = 0, roots = -1;
    for (int j = 0; j < m; j++) first[j] = -1, size[j] = 1;
    for (int j = m - 1; j >= 0; j--) {
        int p = parent[j];
        if (p >= 0 && p < m) next[j] = first[p], first[p] = j;
        else next[j] = roots, roots = j;
    }
    for (int j = 0; j < m; j++) if (parent[j] >= 0 && parent[j] < m) size[parent[j]] += size[j];
    for (int root = roots; root >= 0; root = next[root]) {
        int top = 0;
        stack[0] = root;
        while (top >= 0) {
            int j = stack[top];
            if (first[j] >= 0) { stack[++top] = first[j], first[j] = next[first[j]]; continue; }
            order[count++] = j, top--;
        }
    }
    free(first), free(next), free(stack);
    return count;
}

/* Add the lower triangle of an update matrix, n x n by columns, to a front: its columns that are eliminated, size x width,
   and the rest, whose lower triangle is stored. at: the front's row of each of the update's. */
void extend_add(int n, const int *at, const double *update, int size, int width, double *panel, double *rest) {
    const int64_t below = size - width;
    for (int j = 0; j < n; j++) {
        const double *from = update + (int64_t)j * n;
        if (at[j] < width) {
            double *to = panel + (int64_t)at[j] * size;
            for (int i = j; i < n; i++) to[at[i]] += from[i];
        } else {
            double *to = rest + (at[j] - width) * below - width;
            for (int i = j; i < n; i++) to[at[i]] += from[i];
        }
    }
}

/* Store the nonzeros of some columns of L, size x width by columns with ones on the diagonal, from `first` on. rows are those
   of the columns; counts (width) receives the numbers of nonzeros. Returns where the next ones begin, or -1 if there is
   no space. */
int64_t store_columns(int size, int width, const double *panel, const int *rows, int64_t first, int64_t space, int *index,
                      double *value, int64_t *counts) {
    for (int j = 0; j < width; j++) {
        const double *column = panel + (int64_t)j * size;
        const int64_t begin = first;
        if (first + size > space) {
            int64_t count = 0;
            for (int i = j + 1; i < size; i++) count += column[i] != 0.0;
            if (first + count > space) return -1;
        }
        for (int i = j + 1; i < size; i++) if (column[i] != 0.0) index[first] = rows[i], value[first++] = column[i];
        counts[j] = first - begin;
    }
    return first;
}
