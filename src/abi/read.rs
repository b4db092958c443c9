//! From C's descriptors to checked values: sizes, strides, addresses, codes, flags.

use super::adapter::Adapter;
use super::guard::{Kind, required};
use super::types::*;
use crate::adapter::{
    self, ALIGNMENT, Direction, DropoutPlace, Geometry, MAX_FEATURES, MAX_GROUP, RawCall, RawTriplets, Share, Stages,
};
use crate::allocator::{self, BudgetUnit, Config, Counters, Factor, HyperSource, SliceSource, StepSource};
use crate::context::{Kind as BackendKind, Level, Settings};
use crate::error::{At, Error, Result, reserve};
use crate::tensor::{self, Address, Buffer, Dtype, Stream};
use arrayvec::ArrayVec;
use std::ffi::{CStr, CString, OsStr, c_char, c_void};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;

/// No descriptor will ever be larger; what claims to be is not a descriptor.
const LARGEST_DESCRIPTOR: usize = 1 << 16;

impl From<*mut c_void> for Stream {
    fn from(stream: *mut c_void) -> Self {
        Self(stream.expose_provenance())
    }
}

/// A descriptor: a C structure that begins with its size.
///
/// # Safety
/// The type is `repr(C)`, begins with a `usize`, is valid for zero bytes, and every prefix of `MINIMUM` bytes
/// or more followed by zeros is valid too.
pub(super) unsafe trait Descriptor: Copy {
    /// What the first version of the interface must have had: the end of the last field that has no default.
    const MINIMUM: usize;
}

macro_rules! descriptor {
    ($($name:ident: $last:ident),* $(,)?) => {$(
        // SAFETY: a C structure of integers, floats, raw pointers and optional functions, for all of which zeros are
        // valid.
        unsafe impl Descriptor for $name {
            const MINIMUM: usize = std::mem::offset_of!($name, $last) + {
                const fn size<T, F>(_: fn(&T) -> &F) -> usize { size_of::<F>() }
                size::<$name, _>(|d| &d.$last)
            };
        }
    )*};
}

descriptor! {
    ContextDesc: backend, AdapterDesc: activation_dtype, Call: params, AllocatorDesc: beta2,
    Slice: exp_avg_unc, Hyper: eps, Step: step, Report: struct_size,
    CheckpointDesc: config, AdapterEntry: rank, Tensor: dtype, AdapterInfo: struct_size,
}

/// Copies a descriptor, whatever version of the header its owner was compiled with.
///
/// # Safety
/// `from` is null, or the beginning of as many readable bytes as the descriptor's `struct_size` says.
pub(super) unsafe fn descriptor<T: Descriptor>(from: *const T, name: &str) -> Result<T> {
    // SAFETY: as this function asks.
    let size = unsafe { descriptor_size(from, name) }?;
    let mut copy = MaybeUninit::<T>::zeroed();
    // SAFETY: no more than `size` bytes are read and no more than the copy has are written; a prefix followed by zeros
    // is valid.
    unsafe {
        let bytes = size.min(size_of::<T>());
        copy.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(from.cast(), bytes);
        Ok(copy.assume_init())
    }
}

/// The size that a descriptor says it has.
///
/// # Safety
/// As [`descriptor`].
pub(super) unsafe fn descriptor_size<T: Descriptor>(from: *const T, name: &str) -> Result<usize> {
    if from.is_null() {
        return Err(Error::argument(name, "NULL", "the address of a descriptor"));
    }
    // SAFETY: every descriptor begins with its size; it may lie at any address.
    let size = unsafe { from.cast::<usize>().read_unaligned() };
    if !(T::MINIMUM..=LARGEST_DESCRIPTOR).contains(&size) {
        return Err(Error::argument(
            format_args!("{name}.struct_size"),
            size,
            format_args!("{} (at least {}: set it to sizeof)", size_of::<T>(), T::MINIMUM),
        ));
    }
    for i in size_of::<T>()..size {
        // SAFETY: within the bytes that the descriptor says it has.
        if unsafe { from.cast::<u8>().add(i).read() } != 0 {
            return Err(Error::argument(
                format_args!("{name}: byte {i} of a struct_size of {size}"),
                "a field that this library does not know",
                "zero: it is of a later version",
            ));
        }
    }
    Ok(size)
}

