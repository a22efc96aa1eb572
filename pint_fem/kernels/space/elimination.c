/* The elimination tree of a symmetric pattern, of whose n unknowns the first m are eliminated. */
#include <stdint.h>
#include <stdlib.h>

/* parent (m): the next unknown that an unknown is coupled to when it is eliminated, m or more where that is not
   eliminated, -1 where there is none; count (m): the nonzeros of its column in the factor, below the diagonal. The pattern
   is given by rows, sorted or not; seen (n) is work memory. Returns the number of nonzeros. (Liu, ACM Trans. Math. Softw.
   12, 1986: row i of the factor is the subtree of the tree that the entries of row i span.) */
int64_t elimination_tree(int n, int m, const int64_t *ptr, const int *index, int *parent, int64_t *count, int *seen) {
    int64_t total = 0;
    for (int j = 0; j < m; j++) parent[j] = -1, count[j] = 0;
    for (int i = 0; i < n; i++) seen[i] = -1;
    for (int i = 0; i < n; i++) {
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
