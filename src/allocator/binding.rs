//! Where everything lies: the caller's slices, checked against the model and against each other.

use super::panels::{Panel, Panels, panels};
use super::{Model, Sizes};
use crate::adapter::ALIGNMENT;
use crate::error::{At, Code, Error, Result, reserve};
use crate::tensor::{Address, Dtype};
use std::sync::Arc;

/// Which of an adapter's matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Factor {
    /// Right vectors, [rank, in].
    A,
    /// Values, `rank` of them.
    E,
    /// Left vectors, [out, rank].
    B,
}

/// A slice as the caller described it.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the header's adalora_slice_t documents each field")]
pub struct SliceSource {
    pub adapter: i64,
    pub factor: Factor,
    pub begin: i64,
    pub end: i64,
    pub hyper: i32,
    pub p_dtype: Option<Dtype>,
    pub g_dtype: Option<Dtype>,
    pub replica: bool,
    pub p: Address,
    pub p_low: Option<Address>,
    pub g: Address,
    pub m: Option<Address>,
    pub v: Option<Address>,
    pub exp_avg_ipt: Address,
    pub exp_avg_unc: Address,
}

/// AdamW's hyperparameters: where the changing ones lie, and the constant ones.
#[derive(Clone, Copy, Debug)]
pub struct HyperSource {
    /// Learning rate, one f64.
    pub lr: Address,
    /// Weight decay, one f64.
    pub weight_decay: Address,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
}

/// A slice, checked.
#[derive(Clone, Copy, Debug)]
pub struct Slice {
    /// Position of the adapter.
    pub adapter: usize,
    /// Which matrix.
    pub factor: Factor,
    /// First element.
    pub begin: usize,
    /// One past the last.
    pub end: usize,
    /// Position of its hyperparameters.
    pub hyper: usize,
    /// Another process counts it.
    pub replica: bool,
    /// Parameters and their type.
    pub p: (Address, Dtype),
    /// Half-precision copy and its type.
    pub p_low: Option<(Address, Dtype)>,
    /// Gradients and their type.
    pub g: (Address, Dtype),
    /// AdamW's moments, of the state type.
    pub moments: Option<(Address, Address)>,
    /// Smoothed sensitivity, of the state type.
    pub exp_avg_ipt: Address,
    /// Its uncertainty, of the state type.
    pub exp_avg_unc: Address,
    /// The state type.
    pub state_dtype: Dtype,
    /// Position in the caller's array, by which messages name it.
    pub index: usize,
}

impl Slice {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.end - self.begin
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.begin == self.end
    }
}

/// Where everything lies.
pub struct Binding {
    /// Whose.
    pub model: Arc<Model>,
    /// The caller's state.
    pub state: Address,
    /// The caller's workspace.
    pub workspace: Address,
    /// Slices, by adapter, matrix and element.
    pub slices: Vec<Slice>,
    /// Hyperparameters.
    pub hypers: Vec<HyperSource>,
    panels: Panels,
    places: Vec<Place>,
}

