//! Compaction: the triplets that a final pattern keeps go on alone, in buffers of their own.

use super::binding::Slice;
use super::state::{Header, State};
use super::{Binding, Factor, Model};
use crate::adapter::Geometry;
use crate::error::{At, Error, Result, reserve};
use crate::tensor::{Address, Dtype};

/// A slice, and the one that receives what is kept of it.
#[derive(Clone, Copy, Debug)]
pub struct Compacted {
    /// Of the run before.
    pub from: Slice,
    /// Of the compacted run.
    pub to: Slice,
}

impl Compacted {
    /// The arrays that both have: name, where each begins, element type.
    pub fn arrays(&self) -> impl Iterator<Item = (&'static str, Address, Address, Dtype)> + use<> {
        let (from, to) = (self.from, self.to);
        let low = from.p_low.zip(to.p_low);
        let moments = from.moments.zip(to.moments);
        let state = from.state_dtype;
        [
            Some(("p", from.p.0, to.p.0, from.p.1)),
            low.map(|(from, to)| ("p_low", from.0, to.0, from.1)),
            Some(("g", from.g.0, to.g.0, from.g.1)),
            moments.map(|(from, to)| ("m", from.0, to.0, state)),
            moments.map(|(from, to)| ("v", from.1, to.1, state)),
            Some(("exp_avg_ipt", from.exp_avg_ipt, to.exp_avg_ipt, state)),
            Some(("exp_avg_unc", from.exp_avg_unc, to.exp_avg_unc, state)),
        ]
        .into_iter()
        .flatten()
    }
}

impl Factor {
    /// The triplet that an element belongs to.
    pub fn triplet(self, element: usize, geometry: &Geometry) -> usize {
        match self {
            Self::A => element / geometry.input.whole,
            Self::E => element,
            Self::B => element % geometry.rank,
        }
    }

    /// How many of the elements before this one belong to triplets that are kept.
    fn kept_before(self, element: usize, geometry: &Geometry, kept: &[u8]) -> usize {
        let count = |triplets: usize| kept[..triplets].iter().filter(|k| **k != 0).count();
        match self {
            Self::A => {
                let (row, column) = (element / geometry.input.whole, element % geometry.input.whole);
                let in_row = if kept.get(row).is_some_and(|k| *k != 0) { column } else { 0 };
                count(row) * geometry.input.whole + in_row
            }
            Self::E => count(element),
            Self::B if geometry.rank == 0 => 0,
            Self::B => element / geometry.rank * count(geometry.rank) + count(element % geometry.rank),
        }
    }
}

/// Refuses adapters of other layers than these.
pub fn check_adapters(model: &Model, compacted: &Model) -> Result<()> {
    let (found, expected) = (compacted.geometries.len(), model.geometries.len());
    if found != expected {
        return Err(Error::argument("compacted", format_args!("one of {found} adapters"), expected));
    }
    for (i, (of, to)) in model.geometries.iter().zip(&compacted.geometries).enumerate() {
        let key = |g: &Geometry| (g.input.whole, g.output.whole, g.ranknum, g.param_dtype);
        if key(of) != key(to) {
            let describe = |g: &Geometry| {
                let (input, output) = (g.input.whole, g.output.whole);
                format!("{input} to {output} features of {}, ranknum {}", g.param_dtype, g.ranknum)
            };
            return Err(Error::argument(format_args!("compacted: adapters[{i}]"), describe(to), describe(of)));
        }
    }
    Ok(())
}

/// A state whose pattern is final, as the state of adapters that have those triplets alone that it keeps.
///
/// `ranks` are the adapters' in `state`.
pub fn compact_state(state: &State, ranks: impl Iterator<Item = usize>, model: &Model, name: &str) -> Result<State> {
    let mut rest = state.pattern.as_slice();
    for (i, (rank, geometry)) in ranks.zip(&model.geometries).enumerate() {
        let (own, more) = rest.split_at(rank);
        rest = more;
        let kept = own.iter().filter(|k| **k != 0).count();
        if kept != geometry.rank {
            return Err(Error::argument(
                name,
                format_args!("rank {} of adapter {i}, of which the pattern keeps {kept} triplets", geometry.rank),
                format_args!("rank {kept}"),
            ));
        }
    }
    let header = Header { model: model.digest, ..state.header };
    let mut clocks = reserve(state.clocks.len(), "clocks")?;
    clocks.extend(&state.clocks);
    let mut pattern = reserve(model.triplets(), "triplets")?;
    pattern.resize(model.triplets(), 1);
    Ok(State { header, clocks, pattern })
}

/// Pairs the slices of a run with those of the compacted one, which own what is kept of the same elements.
pub fn pair(from: &Binding, to: &Binding, pattern: &[u8]) -> Result<Vec<Compacted>> {
    let model = &from.model;
    let mut pairs: Vec<Compacted> = reserve(from.slices.len(), "slices")?;
    let place = |slice: &Slice| format!("compacted: slices[{}]", slice.index);
    let mut others = to.slices.iter().filter(|s| !s.is_empty());
    for slice in &from.slices {
        let geometry = &model.geometries[slice.adapter];
        let kept = &pattern[model.range(slice.adapter)];
        let [begin, end] = [slice.begin, slice.end].map(|e| slice.factor.kept_before(e, geometry, kept));
        if begin == end {
            continue;
        }
        let expected = || {
            let (factor, adapter) = (slice.factor, slice.adapter);
            format!("a slice of elements {begin} to {end} of {factor:?} of adapter {adapter}")
        };
        let Some(other) = others.next() else {
            return Err(Error::argument("compacted", "no further slice", expected()));
        };
        if (other.adapter, other.factor, other.begin, other.end) != (slice.adapter, slice.factor, begin, end) {
            let (factor, adapter) = (other.factor, other.adapter);
            let found = format!("elements {} to {} of {factor:?} of adapter {adapter}", other.begin, other.end);
            return Err(Error::argument(place(other), found, expected()));
        }
        let types = |s: &Slice| [Some(s.p.1), s.p_low.map(|p| p.1), Some(s.g.1)];
        if types(other) != types(slice) {
            let name = |s: &Slice| {
                let low = s.p_low.map_or_else(|| "none".to_owned(), |p| p.1.to_string());
                format!("p of {}, p_low of {low}, g of {}", s.p.1, s.g.1)
            };
            return Err(Error::argument(place(other), name(other), name(slice)));
        }
        let pair = Compacted { from: *slice, to: *other };
        for (name, _, address, dtype) in pair.arrays() {
            let bytes = other.len() * dtype.size();
            from.apart(name, address, bytes).at_index("slices", other.index).at("compacted")?;
        }
        pairs.push(pair);
    }
    match others.next() {
        None => Ok(pairs),
        Some(other) => {
            let (factor, adapter) = (other.factor, other.adapter);
            let found = format!("elements of {factor:?} of adapter {adapter}, of which this process owned none");
            Err(Error::argument(place(other), found, "no such slice"))
        }
    }
}
