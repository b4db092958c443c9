//! The allocator's state as bytes: little-endian, versioned, checksummed, the same on every machine. What is read back
//! is not trusted.
//!
//! Layout: "ADALORA\0", version (u32), reserved (u32), number of adapters (u64), for each adapter rank, in and out
//! features (u64 each), the header's counters (i64 each), clocks (i64 each), pattern (one byte a triplet), FNV-1a of
//! all before (u64).

use crate::allocator::Model;
use crate::allocator::compaction::compact_state;
use crate::allocator::state::{Fnv, HAS_PATTERN, Header, IS_FINAL, MAGIC, State};
use crate::error::{Code, Error, Result, reserve};

const SIGNATURE: &[u8; 8] = b"ADALORA\0";
const VERSION: u32 = 1;
/// Counters stay where none of them can overflow.
const MOST: u64 = 1 << 53;

/// Bytes of a state.
pub fn encode(model: &Model, state: &State) -> Result<Vec<u8>> {
    let numbers = 1 + 3 * model.geometries.len() + 6 + state.clocks.len() + 1;
    let mut bytes = reserve(SIGNATURE.len() + 8 + 8 * numbers + state.pattern.len(), "bytes")?;
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
    Ok(bytes)
}

/// The state in bytes, for a model of the same adapters.
pub fn decode(model: &Model, bytes: &[u8]) -> Result<State> {
    let corrupt = |what: String| Error::new(Code::CorruptData, format!("bytes: {what}"));
    let short =
        |rest: &[u8]| corrupt(format!("found an end {} bytes after a field began, expected a whole state", rest.len()));
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
    let Some((reserved, mut rest)) = rest.split_first_chunk::<4>() else { return Err(short(rest)) };
    if *reserved != [0; 4] {
        return Err(corrupt(format!("found {reserved:02x?} after the version, expected zeros")));
    }
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
    let mut ranks = reserve(model.geometries.len(), "adapters")?;
    for (i, g) in model.geometries.iter().enumerate() {
        let (rank, input, output) = (number()?, number()?, number()?);
        let fits = (g.rank as u64..=g.ranknum as u64).contains(&rank);
        if !fits || (input, output) != (g.input.whole as u64, g.output.whole as u64) {
            return Err(Error::argument(
                "bytes",
                format_args!("adapter {i} of rank {rank}, {input} to {output} features"),
                format_args!("rank {}, {} to {}", g.rank, g.input.whole, g.output.whole),
            ));
        }
        ranks.push(rank as usize);
    }
    let triplets: usize = ranks.iter().sum();
    let last_step = number()? as i64;
    let mut count = |name: &str| match number()? {
        value if value <= MOST => Ok(value as i64),
        value => Err(corrupt(format!("found {value} for the {name}, expected at most 2^53"))),
    };
    let header = Header {
        magic: MAGIC,
        model: model.digest,
        last_step,
        steps: count("number of steps")?,
        skipped: count("number of skipped steps")?,
        irregular: count("number of irregular steps")?,
        selections: count("number of selections")?,
        flags: count("flags")?,
    };
    if ![0, HAS_PATTERN, HAS_PATTERN | IS_FINAL].contains(&header.flags) {
        return Err(corrupt(format!("found flags {:#x}, expected 0, 1 or 3", header.flags)));
    }
    let mut clocks = reserve(model.geometries.len(), "clocks")?;
    for _ in 0..adapters {
        clocks.push(count("clock of an adapter")?);
    }
    if rest.len() != triplets {
        return Err(corrupt(format!("found a pattern of {} triplets, expected {triplets}", rest.len())));
    }
    if let Some(value) = rest.iter().find(|v| **v > 1) {
        return Err(corrupt(format!("found {value} in the pattern, expected 0 or 1")));
    }
    if !header.has_pattern() && rest.contains(&0) {
        return Err(corrupt("found a triplet that is not kept before there is a pattern".into()));
    }
    let mut pattern = reserve(rest.len(), "triplets")?;
    pattern.extend(rest);
    let state = State { header, clocks, pattern };
    if model.is_compacted && !state.header.is_final() {
        let found = "a state from before compaction whose pattern may still change";
        return Err(Error::argument("bytes", found, "one whose pattern is final"));
    }
    if ranks.iter().zip(&model.geometries).all(|(rank, g)| *rank == g.rank) {
        return Ok(state);
    }
    compact_state(&state, ranks.into_iter(), model, "bytes")
}
