//! `adalora_checkpoint_t`: adapters in PEFT's files, and training state beside them.

use super::guard::{Handle, Kind, copy_out, guard, guard_void, output, required};
use super::read::{self, PARAMS};
use super::types::*;
use crate::adapter::RawTriplets;
use crate::checkpoint::adapters::{Matrix, MatrixMut, Source};
use crate::checkpoint::tensors::{self, Entry, MOST_DIMENSIONS, TensorFile, stored};
use crate::checkpoint::{self, Save};
use crate::error::{At, Code, Error, Result, reserve};
use crate::tensor::{self, Vector, disjoint};
use std::ffi::{CStr, OsStr, c_char, c_void};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::ptr::NonNull;

/// A checkpoint that was opened to be read. May be used from any thread, by several at once.
pub struct Checkpoint(pub(super) Handle<checkpoint::Checkpoint>);

/// Writes a checkpoint: the adapter's files (`adapter_config.json`, `adapter_model.safetensors`), which PEFT reads, and
/// the training state beside them (`training_state.safetensors`), or either.
///
/// Files are replaced together: each is written beside its place and brought to the disk first. A process that dies in
/// between leaves the old files, or, where several change, a folder without `adapter_config.json`, which nobody loads; it
/// never leaves files of two checkpoints that look like one. Gradients are not part of a checkpoint: write between steps.
///
/// @param desc What to write, in host memory.
/// @return `ADALORA_ERROR_INVALID_ARGUMENT` names what does not fit. `ADALORA_ERROR_IO`: the files are as they were.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_checkpoint_write(desc: *const CheckpointDesc) -> Status {
    guard("adalora_checkpoint_write", || {
        // SAFETY: the caller passes a readable descriptor, of readable arrays, or null, as the documentation asks.
        checkpoint::save(unsafe { contents(desc) }?)
    })
}

/// Writes adapters as plain LoRA, for programs that know no AdaLoRA: E and the scaling go into B, each element rounded
/// once, and the same outputs come out.
///
/// All adapters get one rank, the largest number of triplets whose E is not 0, filled up with zeros, and `lora_alpha` is
/// the rank, so that the multiplier is 1. A is written as it is. Half precision becomes float32, in which the product has
/// room. The configuration's fields of AdaLoRA are left out.
///
/// @param desc As in `adalora_checkpoint_write`; `state` must be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_checkpoint_export_lora(desc: *const CheckpointDesc) -> Status {
    guard("adalora_checkpoint_export_lora", || {
        // SAFETY: the caller passes a readable descriptor, of readable arrays, or null, as the documentation asks.
        checkpoint::export_lora(unsafe { contents(desc) }?)
    })
}

/// Opens a checkpoint that this library or PEFT wrote, and checks it: the configuration, the header of each file of
/// tensors, the shapes of all adapters. Tensors are read later, from the files as they were now, also where others take
/// their places meanwhile.
///
/// The files are not trusted. No name in them becomes a path; what is allocated is bounded by the size of header and
/// configuration, which may have 16 MiB each.
///
/// @param folder Where the files are.
/// @param files `ADALORA_FILES_ADAPTER`, `ADALORA_FILES_STATE` or `ADALORA_FILES_ALL`.
/// @param checkpoint Receives the handle; written on success alone. Destroy it by `adalora_checkpoint_destroy`.
/// @return `ADALORA_ERROR_NOT_FOUND` where a file is not there; `ADALORA_ERROR_CORRUPT_DATA` for a damaged one;
/// `ADALORA_ERROR_INVALID_ARGUMENT` where the files do not fit together, or are not of AdaLoRA: those of
/// `adalora_checkpoint_export_lora` are LoRA's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_checkpoint_open(
    folder: *const c_char,
    files: i32,
    checkpoint: Option<&mut MaybeUninit<*mut Checkpoint>>,
) -> Status {
    guard("adalora_checkpoint_open", || {
        let slot = output(checkpoint, "checkpoint")?;
        // SAFETY: the caller passes a zero-terminated text or null, as the documentation asks.
        let folder = unsafe { path(folder, "folder") }?;
        if !(ADALORA_FILES_ADAPTER..=ADALORA_FILES_ALL).contains(&files) {
            return Err(Error::argument("files", files, "ADALORA_FILES_ADAPTER, _STATE or _ALL (1, 2 or 3)"));
        }
        let object = checkpoint::Checkpoint::open(
            &folder,
            files & ADALORA_FILES_ADAPTER != 0,
            files & ADALORA_FILES_STATE != 0,
        )?;
        slot.write(Box::into_raw(Box::new(Checkpoint(Handle::new(Kind::Checkpoint, object)))));
        Ok(())
    })
}

