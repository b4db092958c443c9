//! The triplets of an adapter in a file: rows of `lora_A` and of the column `lora_E`, columns of `lora_B`, for those
//! that the rank pattern keeps.

use super::config::Config;
use super::tensors::{Content, Entry, Tensor, TensorFile, computed, stored};
use crate::adapter::MAX_FEATURES;
use crate::error::{Code, Error, Result, reserve};
use crate::rounding;
use crate::tensor::Dtype;
use half::{bf16, f16};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

/// PEFT's paths begin at its wrapper of the model.
pub(crate) const PREFIX: &str = "base_model.model.";
/// Bytes that are read at once, unless a row has more.
const CHUNK: usize = 1 << 18;

/// An element as a number.
fn decode(bytes: &[u8], dtype: Dtype) -> f64 {
    match (dtype, bytes) {
        (Dtype::Float64, &[a, b, c, d, e, f, g, h]) => f64::from_le_bytes([a, b, c, d, e, f, g, h]),
        (Dtype::Float32, &[a, b, c, d]) => f64::from(f32::from_le_bytes([a, b, c, d])),
        (Dtype::Bfloat16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f64(),
        (Dtype::Float16, &[a, b]) => f16::from_le_bytes([a, b]).to_f64(),
        _ => unreachable!("an element of {dtype} has {} bytes", dtype.size()),
    }
}

/// A number as an element, rounded to the nearest.
pub(super) fn encode(value: f64, dtype: Dtype, to: &mut [u8]) {
    match dtype {
        Dtype::Float64 => to.copy_from_slice(&value.to_le_bytes()),
        Dtype::Float32 => to.copy_from_slice(&(value as f32).to_le_bytes()),
        Dtype::Bfloat16 => to.copy_from_slice(&rounding::to_bf16(value).to_le_bytes()),
        Dtype::Float16 => to.copy_from_slice(&rounding::to_f16(value).to_le_bytes()),
    }
}

fn convert(from: &[u8], from_type: Dtype, to: &mut [u8], to_type: Dtype) {
    if from_type == to_type {
        return to.copy_from_slice(from);
    }
    for (from, to) in from.chunks_exact(from_type.size()).zip(to.chunks_exact_mut(to_type.size())) {
        encode(decode(from, from_type), to_type, to);
    }
}

/// A matrix in the caller's memory, to be read.
pub struct Matrix<'a> {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub columns: usize,
    /// Element type.
    pub dtype: Dtype,
    /// The bytes of a row.
    pub row: Box<dyn Fn(usize) -> &'a [u8] + 'a>,
}

impl Matrix<'_> {
    /// A row in another type.
    pub fn read(&self, i: usize, dtype: Dtype, to: &mut [u8]) {
        convert((self.row)(i), self.dtype, to, dtype);
    }

    /// An element.
    pub fn value(&self, i: usize, k: usize) -> f64 {
        let size = self.dtype.size();
        decode(&(self.row)(i)[k * size..][..size], self.dtype)
    }
}

/// Takes the number of a row and its bytes.
pub type WriteRow<'a> = Box<dyn FnMut(usize, &[u8]) + 'a>;

/// A matrix in the caller's memory, to be written.
pub struct MatrixMut<'a> {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub columns: usize,
    /// Element type.
    pub dtype: Dtype,
    /// Writes a row.
    pub write_row: WriteRow<'a>,
}

/// An adapter to write.
pub struct Source<'a> {
    /// Path of its module in the model.
    pub name: String,
    /// Triplets at creation.
    pub rank: usize,
    /// Right vectors: `rank` or kept rows.
    pub a: Matrix<'a>,
    /// Values: a column.
    pub e: Matrix<'a>,
    /// Left vectors: `rank` or kept columns.
    pub b: Matrix<'a>,
    /// Of `rank` triplets, not 0 where one is kept; `None`: all are.
    pub pattern: Option<&'a [u8]>,
    /// Multiplier of the output; 0: what the configuration says.
    pub scaling: f64,
    /// Extents of a convolution's kernel.
    pub kernel: Vec<usize>,
    /// Whether the module is an embedding.
    pub embedding: bool,
}

