/* The library from C: a fresh adapter changes nothing, since its E is zero. */
#include <adalora.h>
#include <stdio.h>

static adalora_matrix_t matrix(float* data, int64_t rows, int64_t columns) {
  adalora_matrix_t m = {0};
  m.data = data;
  m.rows = rows;
  m.columns = columns;
  m.dtype = ADALORA_FLOAT32;
  return m;
}

static int failed(const char* call) {
  fprintf(stderr, "%s: %s\n", call, adalora_last_error());
  return 1;
}

int main(void) {
  enum { in = 7, out = 5, rank = 3 };
  float a[rank * in], e[rank], b[out * rank], w[out * in];
  adalora_context_desc_t context_desc = {0};
  adalora_adapter_desc_t adapter_desc = {0};
  adalora_context_t* context = NULL;
  adalora_adapter_t* adapter = NULL;
  adalora_triplets_t params;
  adalora_matrix_t weight = matrix(w, out, in);
  int i, changed = 0;

  if (adalora_abi_version() != ADALORA_ABI_VERSION) return failed("adalora_abi_version");
  context_desc.struct_size = sizeof context_desc;
  context_desc.backend = ADALORA_BACKEND_CPU;
  if (adalora_context_create(&context_desc, &context) != ADALORA_SUCCESS) return failed("adalora_context_create");
  adapter_desc.struct_size = sizeof adapter_desc;
  adapter_desc.in_features = in;
  adapter_desc.out_features = out;
  adapter_desc.rank = rank;
  adapter_desc.param_dtype = ADALORA_FLOAT32;
  adapter_desc.activation_dtype = ADALORA_FLOAT32;
  if (adalora_adapter_create(context, &adapter_desc, &adapter) != ADALORA_SUCCESS)
    return failed("adalora_adapter_create");
  params.A = matrix(a, rank, in);
  params.E = matrix(e, 1, rank);
  params.B = matrix(b, out, rank);
  if (adalora_adapter_initialize(adapter, &params, 1, NULL) != ADALORA_SUCCESS)
    return failed("adalora_adapter_initialize");
  if (adalora_adapter_delta_weight(adapter, &params, 0, 0, 0, &weight, NULL) != ADALORA_SUCCESS)
    return failed("adalora_adapter_delta_weight");
  for (i = 0; i < out * in; ++i) changed += w[i] != 0.0f;
  adalora_adapter_destroy(adapter);
  adalora_context_destroy(context);
  return changed != 0;
}