/// The descriptors of an array, one after another.
///
/// # Safety
/// `from` is the beginning of `n` descriptors `stride` bytes apart, or `n` is 0.
pub(super) unsafe fn array<T: Descriptor>(
    from: *const T,
    stride: usize,
    n: i64,
    name: &'static str,
) -> Result<impl Iterator<Item = Result<T>>> {
    let n = count(n, format_args!("number of {name}"))?;
    if n > 0 && from.is_null() {
        return Err(Error::argument(name, "NULL", format_args!("the address of {n} descriptors")));
    }
    if n > 0 && !(T::MINIMUM..=LARGEST_DESCRIPTOR).contains(&stride) {
        return Err(Error::argument(
            format_args!("stride of {name}"),
            stride,
            format_args!("{}, the size of one", size_of::<T>()),
        ));
    }
    Ok((0..n).map(move |i| {
        let at = from.wrapping_byte_add(i * stride);
        let name = format_args_index(name, i);
        // SAFETY: the i-th of n readable descriptors.
        let size = unsafe { descriptor_size(at, &name) }?;
        if size > stride {
            return Err(Error::argument(
                format_args!("{name}.struct_size"),
                size,
                format_args!("at most the stride, {stride}"),
            ));
        }
        // SAFETY: as above.
        unsafe { descriptor(at, &name) }
    }))
}

/// "calls[3]", without an allocation for it.
fn format_args_index(name: &str, index: usize) -> arrayvec::ArrayString<48> {
    use std::fmt::Write;
    let mut text = arrayvec::ArrayString::new();
    // A name that is too long is cut; ours are not.
    let _ = write!(text, "{name}[{index}]");
    text
}

/// A count: 0 or more.
pub(super) fn count(value: i64, name: impl std::fmt::Display) -> Result<usize> {
    usize::try_from(value).map_err(|_| Error::argument(name, value, "0 or more"))
}

/// A flag: 0 or 1.
pub(super) fn flag(value: i32, name: &str) -> Result<bool> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Error::argument(name, value, "0 or 1")),
    }
}

pub(super) fn reserved(value: i32, name: impl std::fmt::Display) -> Result<()> {
    if value == 0 { Ok(()) } else { Err(Error::argument(name, value, "0")) }
}

/// Which products a pass computes.
pub(super) fn stages(code: i32) -> Result<Stages> {
    match code {
        ADALORA_STAGE_PROJECT => Ok(Stages { project: true, expand: false }),
        ADALORA_STAGE_EXPAND => Ok(Stages { project: false, expand: true }),
        ADALORA_STAGE_BOTH => Ok(Stages { project: true, expand: true }),
        _ => Err(Error::argument("stages", code, "ADALORA_STAGE_PROJECT, _EXPAND or _BOTH (1, 2 or 3)")),
    }
}

fn dtype(code: i32, name: impl std::fmt::Display) -> Result<Dtype> {
    match code {
        ADALORA_FLOAT32 => Ok(Dtype::Float32),
        ADALORA_FLOAT64 => Ok(Dtype::Float64),
        ADALORA_BFLOAT16 => Ok(Dtype::Bfloat16),
        ADALORA_FLOAT16 => Ok(Dtype::Float16),
        _ => Err(Error::argument(
            name,
            code,
            "ADALORA_FLOAT32, ADALORA_FLOAT64, ADALORA_BFLOAT16 or ADALORA_FLOAT16 (1 to 4)",
        )),
    }
}

/// An address, null included; whoever uses it checks it.
pub(super) fn address<T>(pointer: *const T) -> Address {
    Address(pointer.expose_provenance())
}

