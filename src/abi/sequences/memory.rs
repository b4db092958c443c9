//! The caller's memory: operands between guard zones, what they hold, and which of their bytes a call may write.

use super::{Choices, Outcome};
use crate::abi::types::*;
use half::{bf16, f16};
use std::alloc::Layout;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ops::Range;

/// Alignment of every block, and the least width of its guard zones.
const GUARD: usize = 64;

/// Whether a block's end may go unguarded: an address sanitizer, which sees reads too, watches what lies behind.
fn checked_by_sanitizer() -> bool {
    option_env!("RUSTFLAGS").is_some_and(|flags| flags.contains("sanitizer=address"))
}

/// What operands hold before they are filled: the same for every caller.
const UNSET: u8 = 0x3c;

/// Bytes of an element.
pub(super) fn size_of_dtype(dtype: DtypeCode) -> usize {
    match dtype {
        ADALORA_FLOAT64 => 8,
        ADALORA_FLOAT32 => 4,
        _ => 2,
    }
}

/// What an operand holds at first.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Fill {
    Zero,
    /// Numbers around 0, some of them exactly 0.
    Plain,
    /// Infinities, NaN, subnormals and huge numbers among them.
    Wild,
}

impl Fill {
    pub(super) fn some(c: &mut Choices) -> Self {
        if c.chance(20) { Self::Wild } else { Self::Plain }
    }
}

fn value(fill: Fill, c: &mut Choices) -> f64 {
    const WILD: [f64; 14] = [
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::NAN,
        f64::MAX,
        -1e300,
        3.4e38,
        -1e30,
        65504.0,
        1e-40,
        -5e-324,
        6e-8,
        1e-300,
        -0.0,
        0.0,
    ];
    match fill {
        Fill::Zero => 0.0,
        Fill::Wild if c.chance(10) => c.pick(&WILD),
        _ if c.chance(10) => 0.0,
        _ => (c.below(4001) as f64 - 2000.0) / 1000.0,
    }
}

/// The bytes of a number in an element type.
pub(super) fn encode(value: f64, dtype: DtypeCode) -> Vec<u8> {
    match dtype {
        ADALORA_FLOAT64 => value.to_le_bytes().to_vec(),
        ADALORA_FLOAT32 => (value as f32).to_le_bytes().to_vec(),
        ADALORA_BFLOAT16 => bf16::from_f64(value).to_le_bytes().to_vec(),
        _ => f16::from_f64(value).to_le_bytes().to_vec(),
    }
}

/// The reverse.
fn decode(bytes: &[u8], dtype: DtypeCode) -> f64 {
    match (dtype, bytes) {
        (ADALORA_FLOAT64, &[a, b, c, d, e, f, g, h]) => f64::from_le_bytes([a, b, c, d, e, f, g, h]),
        (ADALORA_FLOAT32, &[a, b, c, d]) => f64::from(f32::from_le_bytes([a, b, c, d])),
        (ADALORA_BFLOAT16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f64(),
        (_, &[a, b]) => f16::from_le_bytes([a, b]).to_f64(),
        _ => f64::NAN,
    }
}

/// The bytes of a structure of the interface, none of which has padding.
pub(super) fn bytes_of<T: Copy>(value: &T) -> Vec<u8> {
    // SAFETY: a live value without padding, read as bytes.
    unsafe { std::slice::from_raw_parts((&raw const *value).cast::<u8>(), size_of::<T>()) }.to_vec()
}

/// Where an operand begins: a block, and bytes from its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    block: usize,
    at: usize,
}

impl Place {
    pub(super) fn offset(self, bytes: usize) -> Self {
        Self { at: self.at + bytes, ..self }
    }
}

/// A matrix and where it lies.
#[derive(Clone, Copy)]
pub(super) struct Mat {
    pub(super) d: Matrix,
    pub(super) place: Place,
}

