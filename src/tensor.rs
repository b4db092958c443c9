//! Views of the caller's buffers: where they lie, their shape and element type. Nothing here reads their memory.

use crate::error::{Error, Result};

/// Element type of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE binary32.
    Float32,
    /// IEEE binary64.
    Float64,
    /// Upper half of a binary32.
    Bfloat16,
    /// IEEE binary16.
    Float16,
}

impl Dtype {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Self::Float64 => 8,
            Self::Float32 => 4,
            Self::Bfloat16 | Self::Float16 => 2,
        }
    }

    /// The type that sums are taken in, and that state is kept in.
    pub fn compute(self) -> Self {
        if self == Self::Float64 { self } else { Self::Float32 }
    }

    /// Name, as PyTorch and NumPy spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::Float64 => "float64",
            Self::Bfloat16 => "bfloat16",
            Self::Float16 => "float16",
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// An address in the memory of the context's backend. Only a backend turns it into a pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(transparent)]
pub struct Address(pub usize);

impl Address {
    /// The address `bytes` further.
    pub fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes)
    }

    /// Refuses null, and what is not a multiple of `alignment`.
    pub fn check(self, name: &str, alignment: usize) -> Result<Self> {
        if self.0 == 0 {
            return Err(Error::argument(name, "NULL", "an address"));
        }
        if !self.0.is_multiple_of(alignment) {
            return Err(Error::argument(
                name,
                format_args!("address {:#x}", self.0),
                format_args!("a multiple of {alignment} bytes"),
            ));
        }
        Ok(self)
    }
}

/// A stream of the backend, as the caller gave it.
#[derive(Clone, Copy, Debug)]
pub struct Stream(pub usize);

/// Memory that the caller lends for the length of a call.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Where.
    pub data: Address,
    /// How much.
    pub bytes: usize,
}

/// A row-major matrix.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// First element.
    pub data: Address,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub columns: usize,
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Element type.
    pub dtype: Dtype,
}

impl Matrix {
    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.rows == 0 || self.columns == 0
    }

    /// Refuses another shape, or another type than one of `dtypes`.
    pub fn expect(&self, name: impl std::fmt::Display, rows: usize, columns: usize, dtypes: &[Dtype]) -> Result<()> {
        if self.rows == rows && self.columns == columns && dtypes.contains(&self.dtype) {
            return Ok(());
        }
        Err(Error::argument(
            name,
            format_args!("[{}, {}] of {}", self.rows, self.columns, self.dtype),
            format_args!("[{rows}, {columns}] of {}", Names(dtypes)),
        ))
    }

    /// The place that the matrix takes up.
    pub fn region(&self) -> Region {
        let element = self.dtype.size();
        let bytes = if self.is_empty() { 0 } else { ((self.rows - 1) * self.row_stride + self.columns) * element };
        Region {
            begin: self.data.0,
            end: self.data.0 + bytes,
            pitch: self.row_stride * element,
            width: self.columns * element,
        }
    }
}

/// A vector, its elements `stride` apart.
#[derive(Clone, Copy, Debug)]
pub struct Vector {
    /// First element.
    pub data: Address,
    /// Number of elements.
    pub length: usize,
    /// Elements from one to the next.
    pub stride: usize,
    /// Element type.
    pub dtype: Dtype,
}

impl Vector {
    /// The vector in a matrix of one row or one column; `None` where its shape is another.
    pub fn from_matrix(matrix: &Matrix, length: usize) -> Option<Self> {
        let stride = match (matrix.rows, matrix.columns) {
            (1, columns) if columns == length => 1,
            (rows, 1) if rows == length => matrix.row_stride,
            (rows, columns) if length == 0 && rows * columns == 0 => 1,
            _ => return None,
        };
        Some(Self { data: matrix.data, length, stride, dtype: matrix.dtype })
    }

    /// The place that the vector takes up.
    pub fn region(&self) -> Region {
        let element = self.dtype.size();
        let bytes = if self.length == 0 { 0 } else { ((self.length - 1) * self.stride + 1) * element };
        Region { begin: self.data.0, end: self.data.0 + bytes, pitch: self.stride * element, width: element }
    }
}