/// An address, or nothing.
pub(super) fn optional_address<T>(pointer: *const T) -> Option<Address> {
    (!pointer.is_null()).then(|| address(pointer))
}

/// The address of one value.
pub(super) fn one<T>(pointer: *const T, name: &str) -> Result<Address> {
    address(pointer).check(name, align_of::<T>())
}

/// The address of one value, or nothing.
pub(super) fn one_or_null<T>(pointer: *const T, name: &str) -> Result<Option<Address>> {
    optional_address(pointer).map(|a| a.check(name, align_of::<T>())).transpose()
}

/// Memory lent for a call.
pub(super) fn buffer(data: *mut c_void, bytes: usize, name: &str) -> Result<Buffer> {
    let buffer = Buffer { data: address(data), bytes };
    if buffer.data.0.checked_add(bytes).is_none() {
        return Err(Error::argument(name, format_args!("{bytes} bytes"), "a size that fits memory"));
    }
    Ok(buffer)
}

/// Bytes on the host.
///
/// # Safety
/// `data` is the beginning of `size` readable bytes, or null.
pub(super) unsafe fn bytes<'a>(data: *const c_void, size: usize, name: &str) -> Result<&'a [u8]> {
    if size == 0 {
        return Ok(&[]);
    }
    if data.is_null() {
        return Err(Error::argument(name, "NULL", "an address"));
    }
    if isize::try_from(size).is_err() {
        return Err(Error::argument("size", size, "a size that fits memory"));
    }
    // SAFETY: readable, as this function asks; any bytes are valid.
    Ok(unsafe { std::slice::from_raw_parts(data.cast(), size) })
}

/// Values on the host.
///
/// # Safety
/// `data` is the beginning of `n` readable values, or null, or not aligned.
pub(super) unsafe fn values<'a>(data: *const i64, n: usize, name: &str) -> Result<&'a [i64]> {
    one(data, name)?;
    // SAFETY: readable, as this function asks, and aligned; any bytes are valid.
    Ok(unsafe { std::slice::from_raw_parts(data, n) })
}

/// Writes values to the host's memory, where they are wanted.
///
/// # Safety
/// The address, if any, has room for them and is aligned to them.
pub(super) unsafe fn write_all<T: Copy>(to: Option<Address>, values: &[T]) {
    if let Some(to) = to {
        // SAFETY: as this function asks; the values are ours, and not in the caller's memory.
        unsafe {
            std::ptr::with_exposed_provenance_mut::<T>(to.0).copy_from_nonoverlapping(values.as_ptr(), values.len());
        }
    }
}

fn checked_matrix(m: &Matrix, name: &str) -> Result<tensor::Matrix> {
    let rows = count(m.rows, format_args!("{name}.rows"))?;
    let columns = count(m.columns, format_args!("{name}.columns"))?;
    if m.row_stride != 0 && m.row_stride < m.columns {
        return Err(Error::argument(
            format_args!("{name}.row_stride"),
            m.row_stride,
            format_args!("0, or at least the {columns} columns"),
        ));
    }
    let row_stride = if m.row_stride == 0 { columns } else { m.row_stride as usize };
    let dtype = dtype(m.dtype, format_args!("{name}.dtype"))?;
    reserved(m.reserved, format_args!("{name}.reserved"))?;
    let bytes = rows.checked_mul(row_stride).and_then(|n| n.checked_mul(dtype.size()));
    let data = address(m.data);
    let fits = bytes.is_some_and(|b| isize::try_from(b).is_ok() && data.0.checked_add(b).is_some());
    if !fits {
        return Err(Error::argument(
            name,
            format_args!("{rows} rows, {row_stride} elements apart, of {dtype}"),
            "a matrix that fits memory",
        ));
    }
    if rows > 0 && columns > 0 {
        data.check(name, dtype.size())?;
    }
    Ok(tensor::Matrix { data, rows, columns, row_stride, dtype })
}

