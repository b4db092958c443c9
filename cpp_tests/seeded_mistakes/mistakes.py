"""Mistakes that a CUDA backend might have, each as a small change to a copy of ours.

A change replaces a text that occurs once. What should notice it is the `filter`, tests of one program.
"""

from dataclasses import dataclass

DEVICE = "src/backend/cuda/device.rs"
PASS = "src/backend/cuda/pass.rs"
WEIGHT = "src/backend/cuda/weight.rs"
ALLOCATOR = "src/backend/cuda/allocator.rs"
KERNELS = "src/backend/cuda/kernels.cu"


@dataclass(frozen=True)
class Mistake:
    """A change, and the tests that should notice it."""

    name: str
    file: str
    right: str
    wrong: str
    program: str
    filter: str


MISTAKES = [
    Mistake(
        "wrong leading dimension",
        DEVICE,
        "let extents = [g.n, g.m, g.k, g.b.stride, g.a.stride, g.c.stride];",
        "let extents = [g.n, g.m, g.k, g.b.stride, g.a.stride, g.n];",
        "test_operations",
        "cuda_forward_and_backward.f32_f32_33*gaps",
    ),
    Mistake(
        "wrong extent: the padding of rows is summed over, too",
        PASS,
        "self.multiply((self.pass.tokens, columns, input), x, a, 0.0, self.sums(unit.projected, columns))",
        "self.multiply((self.pass.tokens, columns, input.next_multiple_of(8)), x, a, 0.0, "
        "self.sums(unit.projected, columns))",
        "test_operations",
        "cuda_forward_and_backward.f32_f32_33*gaps",
    ),
    Mistake(
        "kernels on the default stream instead of the caller's",
        DEVICE,
        "std::ptr::with_exposed_provenance_mut(self.stream.0),\n                parameters",
        "std::ptr::null_mut(),\n                parameters",
        "test_operations",
        "cuda_forward_and_backward.f32_f32_33*gaps",
    ),
    Mistake(
        "the code of all kernels but one is left to their first launches",
        DEVICE,
        "if let Some(loader) = &libraries.loader {",
        "if let Some(loader) = libraries.loader.as_ref().filter(|_| functions.len() == 1) {",
        "test_cuda",
        "*Graphs.OneStepServesTheWholeSchedule*",
    ),
    Mistake(
        "products in another stream than the kernels around them",
        DEVICE,
        "let stream = std::ptr::with_exposed_provenance_mut(self.session.stream.0);",
        "let stream = std::ptr::null_mut();",
        "test_operations",
        "cuda_forward_and_backward.f32_f32_33*gaps",
    ),
    Mistake(
        "cuBLAS's workspace reaches into what lies behind it",
        DEVICE,
        "workspace.bytes.saturating_sub(begin - workspace.data.0);",
        "workspace.bytes.saturating_sub(begin - workspace.data.0) + 4096;",
        "test_operations",
        "cuda_forward_and_backward.f32_f32_33*gaps",
    ),
    Mistake(
        "the host's scalars are read on the device, when the work runs",
        DEVICE,
        "let code = (blas.cublasSetPointerMode_v2)(handle, PointerMode::CUBLAS_POINTER_MODE_HOST);",
        "let code = (blas.cublasSetPointerMode_v2)(handle, PointerMode::CUBLAS_POINTER_MODE_DEVICE);",
        "test_operations",
        "cuda_forward_and_backward.f32_f32_33*gaps",
    ),
    Mistake(
        "a grid without the rows that fill no block",
        WEIGHT,
        "let blocks = w.rows.div_ceil(ROWS) * column_tiles;",
        "let blocks = w.rows / ROWS * column_tiles;",
        "test_operations",
        "cuda_delta_weight.f32_to_f32*",
    ),
    Mistake(
        "a step waits, which no capture allows",
        DEVICE,
        "debug_assert!(!g.c.transposed && g.a.dtype == g.b.dtype);",
        "self.session.synchronize()?;",
        "test_operations",
        "cuda_graph_forward_and_backward.f32_f32_33*gaps",
    ),
    Mistake(
        "wrong transposition",
        PASS,
        "let a = self.own(unit.a_project, self.layout.input_stride, true);",
        "let a = self.own(unit.a_project, self.layout.input_stride, false);",
        "test_operations",
        "cuda_forward_and_backward.f32_f32_33*gaps",
    ),
    Mistake(
        "a second binding keeps the tables of pointers of the first",
        ALLOCATOR,
        "session.upload_sync(&tables.bytes, allocator.binding.workspace)?;",
        "if is_fresh {\n            session.upload_sync(&tables.bytes, allocator.binding.workspace)?;\n        }",
        "test_operations",
        "cuda_bound_again*.f32",
    ),
    Mistake(
        "y is overwritten instead of added to",
        PASS,
        "self.multiply((tokens, to.columns, depth), first, second, 1.0, c)?;",
        "self.multiply((tokens, to.columns, depth), first, second, 0.0, c)?;",
        "test_operations",
        "cuda_forward_and_backward.f32_f32_33*gaps",
    ),
    Mistake(
        "TF32 without being asked for",
        DEVICE,
        "(Dtype::Float32, true) => COMPUTE_32F_FAST_TF32,",
        "(Dtype::Float32, _) => COMPUTE_32F_FAST_TF32,",
        "test_operations",
        "cuda_forward_and_backward.f32_f32_33*gaps",
    ),
    Mistake(
        "the work of two buffers overlaps",
        PASS,
        "slot.weighted = arena.take(&[tokens, pairs * slot.padded, operand]);",
        "slot.weighted = arena.take(&[tokens, slot.padded, operand]);",
        "test_operations",
        "cuda_forward_and_backward.bf16_f32_33*gaps",
    ),
    Mistake(
        "gradients are read as if they were of the parameters' type",
        ALLOCATOR,
        "g_dtype: code(slice.g.1),",
        "g_dtype: code(slice.p.1),",
        "test_operations",
        "cuda_update.bf16_gradients_f32_AdamW*",
    ),
    Mistake(
        "the table of budgets begins one mask late",
        ALLOCATOR,
        "let first = schedule.tinit / schedule.delta_t + 1;",
        "let first = schedule.tinit / schedule.delta_t + 2;",
        "test_operations",
        "cuda_select.f32",
    ),
    Mistake(
        "a cuBLAS handle does not come back to the pool",
        DEVICE,
        "self.ready.handles.lock().extend(self.own.take());",
        "let _ = self.own.take();",
        "test_cuda",
        "Threads.WorkAtOnce",
    ),
    Mistake(
        "a lent handle's mode is not put back",
        DEVICE,
        '("cublasSetMathMode", (blas.cublasSetMathMode)(handle, self.math)),',
        '("cublasSetMathMode", (blas.cublasSetMathMode)(handle, MATH_MODE)),',
        "test_cuda",
        "Borrowed.CublasHandle",
    ),
    Mistake(
        "the device's context stays current",
        DEVICE,
        "let popped = pushed.pop();",
        "let popped: Result<()> = Ok(());",
        "test_cuda",
        "Borrowed.NoContext*",
    ),
    Mistake(
        "a launch that failed is not noticed",
        DEVICE,
        'driver.check(format_args!("cuLaunchKernel of {}", name()), code).map_err(incomplete)',
        'driver.check(format_args!("cuLaunchKernel of {}", name()), code.min(0))',
        "test_cuda",
        "*FailuresOf.EachCallOfAStep/f32",
    ),
    Mistake(
        "the state changes before the call's last launch",
        KERNELS,
        "if (threadIdx.x == 0) *args.plan = decide(args, not_finite != 0);",
        "if (threadIdx.x == 0) {\n"
        "    *args.plan = decide(args, not_finite != 0);\n"
        "    *const_cast<Header*>(args.header) = args.plan->next;\n"
        "  }",
        "test_cuda",
        "*FailuresOf.EachCallOfAStep/f32",
    ),
    Mistake(
        "triplets whose E is 0 reach the output where h is not finite",
        KERNELS,
        "const T weighted = weight != T(0) ? value * weight : T(0);",
        "const T weighted = value * weight;",
        "test_faults",
        "*AMaskedTripletAddsNothing/cuda",
    ),
    Mistake(
        "a step that is not finite is taken",
        KERNELS,
        "const bool found = args.found_inf ? !(*args.found_inf <= 0.0f) : not_finite;",
        "const bool found = not_finite;",
        "test_faults",
        "*NonFinite*/cuda_??",
    ),
    Mistake(
        "all of the scores that tie stay",
        KERNELS,
        "bool stays = all_stay || own > head;",
        "bool stays = all_stay || own >= head;",
        "test_faults",
        "*EqualScores*/cuda",
    ),
    Mistake(
        "what triplets cost is added up in 32 bits",
        KERNELS,
        "const uint64_t weight = uint64_t(high[digit]) << 32 | low[digit];",
        "const uint64_t weight = low[digit];",
        "test_operations",
        "cuda_select.a_million_triplets__budget_in_parameters",
    ),
    Mistake(
        "a chunk's last element is left out",
        KERNELS,
        "for (int32_t i = fours * 4 + threadIdx.x; i < chunk.count; i += THREADS) update_one",
        "for (int32_t i = fours * 4 + threadIdx.x; i < chunk.count - 1; i += THREADS) update_one",
        "test_operations",
        "cuda_update.f32_*AdamW*",
    ),
    Mistake(
        "a term of a split factor is dropped",
        KERNELS,
        "term[i] = narrow<Element>(i < count ? value : 0.0f);",
        "term[i] = narrow<Element>(i < (count < 2 ? count : count - 1) ? value : 0.0f);",
        "test_operations",
        "cuda_forward_and_backward.bf16_f32_33*gaps",
    ),
    Mistake(
        "a barrier is missing between writing shared memory and reading it",
        KERNELS,
        "__syncthreads();\n    if (works) {\n      KEEP_ROLLED for (int c = share;",
        "if (works) {\n      KEEP_ROLLED for (int c = share;",
        "test_operations",
        "cuda_gram.several_layers__f32*",
    ),
    Mistake(
        "the mask of dropout begins at the share's first column",
        KERNELS,
        "philox({{uint32_t(word), token,",
        "philox({{uint32_t(word - first_word), token,",
        "test_operations",
        "cuda_dropout_mask.f32_columns_of_a_share",
    ),
    Mistake(
        "AdamW's correction counts the updates before this one",
        KERNELS,
        "const int64_t k = args.clocks[slice.adapter] + 1;",
        "const int64_t k = args.clocks[slice.adapter] + 2;",
        "test_operations",
        "cuda_update.f32_*AdamW*",
    ),
    Mistake(
        "bfloat16 is cut off instead of rounded",
        KERNELS,
        "return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};",
        "return {uint16_t(bits >> 16)};",
        "test_operations",
        "cuda_update.bf16_gradients_bf16_AdamW*",
    ),
    Mistake(
        "columns past the end of the base weight are written",
        KERNELS,
        "if (row < args.rows && column < args.columns) finite",
        "if (row < args.rows) finite",
        "test_operations",
        "cuda_delta_weight.f32_to_f32*",
    ),
]