/// Parameters or gradients of an adapter, checked against its geometry.
#[derive(Clone, Copy, Debug)]
pub struct Triplets {
    /// Right vectors, [rank, in_local].
    pub a: Matrix,
    /// Values, `rank` of them.
    pub e: Vector,
    /// Left vectors, [out_local, rank].
    pub b: Matrix,
}

/// A place in memory: rows of `width` bytes, `pitch` bytes apart.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    begin: usize,
    end: usize,
    pitch: usize,
    width: usize,
}

impl Region {
    /// Bytes without gaps.
    pub fn contiguous(data: Address, bytes: usize) -> Self {
        Self { begin: data.0, end: data.0 + bytes, pitch: bytes, width: bytes }
    }

    /// Whether a byte belongs to both. Matrices that share a row pitch may lie side by side, as the columns of one
    /// larger matrix do; everything else is judged by its whole extent.
    pub fn overlaps(&self, other: &Self) -> bool {
        // A place without bytes may lie anywhere, also inside another.
        if self.begin == self.end || other.begin == other.end || self.begin >= other.end || other.begin >= self.end {
            return false;
        }
        if self.pitch != other.pitch || self.pitch == 0 {
            return true;
        }
        let (first, second) = if self.begin <= other.begin { (self, other) } else { (other, self) };
        let offset = (second.begin - first.begin) % self.pitch;
        !(offset >= first.width && offset + second.width <= self.pitch)
    }
}

/// Refuses outputs that overlap each other or an input.
pub(crate) fn disjoint(outputs: &[(&str, Region)], inputs: &[(&str, Region)]) -> Result<()> {
    for (i, (name, region)) in outputs.iter().enumerate() {
        for (other, place) in outputs[i + 1..].iter().chain(inputs) {
            if region.overlaps(place) {
                return Err(Error::argument(*name, format_args!("memory that overlaps {other}"), "memory of its own"));
            }
        }
    }
    Ok(())
}

/// Lists types as "float32 or bfloat16".
pub(crate) struct Names<'a>(pub(crate) &'a [Dtype]);

impl std::fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, dtype) in self.0.iter().enumerate() {
            let repeated = self.0[..i].contains(dtype);
            if !repeated {
                write!(f, "{}{dtype}", if i > 0 { " or " } else { "" })?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(begin: usize, rows: usize, columns: usize, row_stride: usize) -> Region {
        Matrix { data: Address(begin), rows, columns, row_stride, dtype: Dtype::Float32 }.region()
    }

    #[test]
    fn columns_of_one_matrix_lie_side_by_side() {
        // Query, key and value as columns of one [5, 12] matrix at address 4096.
        let [q, k, v] = [0, 4, 8].map(|c| matrix(4096 + 4 * c, 5, 4, 12));
        assert!(!q.overlaps(&k) && !k.overlaps(&q) && !q.overlaps(&v) && !v.overlaps(&k));
        // One column wider, each reaches into its neighbour; the last reaches into the first one's next row.
        let [q, k, v] = [0, 4, 8].map(|c| matrix(4096 + 4 * c, 5, 5, 12));
        assert!(q.overlaps(&k) && k.overlaps(&q) && v.overlaps(&q) && q.overlaps(&v));
    }

    #[test]
    fn other_pitches_are_judged_by_extent() {
        assert!(matrix(4096, 5, 4, 12).overlaps(&matrix(4112, 5, 4, 11)));
        assert!(!matrix(4096, 5, 4, 12).overlaps(&matrix(4096 + 4 * 52, 5, 4, 11)));
        assert!(matrix(4096, 5, 4, 12).overlaps(&Region::contiguous(Address(4096 + 4 * 51), 4)));
        for empty in [Region::contiguous(Address(4100), 0), matrix(4100, 0, 4, 12), matrix(4100, 5, 0, 12)] {
            assert!(!empty.overlaps(&matrix(4096, 5, 4, 12)) && !matrix(4096, 5, 4, 12).overlaps(&empty));
        }
    }
}