/// A matrix.
///
/// # Safety
/// `from` is readable, or null.
pub(super) unsafe fn matrix(from: *const Matrix, name: &str) -> Result<tensor::Matrix> {
    // SAFETY: as this function asks.
    unsafe { optional_matrix(from, name) }?.ok_or_else(|| Error::argument(name, "NULL", "the address of a matrix"))
}

/// A matrix, or nothing.
///
/// # Safety
/// `from` is readable, or null.
pub(super) unsafe fn optional_matrix(from: *const Matrix, name: &str) -> Result<Option<tensor::Matrix>> {
    if from.is_null() {
        return Ok(None);
    }
    // SAFETY: readable; it may lie at any address.
    let value = unsafe { from.read_unaligned() };
    checked_matrix(&value, name).map(Some)
}

pub(super) fn checked_triplets(t: &Triplets, names: [&str; 3]) -> Result<RawTriplets> {
    Ok(RawTriplets {
        a: checked_matrix(&t.A, names[0])?,
        e: checked_matrix(&t.E, names[1])?,
        b: checked_matrix(&t.B, names[2])?,
    })
}

pub(super) const PARAMS: [&str; 3] = ["params.A", "params.E", "params.B"];
const GRADS: [&str; 3] = ["grads.A", "grads.E", "grads.B"];

/// Parameters.
///
/// # Safety
/// `from` is readable, or null.
pub(super) unsafe fn triplets(from: *const Triplets, name: &str) -> Result<RawTriplets> {
    if from.is_null() {
        return Err(Error::argument(name, "NULL", "the address of triplets"));
    }
    // SAFETY: readable; it may lie at any address.
    let value = unsafe { from.read_unaligned() };
    checked_triplets(&value, PARAMS)
}

/// What a context is made of.
///
/// # Safety
/// `desc` is null or the beginning of a readable descriptor; what it points to is readable, and the functions
/// and their data stay valid for the context's lifetime.
pub(super) unsafe fn context_settings(desc: *const ContextDesc) -> Result<Settings> {
    // SAFETY: as this function asks.
    let d = unsafe { descriptor(desc, "desc") }?;
    let kind = match d.backend {
        ADALORA_BACKEND_CPU => BackendKind::Cpu,
        ADALORA_BACKEND_CUDA => BackendKind::Cuda,
        other => {
            return Err(Error::argument("desc.backend", other, "ADALORA_BACKEND_CPU or ADALORA_BACKEND_CUDA (1 or 2)"));
        }
    };
    reserved(d.reserved, "desc.reserved")?;
    reserved(d.reserved_end, "desc.reserved_end")?;
    let tf32 = flag(d.tf32, "desc.tf32")?;
    let cublas_handle = optional_address(d.cublas_handle);
    let library_folder = (!d.library_folder.is_null()).then(|| {
        // SAFETY: a zero-terminated text, as this function asks.
        OsStr::from_bytes(unsafe { CStr::from_ptr(d.library_folder) }.to_bytes()).to_owned()
    });
    match kind {
        BackendKind::Cpu => {
            if d.device != 0 {
                return Err(Error::argument("desc.device", d.device, "0 on the CPU backend"));
            }
            if cublas_handle.is_some() {
                return Err(Error::argument("desc.cublas_handle", "a handle", "NULL on the CPU backend"));
            }
            if let Some(folder) = &library_folder {
                return Err(Error::argument("desc.library_folder", folder.display(), "NULL on the CPU backend"));
            }
            if tf32 {
                return Err(Error::argument("desc.tf32", d.tf32, "0 on the CPU backend"));
            }
        }
        BackendKind::Cuda => {
            if d.device < 0 {
                return Err(Error::argument("desc.device", d.device, "0 or more"));
            }
            if d.threads != 0 {
                return Err(Error::argument("desc.threads", d.threads, "0 on the CUDA backend"));
            }
            if d.parallel.is_some() {
                return Err(Error::argument("desc.parallel", "a function", "NULL on the CUDA backend"));
            }
        }
    }
    let threads = usize::try_from(d.threads)
        .ok()
        .filter(|n| *n <= 1024)
        .ok_or_else(|| Error::argument("desc.threads", d.threads, "0 to 1024"))?;
    let parallel = d.parallel.map(|parallel| -> crate::context::Parallel {
        Box::new(move |body, threads| {
            unsafe extern "C" fn run(data: *mut c_void) {
                // SAFETY: `data` is the address of the body below, which outlives the call of `parallel`.
                let body = unsafe { *data.cast::<&(dyn Fn() + Sync)>() };
                body();
            }
            let mut body = body;
            let threads = u32::try_from(threads).unwrap_or(u32::MAX);
            // SAFETY: the caller's function, valid for the context's lifetime; it returns after every call of `run`
            // has.
            unsafe { parallel(Some(run), (&raw mut body).cast(), threads, 0) };
        })
    });
    let log = d.log.map(|log| -> crate::context::Log {
        let user = d.log_user.expose_provenance();
        Box::new(move |level, text| {
            let code = match level {
                Level::Warning => ADALORA_LOG_WARNING,
                Level::Info => ADALORA_LOG_INFO,
            };
            let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
            let text: *const c_char = text.as_ptr();
            // SAFETY: the caller's function, valid for the context's lifetime, with the caller's own data.
            unsafe { log(std::ptr::with_exposed_provenance_mut(user), code, text) };
        })
    });
    Ok(Settings { kind, threads, parallel, log, device: d.device, cublas_handle, library_folder, tf32 })
}