/// Destroys a checkpoint; NULL is nothing. The files stay.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_checkpoint_destroy(checkpoint: Option<NonNull<Checkpoint>>) {
    // SAFETY: the caller gives up the handle; its kind is checked before it is freed.
    guard_void("adalora_checkpoint_destroy", || unsafe {
        super::guard::destroy(checkpoint, Kind::Checkpoint, "checkpoint", |c| &c.0)
    });
}

/// The text of `adapter_config.json`, or the one that was written with the training state.
///
/// @param files `ADALORA_FILES_ADAPTER` or `ADALORA_FILES_STATE`.
/// @param text Receives it, ended by a zero byte; NULL to ask for the size alone.
/// @param bytes In: the room at `text`. Out: the bytes needed, the zero byte included, also where the room is too
/// small.
/// @return `ADALORA_ERROR_INVALID_STATE` where the checkpoint was opened without the files;
/// `ADALORA_ERROR_INVALID_ARGUMENT` where the room is too small; then `text` is not written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_checkpoint_text(
    checkpoint: Option<&Checkpoint>,
    files: i32,
    text: *mut c_char,
    bytes: Option<&mut usize>,
) -> Status {
    guard("adalora_checkpoint_text", || {
        let checkpoint = required(checkpoint, "checkpoint")?.0.get(Kind::Checkpoint, "checkpoint")?;
        let found = match part(files)? {
            Part::Adapter => &checkpoint.adapter()?.config,
            Part::State => checkpoint.state_text()?,
        };
        // SAFETY: `text` has room for `*bytes` bytes or is null, as the documentation asks.
        unsafe { copy_out(found.as_bytes(), true, text.cast(), bytes, ["text", "bytes"]) }
    })
}

/// How much there is in files.
///
/// @param files `ADALORA_FILES_ADAPTER` or `ADALORA_FILES_STATE`.
/// @param n_adapters Receives the number of adapters, 0 for the training state; may be NULL.
/// @param n_tensors Receives the number of tensors that belong to no adapter; may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_checkpoint_sizes(
    checkpoint: Option<&Checkpoint>,
    files: i32,
    n_adapters: Option<&mut MaybeUninit<i64>>,
    n_tensors: Option<&mut MaybeUninit<i64>>,
) -> Status {
    guard("adalora_checkpoint_sizes", || {
        let checkpoint = required(checkpoint, "checkpoint")?.0.get(Kind::Checkpoint, "checkpoint")?;
        let (adapters, tensors) = match part(files)? {
            Part::Adapter => {
                let adapter = checkpoint.adapter()?;
                (adapter.adapters.len(), adapter.beside.len())
            }
            Part::State => (0, checkpoint.state()?.tensors().len()),
        };
        n_adapters.map(|n| n.write(adapters as i64));
        n_tensors.map(|n| n.write(tensors as i64));
        Ok(())
    })
}

/// What an adapter in the checkpoint is.
///
/// @param index 0 or more: adapters are in the order of their names.
/// @param adapter Receives it; its `struct_size` is set by the caller. What it points to lives as long as the
/// checkpoint.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_checkpoint_adapter(
    checkpoint: Option<&Checkpoint>,
    index: i64,
    adapter: *mut AdapterInfo,
) -> Status {
    guard("adalora_checkpoint_adapter", || {
        let checkpoint = required(checkpoint, "checkpoint")?.0.get(Kind::Checkpoint, "checkpoint")?;
        let found = element(&checkpoint.adapter()?.adapters, index)?;
        let [a_dtype, e_dtype, b_dtype] = found.dtypes.map(|dtype| code(stored(dtype)));
        let info = AdapterInfo {
            struct_size: 0,
            name: found.name_for_c(),
            pattern: found.pattern.as_ref().map_or(std::ptr::null(), |pattern| pattern.as_ptr()),
            rank: found.rank as i64,
            kept: found.kept as i64,
            in_features: found.in_features as i64,
            out_features: found.out_features as i64,
            a_dtype,
            e_dtype,
            b_dtype,
            reserved: 0,
        };
        // SAFETY: the caller passes a writable structure that begins with its size, or null, as the documentation asks.
        unsafe { read::write_descriptor(adapter, "adapter", info) }
    })
}