impl Source<'_> {
    /// Triplets that are kept.
    fn kept(&self) -> usize {
        self.pattern.map_or(self.rank, |pattern| pattern.iter().filter(|kept| **kept != 0).count())
    }

    /// Checks the shapes, and that nothing is lost with the triplets that are not kept.
    fn check(&self) -> Result<()> {
        let (held, kept) = (self.e.rows, self.kept());
        let shape = |m: &Matrix| format!("[{}, {}]", m.rows, m.columns);
        if held != self.rank && held != kept {
            let expected = match self.pattern {
                Some(_) => format!("all {} triplets, or the {kept} that the pattern keeps", self.rank),
                None => format!("rank, {}", self.rank),
            };
            return Err(Error::argument("params.E", held, expected));
        }
        if self.a.rows != held {
            return Err(Error::argument("params.A", shape(&self.a), format_args!("{held} rows, as E has")));
        }
        if self.b.columns != held {
            return Err(Error::argument("params.B", shape(&self.b), format_args!("{held} columns, as E has")));
        }
        if let (Some(pattern), true) = (self.pattern, held != kept) {
            let lost = (0..held).find(|i| pattern[*i] == 0 && self.e.value(*i, 0) != 0.0);
            if let Some(i) = lost {
                let found = format!("0 for triplet {i}, whose E is {}", self.e.value(i, 0));
                return Err(Error::argument("pattern", found, "1, or E of 0: the file would compute something else"));
            }
        }
        Ok(())
    }

    /// Row of A and value of E of each kept triplet.
    pub fn kept_rows(&self) -> Result<Vec<(usize, f64)>> {
        self.check()?;
        let mut rows = reserve(self.e.rows, "triplets")?;
        let cut = self.pattern.filter(|_| self.e.rows != self.kept());
        let is_kept = |i: &usize| cut.is_none_or(|pattern| pattern[*i] != 0);
        rows.extend((0..self.e.rows).filter(is_kept).map(|i| (i, self.e.value(i, 0))));
        Ok(rows)
    }

    /// The adapter's tensors in the file.
    pub fn entries<'s>(&'s self) -> Result<[Entry<'s>; 3]> {
        if self.scaling != 0.0 {
            return Err(Error::argument("scaling", self.scaling, "0: the files hold none but the configuration's"));
        }
        if !self.kernel.is_empty() {
            return Err(Error::argument("kernel", format_args!("{:?}", self.kernel), "none: AdaLoRA's A is a matrix"));
        }
        if self.embedding {
            return Err(Error::argument("embedding", 1, "0: AdaLoRA's files name all adapters alike"));
        }
        let rows: Vec<usize> = self.kept_rows()?.into_iter().map(|(i, _)| i).collect();
        let (kept, all) = (rows.len(), rows.len() == self.e.rows);
        let (columns, a_rows) = (rows.clone(), rows.clone());
        let entry = |factor, matrix: &Matrix, shape, content: Content<'s>| Entry {
            name: format!("{PREFIX}{}.lora_{factor}", self.name),
            dtype: stored(matrix.dtype),
            shape,
            content,
        };
        let some_rows = |matrix: &'s Matrix<'_>, rows: Vec<usize>| -> Content<'s> {
            Box::new(move |to: &mut dyn Write| rows.iter().try_for_each(|i| to.write_all((matrix.row)(*i))))
        };
        let b = &self.b;
        let some_columns: Content<'s> = Box::new(move |to: &mut dyn Write| {
            let size = b.dtype.size();
            (0..b.rows).try_for_each(|i| match (b.row)(i) {
                row if all => to.write_all(row),
                row => columns.iter().try_for_each(|k| to.write_all(&row[k * size..][..size])),
            })
        });
        Ok([
            entry('A', &self.a, vec![kept, self.a.columns], some_rows(&self.a, a_rows)),
            entry('E', &self.e, vec![kept, 1], some_rows(&self.e, rows)),
            entry('B', b, vec![b.rows, kept], some_columns),
        ])
    }
}

/// An adapter in a file.
pub struct Found {
    /// Path of its module, ended by a zero byte for C.
    name: String,
    /// Triplets at creation.
    pub rank: usize,
    /// Triplets in the file.
    pub kept: usize,
    /// Input features.
    pub in_features: usize,
    /// Output features.
    pub out_features: usize,
    /// Of `rank` triplets, 1 where one is in the file; `None`: all are.
    pub pattern: Option<Vec<u8>>,
    /// Types of A, E and B.
    pub dtypes: [Dtype; 3],
    /// Positions of A, E and B in the file.
    tensors: [usize; 3],
}