/// The geometry of an adapter.
///
/// # Safety
/// `desc` is null or the beginning of a readable descriptor.
pub(super) unsafe fn geometry(desc: *const AdapterDesc) -> Result<Geometry> {
    // SAFETY: as this function asks.
    let d = unsafe { descriptor(desc, "desc") }?;
    let share = |whole: i64, local: i64, begin: i64, names: [&str; 3]| {
        let features = usize::try_from(whole)
            .ok()
            .filter(|n| (1..=MAX_FEATURES).contains(n))
            .ok_or_else(|| Error::argument(names[0], whole, "1 to 2^34"))?;
        let held = if local == 0 { whole } else { local };
        if !(1..=whole).contains(&held) {
            return Err(Error::argument(names[1], local, format_args!("0 (all), or 1 to {whole}")));
        }
        if !(0..=whole - held).contains(&begin) {
            return Err(Error::argument(
                names[2],
                begin,
                format_args!("0 to {}: {held} of {whole} features are held", whole - held),
            ));
        }
        Ok(Share { whole: features, begin: begin as usize, local: held as usize })
    };
    let input = share(d.in_features, d.in_local, d.in_begin, ["desc.in_features", "desc.in_local", "desc.in_begin"])?;
    let output =
        share(d.out_features, d.out_local, d.out_begin, ["desc.out_features", "desc.out_local", "desc.out_begin"])?;
    let rank = usize::try_from(d.rank).map_err(|_| Error::argument("desc.rank", d.rank, "0 or more"))?;
    let widest = input.whole.max(output.whole).max(rank);
    if rank.checked_mul(widest).and_then(|n| n.checked_mul(8)).is_none_or(|bytes| isize::try_from(bytes).is_err()) {
        return Err(Error::argument(
            "desc.rank",
            rank,
            format_args!("less: {rank} triplets of {} and {} features overflow memory", input.whole, output.whole),
        ));
    }
    let ranknum = if d.ranknum == 0 { d.rank } else { d.ranknum };
    if !(d.rank..1 << 40).contains(&ranknum) {
        let expected = format_args!("0 (as rank), or rank, {rank}, to 2^40");
        return Err(Error::argument("desc.ranknum", d.ranknum, expected));
    }
    let ranknum = ranknum as usize;
    if !(d.alpha.is_finite() && d.alpha >= 0.0) {
        return Err(Error::argument("desc.alpha", d.alpha, "a finite number, 0 or more"));
    }
    if !(0.0..1.0).contains(&d.dropout) {
        return Err(Error::argument("desc.dropout", d.dropout, "a number in [0, 1)"));
    }
    let param_dtype = dtype(d.param_dtype, "desc.param_dtype")?;
    let activation_dtype = dtype(d.activation_dtype, "desc.activation_dtype")?;
    if param_dtype.compute() != activation_dtype.compute() {
        return Err(Error::argument(
            "desc.activation_dtype",
            format_args!("{activation_dtype} with parameters of {param_dtype}"),
            "float64 with float64, or any two of float32, bfloat16 and float16",
        ));
    }
    if !(0..=3).contains(&d.operand_terms) {
        return Err(Error::argument("desc.operand_terms", d.operand_terms, "0 (default), 1, 2 or 3"));
    }
    let operand_terms = if d.operand_terms == 0 { 2 } else { d.operand_terms as usize };
    reserved(d.reserved, "desc.reserved")?;
    let (alpha, dropout) = (d.alpha, d.dropout);
    Ok(Geometry { input, output, rank, ranknum, alpha, dropout, param_dtype, activation_dtype, operand_terms })
}