/// Reads an adapter's triplets into host memory, converted to the types that are wanted, to the nearest.
///
/// @param index As in `adalora_checkpoint_adapter`.
/// @param params Receives them. With room for `rank` triplets each comes to its place, and zeros where the file holds
/// none; with room for `kept` of them, those of the file come alone.
/// @return `ADALORA_ERROR_INCOMPLETE` where the file could not be read to the end: `params` are undefined.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_checkpoint_read_adapter(
    checkpoint: Option<&Checkpoint>,
    index: i64,
    params: *const Triplets,
) -> Status {
    guard("adalora_checkpoint_read_adapter", || {
        let checkpoint = required(checkpoint, "checkpoint")?.0.get(Kind::Checkpoint, "checkpoint")?;
        let adapter = checkpoint.adapter()?;
        let found = element(&adapter.adapters, index)?;
        // SAFETY: the caller passes readable triplets or null, as the documentation asks.
        let RawTriplets { a, e, b } = unsafe { read::triplets(params, "params") }?;
        let e = column(&e)?;
        let places = [(PARAMS[0], a.region()), (PARAMS[1], e.region()), (PARAMS[2], b.region())];
        disjoint(&places, &[])?;
        // SAFETY: writable, as the documentation asks, and nobody else's during the call.
        let [a, e, b] = [a, e, b].map(|matrix| unsafe { writable(matrix) });
        found.read(&adapter.file, a, e, b)
    })
}

/// What a tensor in the checkpoint is.
///
/// @param files `ADALORA_FILES_ADAPTER`, for those that belong to no adapter, or `ADALORA_FILES_STATE`.
/// @param index 0 or more: tensors are in the order of their names.
/// @param tensor Receives it; its `struct_size` is set by the caller. What it points to lives as long as the
/// checkpoint.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_checkpoint_tensor(
    checkpoint: Option<&Checkpoint>,
    files: i32,
    index: i64,
    tensor: *mut Tensor,
) -> Status {
    guard("adalora_checkpoint_tensor", || {
        let checkpoint = required(checkpoint, "checkpoint")?.0.get(Kind::Checkpoint, "checkpoint")?;
        let (_, found) = tensor_at(checkpoint, files, index)?;
        let info = Tensor {
            struct_size: 0,
            name: found.name_for_c(),
            data: std::ptr::null(),
            shape: found.shape.as_ptr(),
            n_dims: found.shape.len() as i64,
            bytes: found.bytes,
            dtype: code(found.dtype),
            reserved: 0,
        };
        // SAFETY: the caller passes a writable structure that begins with its size, or null, as the documentation asks.
        unsafe { read::write_descriptor(tensor, "tensor", info) }
    })
}

/// Reads a tensor's elements as they are in the file, row-major and without gaps.
///
/// @param files As in `adalora_checkpoint_tensor`.
/// @param index As in `adalora_checkpoint_tensor`.
/// @param data Receives them, in host memory; may be NULL where there is none.
/// @param bytes Room at `data`: the tensor's bytes.
/// @return `ADALORA_ERROR_INCOMPLETE` where the file could not be read to the end: `data` is undefined.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn adalora_checkpoint_read_tensor(
    checkpoint: Option<&Checkpoint>,
    files: i32,
    index: i64,
    data: *mut c_void,
    bytes: usize,
) -> Status {
    guard("adalora_checkpoint_read_tensor", || {
        let checkpoint = required(checkpoint, "checkpoint")?.0.get(Kind::Checkpoint, "checkpoint")?;
        let (file, found) = tensor_at(checkpoint, files, index)?;
        if bytes != found.bytes {
            return Err(Error::argument("bytes", bytes, format_args!("the tensor's, {}", found.bytes)));
        }
        if bytes == 0 {
            return Ok(());
        }
        read::one(data.cast::<u8>(), "data")?;
        // SAFETY: writable, as the documentation asks, and nobody else's during the call; what is there is overwritten
        // before it is read.
        let to = unsafe { std::slice::from_raw_parts_mut(data.cast::<u8>(), bytes) };
        let read = file.read(found, 0, to);
        read.map_err(|error| Error::new(Code::Incomplete, format!("data is undefined: {}", error.message)))
    })
}

