// The header by itself in C++17, twice. Compiling it is the test.
#include <adalora.h>

static_assert(sizeof(adalora_matrix_t) == 40);