/// The adapter that a call names.
///
/// # Safety
/// The pointer is null or a live handle.
unsafe fn call_adapter<'a>(pointer: *const Adapter) -> Result<&'a adapter::Adapter> {
    // SAFETY: as this function asks.
    required(unsafe { pointer.as_ref() }, "adapter")?.0.get(Kind::Adapter, "adapter").map(|a| &**a)
}

fn group_size(n: i64) -> Result<()> {
    if (1..=MAX_GROUP as i64).contains(&n) {
        return Ok(());
    }
    Err(Error::argument("n", n, format_args!("1 to {MAX_GROUP}")))
}

/// The adapters of an array of calls.
///
/// # Safety
/// `calls` is the beginning of n readable descriptors `stride` bytes apart, or null; each adapter is null or a
/// live handle.
pub(super) unsafe fn call_adapters<'a>(
    calls: *const Call,
    stride: usize,
    n: i64,
) -> Result<ArrayVec<&'a adapter::Adapter, MAX_GROUP>> {
    group_size(n)?;
    // SAFETY: as this function asks.
    unsafe { array(calls, stride, n, "calls") }?
        .enumerate()
        // SAFETY: as this function asks.
        .map(|(i, call)| unsafe { call_adapter(call?.adapter) }.at_index("calls", i))
        .collect()
}

/// The shares of a forward or backward pass: what the direction and stages read, and nothing else.
///
/// They are put where they stay: returned, room for the largest group would be copied at every call.
///
/// # Safety
/// As [`call_adapters`].
pub(super) unsafe fn calls<'a>(
    calls: *const Call,
    stride: usize,
    n: i64,
    direction: Direction,
    stages: Stages,
    shares: &mut ArrayVec<RawCall<'a>, MAX_GROUP>,
) -> Result<()> {
    group_size(n)?;
    // SAFETY: as this function asks.
    for (i, call) in unsafe { array(calls, stride, n, "calls") }?.enumerate() {
        let call = call?;
        // SAFETY: as this function asks.
        shares.push(unsafe { share(&call, direction, stages) }.at_index("calls", i)?);
    }
    Ok(())
}

/// # Safety
/// The adapter is null or a live handle.
unsafe fn share<'a>(call: &Call, direction: Direction, stages: Stages) -> Result<RawCall<'a>> {
    // SAFETY: as this function asks.
    let adapter = unsafe { call_adapter(call.adapter) }?;
    let backward = direction == Direction::Backward;
    let output = match direction {
        Direction::Forward => stages.expand.then_some((&call.y, "y")),
        Direction::Backward => stages.project.then_some((&call.dy, "dy")),
    };
    let placed = !call.dropout.seed.is_null() && !call.dropout.offset.is_null();
    Ok(RawCall {
        adapter,
        params: checked_triplets(&call.params, PARAMS)?,
        grads: if backward { Some(checked_triplets(&call.grads, GRADS)?) } else { None },
        scaling: call.scaling,
        output: output.map(|(m, name)| checked_matrix(m, name)).transpose()?,
        h: optional_address(call.h),
        g: if backward { optional_address(call.g) } else { None },
        pattern: optional_address(call.pattern),
        dropout: placed.then(|| DropoutPlace {
            seed: address(call.dropout.seed),
            offset: address(call.dropout.offset),
            token0: call.dropout.token0,
        }),
    })
}