enum Part {
    Adapter,
    State,
}

fn part(files: i32) -> Result<Part> {
    match files {
        ADALORA_FILES_ADAPTER => Ok(Part::Adapter),
        ADALORA_FILES_STATE => Ok(Part::State),
        _ => Err(Error::argument("files", files, "ADALORA_FILES_ADAPTER or ADALORA_FILES_STATE (1 or 2)")),
    }
}

fn element<T>(list: &[T], index: i64) -> Result<&T> {
    let at = usize::try_from(index).ok();
    at.and_then(|i| list.get(i)).ok_or_else(|| match list.len() {
        0 => Error::argument("index", index, "none: there is nothing"),
        n => Error::argument("index", index, format_args!("0 to {}", n - 1)),
    })
}

fn tensor_at(c: &checkpoint::Checkpoint, files: i32, index: i64) -> Result<(&TensorFile, &tensors::Tensor)> {
    match part(files)? {
        Part::Adapter => {
            let adapter = c.adapter()?;
            let i = *element(&adapter.beside, index)?;
            Ok((&adapter.file, element(adapter.file.tensors(), i as i64)?))
        }
        Part::State => {
            let state = c.state()?;
            Ok((state, element(state.tensors(), index)?))
        }
    }
}

/// Types of tensors, each with its code.
const CODES: [(i32, tensors::Dtype); 19] = [
    (ADALORA_FLOAT32, tensors::Dtype::F32),
    (ADALORA_FLOAT64, tensors::Dtype::F64),
    (ADALORA_BFLOAT16, tensors::Dtype::BF16),
    (ADALORA_FLOAT16, tensors::Dtype::F16),
    (ADALORA_BOOL, tensors::Dtype::BOOL),
    (ADALORA_UINT8, tensors::Dtype::U8),
    (ADALORA_INT8, tensors::Dtype::I8),
    (ADALORA_UINT16, tensors::Dtype::U16),
    (ADALORA_INT16, tensors::Dtype::I16),
    (ADALORA_UINT32, tensors::Dtype::U32),
    (ADALORA_INT32, tensors::Dtype::I32),
    (ADALORA_UINT64, tensors::Dtype::U64),
    (ADALORA_INT64, tensors::Dtype::I64),
    (ADALORA_COMPLEX64, tensors::Dtype::C64),
    (ADALORA_FLOAT8_E4M3FN, tensors::Dtype::F8_E4M3),
    (ADALORA_FLOAT8_E5M2, tensors::Dtype::F8_E5M2),
    (ADALORA_FLOAT8_E8M0FNU, tensors::Dtype::F8_E8M0),
    (ADALORA_FLOAT8_E4M3FNUZ, tensors::Dtype::F8_E4M3FNUZ),
    (ADALORA_FLOAT8_E5M2FNUZ, tensors::Dtype::F8_E5M2FNUZ),
];

/// The code of a type that a file was found to hold, which has one.
fn code(dtype: tensors::Dtype) -> i32 {
    CODES.iter().find(|(_, each)| *each == dtype).map_or(0, |(code, _)| *code)
}

/// A text.
///
/// # Safety
/// `from` is zero-terminated, or null.
unsafe fn text<'a>(from: *const c_char, name: &str) -> Result<&'a str> {
    if from.is_null() {
        return Err(Error::argument(name, "NULL", "a text"));
    }
    // SAFETY: as this function asks.
    let bytes = unsafe { CStr::from_ptr(from) };
    bytes.to_str().map_err(|e| Error::argument(name, format_args!("what is no UTF-8 ({e})"), "a text"))
}

