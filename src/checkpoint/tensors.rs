//! Files of named tensors, in the format of safetensors.

use super::{corrupt, failed, open_file};
use crate::error::{Code, Error, Result, reserve};
use crate::tensor;
pub use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes of a header, at most: over a hundred thousand tensors. It is the one part of a file that is read into memory
/// of ours.
pub(crate) const MOST_HEADER: usize = 16 << 20;
/// Dimensions of a tensor, at most.
pub(crate) const MOST_DIMENSIONS: usize = 64;
const METADATA: &str = "__metadata__";

const _: () = assert!(cfg!(target_endian = "little"), "files hold little-endian numbers, as memory does");

/// What a tensor's bytes are written by: a function that is called once, and may read the caller's memory only then.
pub type Content<'a> = Box<dyn Fn(&mut dyn Write) -> io::Result<()> + 'a>;

/// A tensor to write.
pub struct Entry<'a> {
    /// Name in the file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// Writes as many bytes as type and shape say.
    pub content: Content<'a>,
}

/// Bytes of an element; `None` for types whose elements share bytes.
pub fn element_size(dtype: Dtype) -> Option<usize> {
    let bits = dtype.bitsize();
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// Bytes of a tensor; `None` where an array without its empty extents would not fit memory, which NumPy and PyTorch do not
/// make: strides would overflow.
pub fn bytes_of(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let size = shape.iter().try_fold(dtype.bitsize().div_ceil(8), |n, d| n.checked_mul((*d).max(1)))?;
    isize::try_from(size).ok()?;
    Some(if shape.contains(&0) { 0 } else { size })
}

/// The element type in a file.
pub fn stored(dtype: tensor::Dtype) -> Dtype {
    match dtype {
        tensor::Dtype::Float64 => Dtype::F64,
        tensor::Dtype::Float32 => Dtype::F32,
        tensor::Dtype::Bfloat16 => Dtype::BF16,
        tensor::Dtype::Float16 => Dtype::F16,
    }
}

/// The element type of a parameter, if it can be one.
pub fn computed(dtype: Dtype) -> Option<tensor::Dtype> {
    Some(match dtype {
        Dtype::F64 => tensor::Dtype::Float64,
        Dtype::F32 => tensor::Dtype::Float32,
        Dtype::BF16 => tensor::Dtype::Bfloat16,
        Dtype::F16 => tensor::Dtype::Float16,
        _ => return None,
    })
}

/// Puts the tensors in the order of the file, and makes its header, which describes them all. `list` is what the caller
/// calls them.
pub fn header(entries: &mut [Entry<'_>], metadata: (&str, &str), list: &str) -> Result<Vec<u8>> {
    // Wide elements first, so that all are aligned.
    entries.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
    let mut names: Vec<&str> = entries.iter().map(|e| e.name.as_str()).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::argument(list, format_args!("the name {:?} twice", twice[0]), "names of their own"));
    }
    if names.contains(&METADATA) {
        return Err(Error::argument(list, format_args!("the name {METADATA:?}"), "a name that the format leaves free"));
    }
    let mut infos = reserve(entries.len(), "tensors")?;
    let mut offset = 0;
    for entry in entries.iter() {
        let bytes = bytes_of(entry.dtype, &entry.shape);
        let end = bytes.and_then(|bytes| usize::checked_add(offset, bytes)).ok_or_else(|| {
            Error::argument(
                list,
                format_args!("{:?} of shape {:?}", entry.name, entry.shape),
                "tensors that fit memory together",
            )
        })?;
        let info = TensorInfo { dtype: entry.dtype, shape: entry.shape.clone(), data_offsets: (offset, end) };
        infos.push((entry.name.clone(), info));
        offset = end;
    }
    let (key, value) = metadata;
    let metadata = Some(std::iter::once((key.to_owned(), value.to_owned())).collect());
    let metadata = Metadata::new(metadata, infos).map_err(|e| Error::new(Code::Internal, e.to_string()))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|e| Error::new(Code::Internal, e.to_string()))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    if header.len() > MOST_HEADER {
        let found = format_args!("names and text of {} bytes", header.len()).to_string();
        return Err(Error::argument(list, found, format_args!("at most {MOST_HEADER}")));
    }
    Ok(header)
}