/// What an allocator is made of.
///
/// # Safety
/// `desc` is null or the beginning of a readable descriptor, whose array holds as many live handles as it says.
pub(super) unsafe fn allocator_config<'a>(desc: *const AllocatorDesc) -> Result<(Config, Vec<&'a adapter::Adapter>)> {
    // SAFETY: as this function asks.
    let d = unsafe { descriptor(desc, "desc") }?;
    let n =
        usize::try_from(d.n_adapters).ok().filter(|n| (1..=allocator::MAX_ADAPTERS).contains(n)).ok_or_else(|| {
            Error::argument("desc.n_adapters", d.n_adapters, format_args!("1 to {}", allocator::MAX_ADAPTERS))
        })?;
    if d.adapters.is_null() {
        return Err(Error::argument("desc.adapters", "NULL", format_args!("the address of {n} handles")));
    }
    let unit = match d.budget_unit {
        0 | ADALORA_BUDGET_TRIPLETS => BudgetUnit::Triplets,
        ADALORA_BUDGET_PARAMETERS => BudgetUnit::Parameters,
        other => {
            return Err(Error::argument(
                "desc.budget_unit",
                other,
                "ADALORA_BUDGET_TRIPLETS or ADALORA_BUDGET_PARAMETERS (1 or 2), or 0 for triplets",
            ));
        }
    };
    let config = Config {
        target_rank: d.target_rank,
        tinit: d.tinit,
        tfinal: d.tfinal,
        total_step: d.total_step,
        delta_t: d.delta_t,
        beta1: d.beta1,
        beta2: d.beta2,
        unit,
        sharded: flag(d.sharded, "desc.sharded")?,
    };
    let mut adapters = reserve(n, "adapters")?;
    for i in 0..n {
        // SAFETY: the array holds n handles, as this function asks; it may lie at any address.
        let handle = unsafe { d.adapters.wrapping_add(i).read_unaligned() };
        // SAFETY: null or a live handle, as this function asks.
        adapters.push(unsafe { call_adapter(handle) }.map_err(|e| e.at(format_args!("desc.adapters[{i}]")))?);
    }
    Ok((config, adapters))
}

/// Slices to be bound.
///
/// # Safety
/// `from` is the beginning of n readable descriptors `stride` bytes apart, or null.
pub(super) unsafe fn slices(from: *const Slice, stride: usize, n: i64) -> Result<Vec<SliceSource>> {
    // SAFETY: as this function asks.
    let descriptors = unsafe { array(from, stride, n, "slices") }?;
    let mut list = reserve(count(n, "number of slices")?, "slices")?;
    for (i, slice) in descriptors.enumerate() {
        list.push(slice_source(&slice?).at_index("slices", i)?);
    }
    Ok(list)
}

fn slice_source(s: &Slice) -> Result<SliceSource> {
    let factor = match s.matrix {
        ADALORA_MATRIX_A => Factor::A,
        ADALORA_MATRIX_E => Factor::E,
        ADALORA_MATRIX_B => Factor::B,
        other => {
            return Err(Error::argument("matrix", other, "ADALORA_MATRIX_A, _E or _B (1, 2 or 3)"));
        }
    };
    reserved(s.reserved, "reserved")?;
    let code = |code: i32, name: &str| if code == 0 { Ok(None) } else { dtype(code, name).map(Some) };
    Ok(SliceSource {
        adapter: s.adapter,
        factor,
        begin: s.begin,
        end: s.end,
        hyper: s.hyper,
        p_dtype: code(s.p_dtype, "p_dtype")?,
        g_dtype: code(s.g_dtype, "g_dtype")?,
        replica: flag(s.replica, "replica")?,
        p: address(s.p),
        p_low: optional_address(s.p_low),
        g: address(s.g),
        m: optional_address(s.m),
        v: optional_address(s.v),
        exp_avg_ipt: address(s.exp_avg_ipt),
        exp_avg_unc: address(s.exp_avg_unc),
    })
}