/// The path of the module, and 0, 1 or 2 for A, E or B, where a tensor's name is that of a triplet's part.
pub fn path_of(name: &str) -> Option<(&str, usize)> {
    let (path, last) = name.strip_prefix(PREFIX)?.rsplit_once('.')?;
    let factor = ["lora_A", "lora_E", "lora_B"].iter().position(|each| *each == last)?;
    (!path.is_empty()).then_some((path, factor))
}

/// Elements of an adapter, masked triplets included, up to which a file may have any part of them,
const MOST_ELEMENTS: usize = 1 << 26;
/// and beyond which at least one triplet out of so many.
const MOST_MASKED: usize = 1 << 10;

/// The adapters in a file, and the positions of what belongs to none.
pub fn find(file: &TensorFile, mut config: Config, config_path: &Path) -> Result<(Vec<Found>, Vec<usize>)> {
    let mut parts: BTreeMap<&str, [Option<usize>; 3]> = BTreeMap::new();
    let mut beside = Vec::new();
    for (i, tensor) in file.tensors().iter().enumerate() {
        match path_of(tensor.name()) {
            Some((path, factor)) => parts.entry(path).or_default()[factor] = Some(i),
            None => beside.push(i),
        }
    }
    if let Some(path) = config.rank_pattern.keys().find(|path| !parts.contains_key(path.as_str())) {
        let found = format!("{:?} in rank_pattern", format!("{path}.lora_E"));
        return Err(super::misfit(config_path, found, "names of adapters that are in the file of tensors"));
    }
    let mut adapters = reserve(parts.len(), "adapters")?;
    for (path, parts) in parts {
        let [Some(a), Some(e), Some(b)] = parts else {
            let missing = ["lora_A", "lora_E", "lora_B"].iter().zip(parts).find(|(_, at)| at.is_none());
            let missing = format!("{PREFIX}{path}.{}", missing.map_or("", |(name, _)| name));
            return Err(file.misfit_of(&missing, "none", "a tensor, as there are others of its adapter"));
        };
        let pattern = config.rank_pattern.remove(path);
        let kept = pattern.as_ref().map_or(config.init_r, |kept| kept.iter().filter(|kept| **kept).count());
        let all = match pattern {
            Some(_) => format!("{kept}, the triplets that rank_pattern keeps"),
            None => format!("{kept}, init_r (rank_pattern does not cut this adapter)"),
        };
        let [a, e, b] = [(a, [0, 1]), (e, [0, 1]), (b, [1, 0])].map(|(at, [across, along])| {
            let tensor = &file.tensors()[at];
            let fail =
                |found: &dyn std::fmt::Display, expected: &str| Err(file.misfit_of(tensor.name(), found, expected));
            let &[_, _] = &tensor.shape[..] else {
                return fail(&format_args!("shape {:?}", tensor.shape), "two dimensions");
            };
            let (triplets, features) = (tensor.shape[across], tensor.shape[along]);
            if triplets != kept as i64 {
                let expected = format!("in dimension {across} {all}");
                return fail(&format_args!("shape {:?}", tensor.shape), &expected);
            }
            let Some(dtype) = computed(tensor.dtype) else {
                return fail(&format_args!("elements of {}", tensor.dtype), "float32, float64, bfloat16 or float16");
            };
            match usize::try_from(features).ok().filter(|n| *n <= MAX_FEATURES) {
                Some(features) => Ok((at, features, dtype)),
                None => fail(&format_args!("{features} features"), "at most 2^34"),
            }
        });
        let (a, e, b) = (a?, e?, b?);
        if e.1 != 1 {
            let tensor = &file.tensors()[e.0];
            return Err(file.misfit_of(tensor.name(), format_args!("shape {:?}", tensor.shape), "one column"));
        }
        // What is kept is in the file, and so bounds what reading takes; little else does where next to nothing is.
        let room = config.init_r.saturating_mul(a.1.saturating_add(b.1));
        if room > MOST_ELEMENTS && config.init_r > kept.saturating_mul(MOST_MASKED) {
            let found = format!("{} triplets of {} and {} features, {kept} of which are kept", config.init_r, a.1, b.1);
            return Err(file.misfit_of(file.tensors()[a.0].name(), found, "fewer that are masked, or smaller ones"));
        }
        adapters.push(Found {
            name: format!("{path}\0"),
            rank: config.init_r,
            kept,
            in_features: a.1,
            out_features: b.1,
            pattern: pattern.map(|kept| kept.into_iter().map(u8::from).collect()),
            dtypes: [a.2, e.2, b.2],
            tensors: [a.0, e.0, b.0],
        });
    }
    Ok((adapters, beside))
}