/// Writes a file.
pub fn write(to: &mut dyn Write, header: &[u8], entries: &[Entry<'_>]) -> io::Result<()> {
    to.write_all(&(header.len() as u64).to_le_bytes())?;
    to.write_all(header)?;
    entries.iter().try_for_each(|entry| (entry.content)(to))
}

/// A tensor in a file.
pub struct Tensor {
    /// Ended by a zero byte, for C.
    name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<i64>,
    /// Bytes of all elements.
    pub bytes: usize,
    begin: u64,
}

impl Tensor {
    /// Name.
    pub fn name(&self) -> &str {
        &self.name[..self.name.len() - 1]
    }

    /// Name, ended by a zero byte.
    pub fn name_for_c(&self) -> *const std::ffi::c_char {
        self.name.as_ptr().cast()
    }
}

/// A file whose header was read and checked. Its tensors are read when they are asked for, at their places.
pub struct TensorFile {
    path: PathBuf,
    file: File,
    /// In the order of their names.
    tensors: Vec<Tensor>,
    metadata: BTreeMap<String, String>,
}

impl TensorFile {
    /// Opens a file.
    pub fn open(path: &Path) -> Result<Self> {
        const WHOLE: &str = "a whole safetensors file";
        let (file, size) = open_file(path)?;
        let read = |bytes: &mut [u8], at| file.read_exact_at(bytes, at).map_err(|e| failed(path, "reading", &e));
        let Some(rest) = size.checked_sub(8) else {
            return Err(corrupt(path, format_args!("{size} bytes"), WHOLE));
        };
        let mut length = [0; 8];
        read(&mut length, 0)?;
        let length = u64::from_le_bytes(length);
        if length > rest {
            return Err(corrupt(path, format_args!("a header of {length} bytes in a file of {size}"), WHOLE));
        }
        if length > MOST_HEADER as u64 {
            let expected = format_args!("{WHOLE}, whose header has at most {MOST_HEADER}").to_string();
            return Err(corrupt(path, format_args!("a header of {length} bytes"), expected));
        }
        let mut bytes = reserve(length as usize, "bytes")?;
        bytes.resize(length as usize, 0);
        read(&mut bytes, 8)?;
        let header: Header = serde_json::from_slice(&bytes)
            .map_err(|e| corrupt(path, format_args!("a header with what does not belong there ({e})"), WHOLE))?;
        drop(bytes);
        let Header { metadata, tensors: mut found } = header;
        found.sort_by_key(|(_, info)| info.data_offsets);
        // Checks that the tensors lie one after another, each with the bytes that its type and shape need.
        let checked =
            Metadata::new(None, found.clone()).map_err(|e| corrupt(path, format_args!("a header with {e}"), WHOLE))?;
        if checked.data_len() as u64 != rest - length {
            let held = format_args!("{} bytes of tensors", rest - length).to_string();
            return Err(corrupt(path, held, format_args!("{WHOLE}, whose header says {}", checked.data_len())));
        }
        drop(checked);
        let mut tensors = reserve(found.len(), "tensors")?;
        for (mut name, info) in found {
            if name.contains('\0') {
                return Err(corrupt(path, format_args!("the name {name:?}"), "names without a zero byte"));
            }
            if element_size(info.dtype).is_none() {
                let text =
                    format!("{}: {name}: found {}, which is packed: expected whole bytes", path.display(), info.dtype);
                return Err(Error::new(Code::Unsupported, text));
            }
            if bytes_of(info.dtype, &info.shape).is_none() {
                let found = format_args!("shape {:?} of {name}", info.shape).to_string();
                return Err(corrupt(path, found, "extents that fit memory, also beside one of 0"));
            }
            name.push('\0');
            let (begin, end) = info.data_offsets;
            let shape = info.shape.iter().map(|d| *d as i64).collect();
            let begin_in_file = 8 + length + begin as u64;
            tensors.push(Tensor { name, dtype: info.dtype, shape, bytes: end - begin, begin: begin_in_file });
        }
        tensors.sort_unstable_by(|a, b| a.name().cmp(b.name()));
        Ok(Self { path: path.to_owned(), file, tensors, metadata })
    }

    /// All tensors, in the order of their names.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// An entry of the file's metadata.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// Reads bytes of a tensor, from `offset` on.
    pub fn read(&self, tensor: &Tensor, offset: usize, to: &mut [u8]) -> Result<()> {
        debug_assert!(offset + to.len() <= tensor.bytes);
        let read = self.file.read_exact_at(to, tensor.begin + offset as u64);
        read.map_err(|e| failed(&self.path, "reading", &e))
    }

    /// The file is damaged.
    pub fn corrupt(&self, found: impl fmt::Display, expected: impl fmt::Display) -> Error {
        corrupt(&self.path, found, expected)
    }

    /// The file is whole, and holds a tensor that does not fit.
    pub fn misfit_of(&self, name: &str, found: impl fmt::Display, expected: impl fmt::Display) -> Error {
        Error::argument(format_args!("{}: {name}", self.path.display()), found, expected)
    }
}

/// The header's JSON. Read entry by entry: safetensors' own type holds all of it several times while it is parsed.
struct Header {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, TensorInfo)>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with an entry for each tensor")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> std::result::Result<Header, M::Error> {
                let mut header = Header { metadata: BTreeMap::new(), tensors: Vec::new() };
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        header.metadata = map.next_value()?;
                        continue;
                    }
                    let mut info = map.next_value::<TensorInfo>()?;
                    if info.shape.len() > MOST_DIMENSIONS {
                        let text = format_args!("{name}: {} dimensions, above {MOST_DIMENSIONS}", info.shape.len());
                        return Err(M::Error::custom(text));
                    }
                    info.shape.shrink_to_fit();
                    header.tensors.push((name, info));
                }
                header.tensors.sort_unstable_by(|a, b| a.0.cmp(&b.0));
                match header.tensors.windows(2).find(|pair| pair[0].0 == pair[1].0) {
                    Some(pair) => Err(M::Error::custom(format_args!("{} twice", pair[0].0))),
                    None => Ok(header),
                }
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