/// Hyperparameters to be bound.
///
/// # Safety
/// `from` is the beginning of n readable descriptors `stride` bytes apart, or null.
pub(super) unsafe fn hypers(from: *const Hyper, stride: usize, n: i64) -> Result<Vec<HyperSource>> {
    // SAFETY: as this function asks.
    let descriptors = unsafe { array(from, stride, n, "hypers") }?;
    let mut list = reserve(count(n, "number of hypers")?, "hypers")?;
    for (i, hyper) in descriptors.enumerate() {
        let h = hyper?;
        let source = || {
            Ok(HyperSource {
                lr: one(h.lr, "lr")?,
                weight_decay: one(h.weight_decay, "weight_decay")?,
                beta1: h.beta1,
                beta2: h.beta2,
                eps: h.eps,
            })
        };
        list.push(source().at_index("hypers", i)?);
    }
    Ok(list)
}

/// What changes from step to step.
///
/// # Safety
/// `from` is null or the beginning of a readable descriptor.
pub(super) unsafe fn step(from: *const Step) -> Result<StepSource> {
    // SAFETY: as this function asks.
    let s = unsafe { descriptor(from, "step") }?;
    Ok(StepSource {
        step: one(s.step, "step.step")?,
        grad_factor: one_or_null(s.grad_factor, "step.grad_factor")?,
        found_inf: one_or_null(s.found_inf, "step.found_inf")?,
        has_grad: optional_address(s.has_grad),
    })
}

/// The size of the caller's report, or nothing where none is wanted.
///
/// # Safety
/// `report` is null or the beginning of a report that holds its size.
pub(super) unsafe fn report_size(report: *const Report) -> Result<Option<usize>> {
    if report.is_null() {
        return Ok(None);
    }
    // SAFETY: as this function asks.
    unsafe { descriptor_size(report, "report") }.map(Some)
}

/// Fills as much of the caller's structure as there is, but for its size.
///
/// # Safety
/// `to` is null or the beginning of a writable structure that holds its size.
pub(super) unsafe fn write_descriptor<T: Descriptor>(to: *mut T, name: &str, value: T) -> Result<()> {
    // SAFETY: as this function asks.
    let size = unsafe { descriptor_size(to, name) }?.min(size_of::<T>());
    let head = size_of::<usize>();
    // SAFETY: no more than the caller's room and than our value; the size comes first and stays.
    unsafe {
        let from = (&raw const value).cast::<u8>().add(head);
        to.cast::<u8>().add(head).copy_from_nonoverlapping(from, size - head);
    }
    Ok(())
}

/// Fills as much of the caller's report as there is.
///
/// # Safety
/// `to` has room for `size` bytes.
pub(super) unsafe fn write_report(to: *mut Report, size: Option<usize>, counters: &Counters) {
    let Some(size) = size else { return };
    let report = Report {
        struct_size: size,
        last_step: counters.last_step,
        skipped: counters.skipped,
        irregular: counters.irregular,
        selections: counters.selections,
        budget: counters.budget,
        live_triplets: counters.live_triplets,
        live_parameters: counters.live_parameters,
        has_pattern: i32::from(counters.has_pattern),
        is_final: i32::from(counters.is_final),
    };
    // SAFETY: no more than the caller's room and than our report.
    unsafe {
        to.cast::<u8>().copy_from_nonoverlapping((&raw const report).cast(), size.min(size_of::<Report>()));
    }
}

const _: () = assert!(ALIGNMENT == 64, "the documentation says 64");