impl Mat {
    /// Elements from one row to the next.
    pub(super) fn pitch(&self) -> usize {
        (if self.d.row_stride == 0 { self.d.columns } else { self.d.row_stride }) as usize
    }

    /// Bytes from the first element to the end of the last; 0 where there is none.
    pub(super) fn extent(&self) -> usize {
        if self.d.rows == 0 || self.d.columns == 0 {
            return 0;
        }
        ((self.d.rows as usize - 1) * self.pitch() + self.d.columns as usize) * size_of_dtype(self.d.dtype)
    }

    fn rows(&self) -> impl Iterator<Item = (Place, usize)> + use<> {
        let (size, pitch) = (size_of_dtype(self.d.dtype), self.pitch());
        let (place, width) = (self.place, self.d.columns as usize * size);
        (0..if width == 0 { 0 } else { self.d.rows as usize }).map(move |i| (place.offset(i * pitch * size), width))
    }
}

/// What a call may write.
#[derive(Default)]
pub(super) struct Writes {
    on_success: Vec<(usize, Range<usize>)>,
    always: Vec<(usize, Range<usize>)>,
}

impl Writes {
    pub(super) fn bytes(&mut self, place: Place, n: usize) {
        self.on_success.push((place.block, place.at..place.at + n));
    }

    pub(super) fn matrix(&mut self, mat: &Mat) {
        for (place, width) in mat.rows() {
            self.bytes(place, width);
        }
    }

    /// What a refused call writes too: the size that is needed.
    pub(super) fn even_if_refused(&mut self, place: Place, n: usize) {
        self.always.push((place.block, place.at..place.at + n));
    }
}

struct Block {
    base: *mut u8,
    layout: Layout,
    /// Bytes that belong to an operand; the others are guard zones and gaps.
    owned: Vec<Range<usize>>,
    /// Its contents may differ between callers: workspace, addresses.
    private: bool,
}

impl Block {
    fn bytes(&self) -> &[u8] {
        // SAFETY: the block's own memory, initialised when it was made; no call is running.
        unsafe { std::slice::from_raw_parts(self.base, self.layout.size()) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.layout.size()) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: from `alloc` with this layout.
        unsafe { std::alloc::dealloc(self.base, self.layout) };
    }
}

/// All memory of one caller.
pub(super) struct Memory {
    blocks: BTreeMap<usize, Block>,
    next: usize,
    /// What guard zones and gaps hold. Each caller has another, so that a result that depends on them differs.
    filler: u8,
    /// Blocks of the call at hand.
    passing: Vec<usize>,
    /// Blocks that outlive the call, where they are wanted.
    kept: Option<Vec<usize>>,
    /// Whether blocks have room behind them for a description that is one row too large.
    roomy: bool,
    snapshot: Vec<u8>,
}

impl Memory {
    pub(super) fn new(filler: u8) -> Self {
        Self {
            blocks: BTreeMap::new(),
            next: 0,
            filler,
            passing: Vec::new(),
            kept: None,
            roomy: false,
            snapshot: Vec::new(),
        }
    }

    /// Frees what the call before used.
    pub(super) fn begin_call(&mut self, roomy: bool) {
        for id in std::mem::take(&mut self.passing) {
            self.blocks.remove(&id);
        }
        self.roomy = roomy;
    }

    /// From here on, blocks stay until they are released.
    pub(super) fn begin_keeping(&mut self) {
        self.kept = Some(Vec::new());
    }

    /// The blocks that stay.
    pub(super) fn end_keeping(&mut self) -> Vec<usize> {
        self.kept.take().unwrap_or_default()
    }

    pub(super) fn release(&mut self, blocks: Vec<usize>) {
        self.passing.extend(blocks);
    }