/// A text, or nothing.
///
/// # Safety
/// As [`text`].
unsafe fn optional_text<'a>(from: *const c_char, name: &str) -> Result<Option<&'a str>> {
    // SAFETY: as this function asks.
    (!from.is_null()).then(|| unsafe { text(from, name) }).transpose()
}

/// A path.
///
/// # Safety
/// As [`text`].
unsafe fn path(from: *const c_char, name: &str) -> Result<PathBuf> {
    if from.is_null() {
        return Err(Error::argument(name, "NULL", "a path"));
    }
    // SAFETY: as this function asks.
    let bytes = unsafe { CStr::from_ptr(from) }.to_bytes();
    if bytes.is_empty() {
        return Err(Error::argument(name, "an empty text", "a path"));
    }
    Ok(PathBuf::from(OsStr::from_bytes(bytes)))
}

/// Everything that a checkpoint is made of.
///
/// # Safety
/// `desc` is null or the beginning of a readable descriptor; so are the elements of its arrays, and all that they point
/// to is readable during the call.
unsafe fn contents<'a>(desc: *const CheckpointDesc) -> Result<Save<'a>> {
    // SAFETY: as this function asks.
    let d = unsafe { read::descriptor(desc, "desc") }?;
    // SAFETY: as this function asks.
    let (folder, config, state) = unsafe {
        (path(d.folder, "desc.folder")?, optional_text(d.config, "desc.config")?, optional_text(d.state, "desc.state")?)
    };
    let mut adapters = reserve(read::count(d.n_adapters, "desc.n_adapters")?, "adapters")?;
    // SAFETY: as this function asks.
    for (i, entry) in unsafe { read::array(d.adapters, d.adapter_stride, d.n_adapters, "adapters") }?.enumerate() {
        let entry = entry?;
        // SAFETY: as this function asks.
        adapters.push(unsafe { source(&entry) }.at_index("adapters", i)?);
    }
    // SAFETY: as this function asks.
    let (tensors, state_tensors) = unsafe {
        (
            entries(d.tensors, d.tensor_stride, d.n_tensors, "tensors")?,
            entries(d.state_tensors, d.state_tensor_stride, d.n_state_tensors, "state_tensors")?,
        )
    };
    let state = match state {
        Some(text) => Some((text, state_tensors)),
        None if state_tensors.is_empty() => None,
        None => return Err(Error::argument("desc.state", "NULL", "a text, since there are state_tensors")),
    };
    Ok(Save { folder, config, adapters, tensors, state })
}

/// # Safety
/// As [`contents`].
unsafe fn source<'a>(d: &AdapterEntry) -> Result<Source<'a>> {
    // SAFETY: as this function asks.
    let name = unsafe { text(d.name, "name") }?;
    if name.is_empty() {
        return Err(Error::argument("name", "an empty text", "the path of a module"));
    }
    let rank = read::count(d.rank, "rank")?;
    let RawTriplets { a, e, b } = read::checked_triplets(&d.params, PARAMS)?;
    let e = column(&e)?;
    let pattern = match d.pattern.is_null() {
        true => None,
        // SAFETY: as this function asks.
        false => Some(unsafe { read::bytes(d.pattern.cast(), rank, "pattern") }?),
    };
    if !d.scaling.is_finite() {
        return Err(Error::argument("scaling", d.scaling, "a finite number, or 0 for the configuration's"));
    }
    // SAFETY: as this function asks.
    let kernel = unsafe { extents(d.kernel, d.n_kernel, 3, ["kernel", "n_kernel"]) }?;
    // SAFETY: as this function asks.
    let (a, e, b) = unsafe { (readable(a), readable(e), readable(b)) };
    let embedding = read::flag(d.embedding, "embedding")?;
    read::reserved(d.reserved, "reserved")?;
    Ok(Source { name: name.to_owned(), rank, a, e, b, pattern, scaling: d.scaling, kernel, embedding })
}

/// # Safety
/// As [`contents`].
unsafe fn entries<'a>(from: *const Tensor, stride: usize, n: i64, name: &'static str) -> Result<Vec<Entry<'a>>> {
    let mut list = reserve(read::count(n, format_args!("number of {name}"))?, "tensors")?;
    // SAFETY: as this function asks.
    for (i, tensor) in unsafe { read::array(from, stride, n, name) }?.enumerate() {
        let tensor = tensor?;
        // SAFETY: as this function asks.
        list.push(unsafe { entry(&tensor) }.at_index(name, i)?);
    }
    Ok(list)
}