impl Found {
    /// Path of its module, ended by a zero byte.
    pub fn name_for_c(&self) -> *const std::ffi::c_char {
        self.name.as_ptr().cast()
    }

    /// Reads the triplets: all, with zeros where the file has none; or those of the file alone. The room decides.
    pub fn read(&self, file: &TensorFile, mut a: MatrixMut, mut e: MatrixMut, mut b: MatrixMut) -> Result<()> {
        let held = a.rows;
        if held != self.rank && held != self.kept {
            let expected = format!("rank, {}, or the {} that are in the file", self.rank, self.kept);
            return Err(Error::argument("params.A", format_args!("{held} rows"), expected));
        }
        let names = ["params.A", "params.E", "params.B"];
        let shapes = [(held, self.in_features), (held, 1), (self.out_features, held)];
        for ((name, m), (rows, columns)) in names.iter().zip([&a, &e, &b]).zip(shapes) {
            if (m.rows, m.columns) != (rows, columns) {
                let (found, expected) =
                    (format!("[{}, {}]", m.rows, m.columns), format_args!("[{rows}, {columns}]").to_string());
                return Err(Error::argument(name, found, expected));
            }
        }
        // Where each triplet of the file goes.
        let mut places: Vec<usize> = reserve(self.kept, "triplets")?;
        match &self.pattern {
            Some(pattern) if held != self.kept => {
                places.extend(pattern.iter().enumerate().filter(|(_, kept)| **kept != 0).map(|(i, _)| i));
            }
            _ => places.extend(0..self.kept),
        }
        let [at_a, at_e, at_b] = self.tensors.map(|i| &file.tensors()[i]);
        let mut read = || {
            read_rows(file, at_a, self.dtypes[0], &places, &mut a)?;
            read_rows(file, at_e, self.dtypes[1], &places, &mut e)?;
            read_columns(file, at_b, self.dtypes[2], &places, &mut b)
        };
        read().map_err(|error| match error.code {
            Code::Io => Error::new(Code::Incomplete, format!("params are undefined: {}", error.message)),
            _ => error,
        })
    }
}

/// Gives each row of a tensor of `columns` columns to a function.
fn each_row(
    file: &TensorFile,
    tensor: &Tensor,
    rows: usize,
    row_bytes: usize,
    mut take: impl FnMut(usize, &[u8]),
) -> Result<()> {
    let together = CHUNK.checked_div(row_bytes).map_or(rows, |n| n.clamp(1, rows.max(1)));
    let mut bytes = reserve(together * row_bytes, "bytes")?;
    let mut next = 0;
    while next < rows {
        let n = together.min(rows - next);
        bytes.resize(n * row_bytes, 0);
        file.read(tensor, next * row_bytes, &mut bytes)?;
        for i in 0..n {
            take(next + i, &bytes[i * row_bytes..][..row_bytes]);
        }
        next += n;
    }
    Ok(())
}

/// Reads rows to their places, and zeros into the others.
fn read_rows(file: &TensorFile, tensor: &Tensor, dtype: Dtype, places: &[usize], to: &mut MatrixMut) -> Result<()> {
    let mut row = reserve(to.columns * to.dtype.size(), "bytes")?;
    row.resize(to.columns * to.dtype.size(), 0);
    let mut next = 0;
    for place in places.iter().chain([&to.rows]) {
        (next..*place).for_each(|i| (to.write_row)(i, &row));
        next = place + 1;
    }
    each_row(file, tensor, places.len(), to.columns * dtype.size(), |i, bytes| {
        convert(bytes, dtype, &mut row, to.dtype);
        (to.write_row)(places[i], &row);
    })
}

/// Reads columns to their places, and zeros into the others.
fn read_columns(file: &TensorFile, tensor: &Tensor, dtype: Dtype, places: &[usize], to: &mut MatrixMut) -> Result<()> {
    if to.columns == 0 {
        return Ok(());
    }
    let (size, file_size) = (to.dtype.size(), dtype.size());
    let mut row = reserve(to.columns * size, "bytes")?;
    row.resize(to.columns * size, 0);
    each_row(file, tensor, to.rows, places.len() * file_size, |i, bytes| {
        for (place, bytes) in places.iter().zip(bytes.chunks_exact(file_size)) {
            convert(bytes, dtype, &mut row[place * size..][..size], to.dtype);
        }
        (to.write_row)(i, &row);
    })
}