    fn block(&mut self, bytes: usize, align: usize, room: usize, c: &mut Choices) -> Place {
        let front = GUARD + c.below(GUARD / align) * align;
        let tail = if self.roomy {
            room + GUARD
        } else if c.chance(50) && checked_by_sanitizer() {
            0
        } else {
            GUARD
        };
        let layout = Layout::from_size_align(front + bytes + tail, GUARD).expect("a small block");
        // SAFETY: the size is not zero.
        let base = unsafe { std::alloc::alloc(layout) };
        assert!(!base.is_null(), "no memory");
        let id = self.next;
        for i in 0..layout.size() {
            // No two blocks alike, so that a gap that is copied to another shows.
            let byte = self.filler ^ (31 * id + 7 * i) as u8;
            // SAFETY: one of `layout.size()` bytes, just allocated.
            unsafe { base.add(i).write(byte) };
        }
        self.next += 1;
        self.blocks.insert(id, Block { base, layout, owned: Vec::new(), private: false });
        self.kept.as_mut().unwrap_or(&mut self.passing).push(id);
        Place { block: id, at: front }
    }

    /// Bytes between guard zones.
    pub(super) fn place(&mut self, bytes: usize, align: usize, c: &mut Choices) -> Place {
        let place = self.block(bytes, align, 0, c);
        self.own(place, bytes);
        place
    }

    /// Bytes that may differ between callers.
    pub(super) fn private(&mut self, bytes: usize, align: usize, c: &mut Choices) -> Place {
        let place = self.place(bytes, align, c);
        self.blocks.get_mut(&place.block).expect("a live block").private = true;
        place
    }

    /// Memory whose contents do not matter, aligned as workspace must be.
    pub(super) fn workspace(&mut self, bytes: usize, c: &mut Choices) -> Place {
        let place = self.private(bytes, GUARD, c);
        self.write(place, &vec![self.filler; bytes]);
        place
    }

    /// Several operands in one block, some of them without a gap between.
    pub(super) fn pack(&mut self, sizes: &[usize], align: usize, c: &mut Choices) -> Vec<Place> {
        let mut next = 0;
        let offsets: Vec<usize> = sizes
            .iter()
            .map(|bytes| {
                let at = next + c.pick(&[0, 0, 1, 4]) * align;
                next = (at + bytes).next_multiple_of(align);
                at
            })
            .collect();
        let begin = self.block(next, align, GUARD, c);
        for (at, bytes) in offsets.iter().zip(sizes) {
            self.own(begin.offset(*at), *bytes);
        }
        offsets.iter().map(|at| begin.offset(*at)).collect()
    }

    /// Values between guard zones.
    pub(super) fn values<const N: usize>(&mut self, values: &[[u8; N]], align: usize, c: &mut Choices) -> Place {
        self.bytes(&values.concat(), align, c)
    }

    /// Bytes between guard zones.
    pub(super) fn bytes(&mut self, bytes: &[u8], align: usize, c: &mut Choices) -> Place {
        let place = self.place(bytes.len(), align, c);
        self.write(place, bytes);
        place
    }

    fn own(&mut self, place: Place, bytes: usize) {
        if bytes > 0 {
            let range = place.at..place.at + bytes;
            let block = self.blocks.get_mut(&place.block).expect("a live block");
            block.bytes_mut()[range.clone()].fill(UNSET);
            block.owned.push(range);
        }
    }

    pub(super) fn pointer<T>(&self, place: Place) -> *mut T {
        self.blocks[&place.block].base.wrapping_add(place.at).cast()
    }