/// An array that is bound: from where to where, and how messages name it.
type Place = (usize, usize, &'static str, Option<usize>);

impl Binding {
    /// Checks slices, hyperparameters and buffers.
    pub fn new(
        model: Arc<Model>,
        (state, workspace): (Address, Address),
        sizes: Sizes,
        sources: &[SliceSource],
        hypers: &[HyperSource],
    ) -> Result<Self> {
        state.check("state", ALIGNMENT)?;
        if sizes.workspace > 0 {
            workspace.check("workspace", ALIGNMENT)?;
        }
        for (i, hyper) in hypers.iter().enumerate() {
            hyper.check().at_index("hypers", i)?;
        }
        let mut slices = reserve(sources.len(), "slices")?;
        for (i, source) in sources.iter().enumerate() {
            slices.push(source.check(i, &model, hypers.len()).at_index("slices", i)?);
        }
        slices.sort_unstable_by_key(|s: &Slice| (s.adapter, s.factor, s.begin, s.index));
        check_coverage(&model, &slices)?;
        let places =
            check_overlaps(&slices, [("state", state, sizes.state), ("workspace", workspace, sizes.workspace)])?;
        for (i, hyper) in hypers.iter().enumerate() {
            for (name, address) in [("lr", hyper.lr), ("weight_decay", hyper.weight_decay)] {
                apart(&places, name, address, size_of::<f64>()).at_index("hypers", i)?;
            }
        }
        let panels = panels(&model, &slices)?;
        let mut own_hypers = reserve(hypers.len(), "hypers")?;
        own_hypers.extend(hypers);
        Ok(Self { model, state, workspace, slices, hypers: own_hypers, panels, places })
    }

    /// Whole columns of all factors; an error where this process owns some only in part.
    pub fn panels(&self) -> Result<&[Panel]> {
        self.panels.as_deref().map_err(|text| Error::new(Code::InvalidState, text.clone()))
    }

    /// Refuses an operand of a call that overlaps what is bound.
    pub fn apart(&self, name: &str, address: Address, bytes: usize) -> Result<()> {
        apart(&self.places, name, address, bytes)
    }

    /// Refuses AdamW where moments or hyperparameters are not bound.
    pub fn serves_adamw(&self) -> Result<()> {
        let lacking = |what: &str, slice: &Slice| {
            Error::new(
                Code::InvalidState,
                format!("with_adamw: found 1, expected 0: slices[{}] was bound without {what}", slice.index),
            )
        };
        for slice in self.slices.iter().filter(|s| !s.is_empty()) {
            if slice.moments.is_none() {
                return Err(lacking("m and v", slice));
            }
            if self.hypers.is_empty() {
                return Err(lacking("hyperparameters", slice));
            }
        }
        Ok(())
    }
}

impl HyperSource {
    fn check(&self) -> Result<()> {
        for (name, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::argument(name, beta, "a number in [0, 1)"));
            }
        }
        if !(self.eps.is_finite() && self.eps >= 0.0) {
            return Err(Error::argument("eps", self.eps, "a finite number, 0 or more"));
        }
        Ok(())
    }
}

impl SliceSource {
    fn check(&self, index: usize, model: &Model, n_hypers: usize) -> Result<Slice> {
        let adapters = model.geometries.len();
        let adapter = usize::try_from(self.adapter)
            .ok()
            .filter(|a| *a < adapters)
            .ok_or_else(|| Error::argument("adapter", self.adapter, format_args!("0 to {}", adapters - 1)))?;
        let geometry = &model.geometries[adapter];
        let size = match self.factor {
            Factor::A => geometry.rank * geometry.input.whole,
            Factor::E => geometry.rank,
            Factor::B => geometry.rank * geometry.output.whole,
        };
        let range = usize::try_from(self.begin).ok().zip(usize::try_from(self.end).ok());
        let (begin, end) = range.filter(|(begin, end)| begin <= end && *end <= size).ok_or_else(|| {
            Error::argument(
                "begin and end",
                format_args!("{} and {}", self.begin, self.end),
                format_args!("a range within the {size} elements of {:?}", self.factor),
            )
        })?;
        let hyper = usize::try_from(self.hyper)
            .ok()
            .filter(|h| *h < n_hypers.max(1))
            .ok_or_else(|| Error::argument("hyper", self.hyper, format_args!("less than n_hyper = {n_hypers}")))?;
        let state_dtype = geometry.compute_dtype();
        let low = geometry.param_dtype;
        if self.p_low.is_some() && low == state_dtype {
            return Err(Error::argument(
                "p_low",
                "an address",
                format_args!("NULL: the adapter's parameters are {low}, and need no half-precision copy"),
            ));
        }
        let own = if self.p_low.is_some() { state_dtype } else { low };
        let p_dtype = self.p_dtype.unwrap_or(own);
        if p_dtype != own {
            return Err(Error::argument("p_dtype", p_dtype, own));
        }
        let g_dtype = self.g_dtype.unwrap_or(low);
        if g_dtype != low && g_dtype != state_dtype {
            return Err(Error::argument("g_dtype", g_dtype, format_args!("{low} or {state_dtype}")));
        }
        let moments = match (self.m, self.v) {
            (Some(m), Some(v)) => Some((m, v)),
            (None, None) => None,
            (None, _) => return Err(Error::argument("m", "NULL beside v", "an address, or NULL for both")),
            (_, None) => return Err(Error::argument("v", "NULL beside m", "an address, or NULL for both")),
        };
        if begin < end {
            self.p.check("p", p_dtype.size())?;
            self.g.check("g", g_dtype.size())?;
            if let Some(p_low) = self.p_low {
                p_low.check("p_low", low.size())?;
            }
            if let Some((m, v)) = moments {
                m.check("m", state_dtype.size())?;
                v.check("v", state_dtype.size())?;
            }
            self.exp_avg_ipt.check("exp_avg_ipt", state_dtype.size())?;
            self.exp_avg_unc.check("exp_avg_unc", state_dtype.size())?;
        }
        Ok(Slice {
            adapter,
            factor: self.factor,
            begin,
            end,
            hyper,
            replica: self.replica,
            p: (self.p, p_dtype),
            p_low: self.p_low.map(|p| (p, low)),
            g: (self.g, g_dtype),
            moments,
            exp_avg_ipt: self.exp_avg_ipt,
            exp_avg_unc: self.exp_avg_unc,
            state_dtype,
            index,
        })
    }
}

