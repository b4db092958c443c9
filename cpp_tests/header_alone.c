/* The header by itself in C11, twice. Compiling it is the test. */
#include <adalora.h>

/* Values are embedded in descriptors, so that they keep their size for ever. */
_Static_assert(sizeof(adalora_matrix_t) == 40, "adalora_matrix_t");
_Static_assert(sizeof(adalora_triplets_t) == 120, "adalora_triplets_t");
_Static_assert(sizeof(adalora_dropout_t) == 24, "adalora_dropout_t");