    pub(super) fn write(&mut self, place: Place, bytes: &[u8]) {
        let block = self.blocks.get_mut(&place.block).expect("a live block");
        block.bytes_mut()[place.at..place.at + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn read(&self, place: Place, bytes: usize) -> &[u8] {
        &self.blocks[&place.block].bytes()[place.at..place.at + bytes]
    }

    pub(super) fn read_f64(&self, place: Place) -> f64 {
        decode(self.read(place, 8), ADALORA_FLOAT64)
    }

    pub(super) fn read_i64(&self, place: Place, i: usize) -> i64 {
        i64::from_le_bytes(self.read(place.offset(8 * i), 8).try_into().expect("eight bytes"))
    }

    pub(super) fn elements(&self, place: Place, n: usize, dtype: DtypeCode) -> Vec<f64> {
        let size = size_of_dtype(dtype);
        self.read(place, n * size).chunks_exact(size).map(|b| decode(b, dtype)).collect()
    }

    pub(super) fn matrix_elements(&self, mat: &Mat) -> Vec<f64> {
        mat.rows().flat_map(|(place, _)| self.elements(place, mat.d.columns as usize, mat.d.dtype)).collect()
    }

    pub(super) fn matrix_bytes(&self, mat: &Mat) -> Vec<u8> {
        mat.rows().flat_map(|(place, width)| self.read(place, width).iter().copied()).collect()
    }

    pub(super) fn fill(&mut self, place: Place, n: usize, dtype: DtypeCode, fill: Fill, c: &mut Choices) {
        let bytes: Vec<u8> = (0..n).flat_map(|_| encode(value(fill, c), dtype)).collect();
        self.write(place, &bytes);
    }

    /// Sets an element that is not finite, if there is one in the type.
    pub(super) fn write_element(&mut self, place: Place, i: usize, dtype: DtypeCode, value: f64) {
        self.write(place.offset(i * size_of_dtype(dtype)), &encode(value, dtype));
    }

    /// A matrix of that shape, with any stride, filled.
    pub(super) fn matrix(&mut self, rows: i64, columns: i64, dtype: DtypeCode, fill: Fill, c: &mut Choices) -> Mat {
        let pitch = columns + if c.chance(40) { c.below(5) as i64 } else { 0 };
        let mut mats = self.beside(rows, &[columns], pitch, dtype, fill, c);
        mats.pop().expect("one matrix")
    }

    /// Matrices that are columns of one larger one, `pitch` wide.
    pub(super) fn beside(
        &mut self,
        rows: i64,
        columns: &[i64],
        pitch: i64,
        dtype: DtypeCode,
        fill: Fill,
        c: &mut Choices,
    ) -> Vec<Mat> {
        let size = size_of_dtype(dtype);
        let whole = if rows == 0 { 0 } else { ((rows - 1) * pitch + columns.iter().sum::<i64>()) as usize * size };
        let begin = self.block(whole, size, (pitch as usize + 1) * size, c);
        let mut first = 0;
        let mut mats = Vec::new();
        for columns in columns {
            let place = begin.offset(first as usize * size);
            let empty = rows == 0 || *columns == 0;
            let data = if empty && c.chance(50) { std::ptr::null_mut() } else { self.pointer::<c_void>(place) };
            let row_stride = if pitch == *columns && c.chance(70) { 0 } else { pitch };
            let d = Matrix { data, rows, columns: *columns, row_stride, dtype, reserved: 0 };
            let mat = Mat { d, place };
            for (place, width) in mat.rows() {
                self.own(place, width);
                self.fill(place, *columns as usize, dtype, fill, c);
            }
            mats.push(mat);
            first += columns;
        }
        mats
    }

    /// A vector, lying or standing.
    pub(super) fn vector(&mut self, n: i64, dtype: DtypeCode, fill: Fill, c: &mut Choices) -> Mat {
        if c.chance(50) { self.matrix(1, n, dtype, fill, c) } else { self.matrix(n, 1, dtype, fill, c) }
    }

    /// Descriptors of any version that says the same, `stride` bytes apart; `spoiled` gets a wrong size, and the name of what is wrong is
    /// returned with the place and the stride.
    pub(super) fn descriptors(
        &mut self,
        list: &[Vec<u8>],
        minimum: usize,
        spoiled: Option<usize>,
        c: &mut Choices,
    ) -> (Place, usize, &'static str) {
        let mut wrong = "";
        let sized: Vec<Vec<u8>> = list
            .iter()
            .enumerate()
            .map(|(i, bytes)| {
                let mut bytes = bytes.clone();
                let known = bytes.len();
                let mut size = known;
                if spoiled == Some(i) {
                    match c.below(3) {
                        0 => (size, wrong) = (c.pick(&[0, 7, minimum - 1]), ".struct_size"),
                        1 => (size, wrong) = (c.pick(&[(1 << 16) + 1, usize::MAX]), ".struct_size"),
                        _ => {
                            size = known + 1 + c.below(24);
                            bytes.resize(size, 0);
                            let unknown = known + c.below(size - known);
                            bytes[unknown] = 1 + c.below(255) as u8;
                            wrong = ": byte";
                        }
                    }
                } else if c.chance(20) {
                    size = known + 1 + c.below(24);
                    bytes.resize(size, 0);
                } else if c.chance(30) {
                    let last = bytes.iter().rposition(|b| *b != 0).map_or(0, |i| i + 1).max(minimum);
                    size = last + c.below(known - last + 1);
                    bytes.truncate(size);
                }
                bytes[..8].copy_from_slice(&size.to_le_bytes());
                bytes
            })
            .collect();
        let longest = sized.iter().map(Vec::len).max().unwrap_or(0).max(minimum);
        let stride = longest + c.pick(&[0, 0, 8, 5]);
        let begin = self.block(stride * list.len(), c.pick(&[8, 8, 8, 1]), 0, c);
        self.blocks.get_mut(&begin.block).expect("a live block").private = true;
        for (i, bytes) in sized.iter().enumerate() {
            self.own(begin.offset(i * stride), bytes.len());
            self.write(begin.offset(i * stride), bytes);
        }
        (begin, stride, wrong)
    }

    /// Remembers every byte.
    pub(super) fn take_snapshot(&mut self) {
        self.snapshot.clear();
        for block in self.blocks.values() {
            self.snapshot.extend_from_slice(block.bytes());
        }
    }

    /// Whether nothing changed since but what the call may write.
    pub(super) fn check_writes(&self, writes: &Writes, refused: bool) -> Outcome {
        let mut before = self.snapshot.as_slice();
        for (id, block) in &self.blocks {
            let (old, rest) = before.split_at(block.layout.size());
            before = rest;
            let new = block.bytes();
            if old == new {
                continue;
            }
            let mut allowed = vec![false; new.len()];
            let lists = [writes.always.as_slice(), if refused { &[] } else { writes.on_success.as_slice() }];
            for (_, range) in lists.into_iter().flatten().filter(|(b, _)| b == id) {
                allowed[range.clone()].fill(true);
            }
            let changed = old.iter().zip(new).zip(&allowed).position(|((old, new), allowed)| old != new && !allowed);
            if let Some(i) = changed {
                let what = if block.owned.iter().any(|r| r.contains(&i)) { "an operand" } else { "a guard zone" };
                return Err(format!(
                    "byte {i} of block {id}, which it may not write, went from {:#04x} to {:#04x} ({what}; operands at {:?})",
                    old[i], new[i], block.owned
                ));
            }
        }
        Ok(())
    }

    /// Whether another caller's operands hold the same bits.
    pub(super) fn check_same(&self, other: &Self) -> Outcome {
        if !self.blocks.keys().eq(other.blocks.keys()) {
            return Err("the callers hold different blocks".into());
        }
        for ((id, a), b) in self.blocks.iter().zip(other.blocks.values()) {
            if a.private {
                continue;
            }
            for range in &a.owned {
                let (x, y) = (&a.bytes()[range.clone()], &b.bytes()[range.clone()]);
                if x != y {
                    let i = x.iter().zip(y).position(|(x, y)| x != y).unwrap_or(0);
                    return Err(format!(
                        "block {id}: byte {i} of the operand at {range:?} is {:#04x} with one number of threads and {:#04x} with \
                         another",
                        x[i], y[i]
                    ));
                }
            }
        }
        Ok(())
    }
}