/// Refuses elements that two slices claim, and, unless sharded, elements that none does.
fn check_coverage(model: &Model, slices: &[Slice]) -> Result<()> {
    let mut rest = slices;
    for (adapter, geometry) in model.geometries.iter().enumerate() {
        let sizes = [
            (Factor::A, geometry.rank * geometry.input.whole),
            (Factor::E, geometry.rank),
            (Factor::B, geometry.rank * geometry.output.whole),
        ];
        for (factor, size) in sizes {
            let n = rest.partition_point(|s| (s.adapter, s.factor) <= (adapter, factor));
            let (own, more) = rest.split_at(n);
            rest = more;
            let mut next = 0;
            let missing = |begin: usize, end: usize| {
                Error::argument(
                    "slices",
                    format_args!("none for elements {begin} to {end} of {factor:?} of adapter {adapter}"),
                    "all: the allocator is not sharded",
                )
            };
            for slice in own.iter().filter(|s| !s.is_empty()) {
                if slice.begin < next {
                    return Err(Error::argument(
                        "begin",
                        format_args!("element {} of {factor:?} of adapter {adapter} a second time", slice.begin),
                        "each element in one slice",
                    ))
                    .at_index("slices", slice.index);
                }
                if slice.begin > next && !model.sharded {
                    return Err(missing(next, slice.begin));
                }
                next = slice.end;
            }
            if next < size && !model.sharded {
                return Err(missing(next, size));
            }
        }
    }
    Ok(())
}

fn apart(places: &[Place], name: &str, address: Address, bytes: usize) -> Result<()> {
    let next = places.partition_point(|place| place.1 <= address.0);
    match places.get(next).filter(|place| place.0 < address.0.saturating_add(bytes)) {
        Some((_, _, other, index)) => Err(overlap(name, &named(other, *index))),
        None => Ok(()),
    }
}

fn named(name: &str, index: Option<usize>) -> String {
    index.map_or_else(|| name.to_owned(), |i| format!("slices[{i}].{name}"))
}

fn overlap(name: &str, other: &str) -> Error {
    Error::argument(name, format_args!("memory that overlaps {other}"), "memory of its own")
}

/// All arrays by address; refuses those that share memory.
fn check_overlaps(slices: &[Slice], buffers: [(&'static str, Address, usize); 2]) -> Result<Vec<Place>> {
    let mut places: Vec<Place> = reserve(7 * slices.len() + 2, "arrays")?;
    for (name, address, bytes) in buffers {
        places.push((address.0, address.0 + bytes, name, None));
    }
    for slice in slices.iter().filter(|s| !s.is_empty()) {
        let mut push = |name, address: Address, dtype: Dtype| {
            let bytes = slice.len() * dtype.size();
            places.push((address.0, address.0.saturating_add(bytes), name, Some(slice.index)));
        };
        push("p", slice.p.0, slice.p.1);
        push("g", slice.g.0, slice.g.1);
        if let Some((p_low, dtype)) = slice.p_low {
            push("p_low", p_low, dtype);
        }
        if let Some((m, v)) = slice.moments {
            push("m", m, slice.state_dtype);
            push("v", v, slice.state_dtype);
        }
        push("exp_avg_ipt", slice.exp_avg_ipt, slice.state_dtype);
        push("exp_avg_unc", slice.exp_avg_unc, slice.state_dtype);
    }
    places.sort_unstable();
    places.retain(|place| place.0 < place.1);
    for pair in places.windows(2) {
        let ((_, end, first, i), (begin, _, second, j)) = (pair[0], pair[1]);
        if begin < end {
            return Err(overlap(&named(second, j), &named(first, i)));
        }
    }
    Ok(places)
}