/// # Safety
/// As [`contents`].
unsafe fn entry<'a>(d: &Tensor) -> Result<Entry<'a>> {
    // SAFETY: as this function asks.
    let name = unsafe { text(d.name, "name") }?;
    let known = CODES.iter().find(|(code, _)| *code == d.dtype);
    let (_, dtype) = known.ok_or_else(|| Error::argument("dtype", d.dtype, "one of the ADALORA_* types, 1 to 19"))?;
    read::reserved(d.reserved, "reserved")?;
    // SAFETY: as this function asks.
    let shape = unsafe { extents(d.shape, d.n_dims, MOST_DIMENSIONS, ["shape", "n_dims"]) }?;
    let bytes = tensors::bytes_of(*dtype, &shape)
        .ok_or_else(|| Error::argument("shape", format_args!("{shape:?}"), "one that fits memory"))?;
    if d.bytes != 0 && d.bytes != bytes {
        return Err(Error::argument("bytes", d.bytes, format_args!("0, or {bytes} as shape and type say")));
    }
    // SAFETY: as this function asks.
    let data = unsafe { read::bytes(d.data, bytes, "data") }?;
    Ok(Entry { name: name.to_owned(), dtype: *dtype, shape, content: checkpoint::borrowed(data) })
}

/// # Safety
/// `from` is the beginning of `n` readable numbers, or null.
unsafe fn extents(from: *const i64, n: i64, most: usize, [name, count]: [&str; 2]) -> Result<Vec<usize>> {
    let n = read::count(n, count)?;
    if n > most {
        return Err(Error::argument(count, n, format_args!("0 to {most}")));
    }
    if n == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: as this function asks.
    let values = unsafe { read::values(from, n, name) }?;
    values.iter().enumerate().map(|(i, value)| read::count(*value, format_args!("{name}[{i}]"))).collect()
}

/// E as a column.
fn column(e: &tensor::Matrix) -> Result<tensor::Matrix> {
    let vector = Vector::from_matrix(e, e.rows.max(e.columns).min(e.rows * e.columns))
        .ok_or_else(|| Error::argument(PARAMS[1], format_args!("[{}, {}]", e.rows, e.columns), "a vector"))?;
    Ok(tensor::Matrix { rows: vector.length, columns: 1, row_stride: vector.stride, ..*e })
}

/// The address of a row, and its bytes.
fn row_at(matrix: &tensor::Matrix, i: usize) -> (usize, usize) {
    assert!(i < matrix.rows);
    let size = matrix.dtype.size();
    (matrix.data.0 + i * matrix.row_stride * size, matrix.columns * size)
}

/// # Safety
/// The matrix's rows are readable for `'a`.
unsafe fn readable<'a>(matrix: tensor::Matrix) -> Matrix<'a> {
    let tensor::Matrix { rows, columns, dtype, .. } = matrix;
    let row = move |i| match row_at(&matrix, i) {
        (_, 0) => [].as_slice(),
        // SAFETY: as this function asks; any bytes are valid.
        (at, bytes) => unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(at), bytes) },
    };
    Matrix { rows, columns, dtype, row: Box::new(row) }
}

/// # Safety
/// The matrix's rows are writable for `'a`, and are not read or written by others.
unsafe fn writable<'a>(matrix: tensor::Matrix) -> MatrixMut<'a> {
    let tensor::Matrix { rows, columns, dtype, .. } = matrix;
    let write_row = move |i, values: &[u8]| {
        let (at, bytes) = row_at(&matrix, i);
        assert!(values.len() == bytes);
        if bytes > 0 {
            // SAFETY: as this function asks; the values are ours, and not in the caller's memory.
            unsafe {
                std::ptr::with_exposed_provenance_mut::<u8>(at).copy_from_nonoverlapping(values.as_ptr(), bytes);
            }
        }
    };
    MatrixMut { rows, columns, dtype, write_row: Box::new(write_row) }
}
