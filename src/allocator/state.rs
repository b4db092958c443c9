//! The allocator's state: what must survive from step to step besides the caller's tensors. It lies in the caller's
//! memory, in the layout below, where kernels can reach it.

use crate::adapter::ALIGNMENT;

/// Marks memory that holds a state; 0 stands for a fresh one.
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"AdaLoRA\x01");

/// Counters, at the beginning of the state.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// `MAGIC`.
    pub magic: u64,
    /// [`super::Model::digest`]: whose state it is.
    pub model: u64,
    /// Step of the last selection.
    pub last_step: i64,
    /// Selections asked for.
    pub steps: i64,
    /// Updates that `found_inf` suppressed.
    pub skipped: i64,
    /// Selections whose step did not rise.
    pub irregular: i64,
    /// How often the pattern was chosen anew.
    pub selections: i64,
    /// `HAS_PATTERN`, `IS_FINAL`.
    pub flags: i64,
}

/// A pattern was chosen or set.
pub(crate) const HAS_PATTERN: i64 = 1;
/// It will not change any more.
pub(crate) const IS_FINAL: i64 = 2;

impl Header {
    /// Whether a pattern was chosen or set.
    pub fn has_pattern(&self) -> bool {
        self.flags & HAS_PATTERN != 0
    }

    /// Whether it is final.
    pub fn is_final(&self) -> bool {
        self.flags & IS_FINAL != 0
    }
}

/// A state on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Counters.
    pub header: Header,
    /// Updates that AdamW applied, for each adapter.
    pub clocks: Vec<i64>,
    /// 1 where the triplet is kept; meaningless before there is a pattern.
    pub pattern: Vec<u8>,
}

/// Where the parts lie: header, clocks, pattern.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Offset of the clocks.
    pub clocks: usize,
    /// Offset of the pattern.
    pub pattern: usize,
    /// Size of the whole.
    pub bytes: usize,
}

impl Layout {
    /// For that many adapters and triplets; `None` where it overflows memory.
    pub fn new(adapters: usize, triplets: usize) -> Option<Self> {
        let clocks = size_of::<Header>();
        let pattern = adapters.checked_mul(8)?.checked_add(clocks)?;
        let bytes = pattern.checked_add(triplets)?.checked_next_multiple_of(ALIGNMENT)?;
        Some(Self { clocks, pattern, bytes })
    }
}

/// FNV-1a, 64 bits: small, and the same on every machine and device.
#[derive(Clone, Copy, Debug)]
pub struct Fnv(pub u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    /// Takes bytes in.
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        self
    }

    /// Takes a number in.
    pub fn number(self, number: u64) -> Self {
        self.bytes(&number.to_le_bytes())
    }
}

/// What every process must agree on: pattern, whether it is final, last step.
pub fn digest(header: &Header, pattern: &[u8]) -> u64 {
    let head = Fnv::default().number(header.model).number(header.flags as u64).number(header.last_step as u64);
    if header.has_pattern() { head.bytes(pattern).0 } else { head.0 }
}
