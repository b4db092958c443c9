//! The allocator's state as bytes: little-endian, versioned, checksummed, the same on every machine. What is read back
//! is not trusted.
//!
//! Layout: "ADALORA\0", version (u32), reserved (u32), number of adapters (u64), for each adapter rank, in and out
//! features (u64 each), the header's counters (i64 each), clocks (i64 each), pattern (one byte a triplet), FNV-1a of
//! all before (u64).

use crate::allocator::Model;
use crate::allocator::state::{Fnv, HAS_PATTERN, Header, IS_FINAL, MAGIC, State};
use crate::error::{Code, Error, Result};

const SIGNATURE: &[u8; 8] = b"ADALORA\0";
const VERSION: u32 = 1;

/// Bytes of a state.
pub fn encode(model: &Model, state: &State) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(SIGNATURE);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend((model.geometries.len() as u64).to_le_bytes());
    for g in &model.geometries {
        for number in [g.rank, g.input.whole, g.output.whole] {
            bytes.extend((number as u64).to_le_bytes());
        }
    }
    let h = &state.header;
    for number in [h.last_step, h.steps, h.skipped, h.irregular, h.selections, h.flags].iter().chain(&state.clocks) {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(&state.pattern);
    bytes.extend(Fnv::default().bytes(&bytes).0.to_le_bytes());
    bytes
}

/// The state in bytes, for a model of the same adapters.
pub fn decode(model: &Model, bytes: &[u8]) -> Result<State> {
    let corrupt = |what: String| Error::new(Code::CorruptData, format!("bytes: {what}"));
    let short = |rest: &[u8]| corrupt(format!("found an end {} bytes after a field began", rest.len()));
    let (body, sum) = bytes.split_last_chunk::<8>().ok_or_else(|| short(bytes))?;
    let Some((signature, rest)) = body.split_first_chunk::<8>() else { return Err(short(body)) };
    if signature != SIGNATURE {
        return Err(corrupt(format!("found {signature:02x?} at the beginning, expected {SIGNATURE:02x?}")));
    }
    let Some((version, rest)) = rest.split_first_chunk::<4>() else { return Err(short(rest)) };
    let version = u32::from_le_bytes(*version);
    if version != VERSION {
        return Err(corrupt(format!("found version {version}, expected {VERSION}")));
    }
    let (found, expected) = (Fnv::default().bytes(body).0, u64::from_le_bytes(*sum));
    if found != expected {
        return Err(corrupt(format!("found checksum {found:016x}, expected {expected:016x}: damaged or cut short")));
    }
    let mut rest = rest.get(4..).ok_or_else(|| short(rest))?;
    let mut number = || {
        let (first, more) = rest.split_first_chunk::<8>().ok_or_else(|| short(rest))?;
        rest = more;
        Ok::<_, Error>(u64::from_le_bytes(*first))
    };
    let adapters = number()?;
    let expected = model.geometries.len() as u64;
    if adapters != expected {
        return Err(Error::argument("bytes", format_args!("a state of {adapters} adapters"), expected));
    }
    for (i, g) in model.geometries.iter().enumerate() {
        let (rank, input, output) = (number()?, number()?, number()?);
        if (rank, input, output) != (g.rank as u64, g.input.whole as u64, g.output.whole as u64) {
            return Err(Error::argument(
                "bytes",
                format_args!("adapter {i} of rank {rank}, {input} to {output} features"),
                format_args!("rank {}, {} to {}", g.rank, g.input.whole, g.output.whole),
            ));
        }
    }
    let mut signed = |name: &str, lowest: i64| {
        let value = number()? as i64;
        if value < lowest {
            return Err(corrupt(format!("found {name} {value}, expected at least {lowest}")));
        }
        Ok(value)
    };
    let header = Header {
        magic: MAGIC,
        model: model.digest,
        last_step: signed("last step", i64::MIN)?,
        steps: signed("number of steps", 0)?,
        skipped: signed("number of skipped steps", 0)?,
        irregular: signed("number of irregular steps", 0)?,
        selections: signed("number of selections", 0)?,
        flags: signed("flags", 0)?,
    };
    if ![0, HAS_PATTERN, HAS_PATTERN | IS_FINAL].contains(&header.flags) {
        return Err(corrupt(format!("found flags {:#x}, expected 0, 1 or 3", header.flags)));
    }
    let clocks = (0..adapters).map(|_| signed("Adam's clock", 0)).collect::<Result<Vec<_>>>()?;
    if rest.len() != model.triplets() {
        return Err(corrupt(format!("found a pattern of {} triplets, expected {}", rest.len(), model.triplets())));
    }
    if let Some(value) = rest.iter().find(|v| **v > 1) {
        return Err(corrupt(format!("found {value} in the pattern, expected 0 or 1")));
    }
    Ok(State { header, clocks, pattern: rest.to_vec() })
}
