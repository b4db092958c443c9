//! The rank allocator: which adapters, which schedule, where their buffers lie. It checks; a backend computes.

pub mod binding;
pub mod compaction;
pub mod importance;
pub mod panels;
pub mod schedule;
pub mod selection;
pub mod state;

use crate::adapter::{Adapter, Geometry};
use crate::backend::BoundAllocator;
use crate::checkpoint;
use crate::context::Context;
use crate::error::{At, Code, Error, Result, reserve};
use crate::tensor::{Address, Region, Stream, disjoint};
use arrayvec::ArrayVec;
pub use binding::{Binding, Factor, HyperSource, SliceSource};
use parking_lot::{MappedRwLockReadGuard, MappedRwLockWriteGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
use schedule::Schedule;
use state::{Fnv, HAS_PATTERN, IS_FINAL, Layout};
use std::sync::Arc;

/// More adapters than any model has.
pub(crate) const MAX_ADAPTERS: usize = 1 << 24;
/// Steps are computed with in float64, which holds integers up to here.
const MAX_STEP: i64 = 1 << 53;

/// What a budget counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BudgetUnit {
    /// Triplets.
    Triplets,
    /// Parameters of triplets.
    Parameters,
}

/// An allocator as the caller described it.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Mean rank per adapter at the end.
    pub target_rank: i64,
    /// Steps before the budget falls.
    pub tinit: i64,
    /// Steps of the final phase.
    pub tfinal: i64,
    /// Steps of the run.
    pub total_step: i64,
    /// Steps between masks.
    pub delta_t: i64,
    /// Smoothing of the sensitivity.
    pub beta1: f64,
    /// Smoothing of the uncertainty.
    pub beta2: f64,
    /// What the budget counts.
    pub unit: BudgetUnit,
    /// Whether this process may own a part only.
    pub sharded: bool,
}

/// Everything that does not change during a run.
#[derive(Debug)]
pub struct Model {
    /// The adapters, in order.
    pub geometries: Vec<Geometry>,
    /// First triplet of each adapter, and one past the last.
    pub offsets: Vec<usize>,
    /// What the budget counts.
    pub unit: BudgetUnit,
    /// The budget over time.
    pub schedule: Schedule,
    /// Smoothing of the sensitivity.
    pub beta1: f64,
    /// Smoothing of the uncertainty.
    pub beta2: f64,
    /// Whether this process may own a part only.
    pub sharded: bool,
    /// Where the parts of the state lie.
    pub layout: Layout,
    /// Where in the Gram buffer, in elements, each adapter's `A A^T` begins (`B^T B` follows it), and the end.
    pub gram_offsets: Vec<usize>,
    /// Whether any adapter was compacted: the pattern then is final from the start.
    pub is_compacted: bool,
    /// Hash of adapters and shapes, by which a state knows whose it is.
    pub digest: u64,
}

impl Model {
    fn new(config: &Config, geometries: Vec<Geometry>) -> Result<Self> {
        config.check()?;
        let n = geometries.len() + 1;
        let (mut offsets, mut gram_offsets) = (reserve(n, "adapters")?, reserve(n, "adapters")?);
        offsets.push(0);
        gram_offsets.push(0);
        let mut gram = 0usize;
        let mut triplets = 0usize;
        let (mut initial, mut target) = (0i64, 0i64);
        let too_many =
            || Error::argument("desc.adapters", "more triplets or parameters than fit memory", "a smaller model");
        for g in &geometries {
            triplets = triplets.checked_add(g.rank).filter(|n| *n < 1 << 40).ok_or_else(too_many)?;
            offsets.push(triplets);
            let square = g.rank.checked_mul(g.rank).and_then(|n| n.checked_mul(2));
            gram = square.and_then(|n| gram.checked_add(n)).filter(|n| *n < 1 << 58).ok_or_else(too_many)?;
            gram_offsets.push(gram);
            let cost = config.unit.cost(g);
            let ranknum = g.ranknum as i64;
            initial = ranknum.checked_mul(cost).and_then(|c| initial.checked_add(c)).ok_or_else(too_many)?;
            target =
                config.target_rank.checked_mul(cost).and_then(|c| target.checked_add(c)).ok_or_else(|| {
                    Error::argument("desc.target_rank", config.target_rank, "a budget that fits 63 bits")
                })?;
        }
        if initial > MAX_STEP {
            return Err(too_many());
        }
        if target > initial {
            let unit = if config.unit == BudgetUnit::Triplets { "triplets" } else { "parameters" };
            return Err(Error::argument(
                "desc.target_rank",
                format_args!("{}, a target of {target} {unit} over {} adapters", config.target_rank, geometries.len()),
                format_args!("at most the initial {initial}"),
            ));
        }
        let layout = Layout::new(geometries.len(), triplets).ok_or_else(too_many)?;
        let is_compacted = geometries.iter().any(|g| g.rank < g.ranknum);
        let digest = geometries.iter().fold(Fnv::default(), |hash, g| {
            let ranknum = is_compacted.then_some(g.ranknum);
            let numbers = [g.rank, g.input.whole, g.output.whole].into_iter().chain(ranknum);
            numbers.fold(hash, |hash, n| hash.number(n as u64))
        });
        let schedule = Schedule {
            initial,
            target,
            tinit: config.tinit,
            end: config.total_step - config.tfinal,
            delta_t: config.delta_t,
        };
        Ok(Self {
            is_compacted,
            geometries,
            offsets,
            unit: config.unit,
            schedule,
            beta1: config.beta1,
            beta2: config.beta2,
            sharded: config.sharded,
            layout,
            gram_offsets,
            digest: digest.0,
        })
    }

    /// Triplets of all adapters.
    pub fn triplets(&self) -> usize {
        self.offsets[self.geometries.len()]
    }

    /// Triplets of one adapter.
    pub fn range(&self, adapter: usize) -> std::ops::Range<usize> {
        self.offsets[adapter]..self.offsets[adapter + 1]
    }

    /// The flags of a state where a run begins.
    pub fn fresh_flags(&self) -> i64 {
        if self.is_compacted { HAS_PATTERN | IS_FINAL } else { 0 }
    }

    /// What a triplet takes from the budget.
    pub fn cost_of_triplet(&self, triplet: usize) -> i64 {
        let adapter = self.offsets.partition_point(|first| *first <= triplet) - 1;
        self.unit.cost(&self.geometries[adapter])
    }
}

impl BudgetUnit {
    fn cost(self, geometry: &Geometry) -> i64 {
        if self == Self::Triplets { 1 } else { geometry.cost() as i64 }
    }
}

impl Config {
    fn check(&self) -> Result<()> {
        let between = |name: &str, value: i64, lowest: i64| {
            if (lowest..=MAX_STEP).contains(&value) {
                return Ok(());
            }
            Err(Error::argument(name, value, format_args!("{lowest} to 2^53")))
        };
        between("desc.target_rank", self.target_rank, 0)?;
        between("desc.tinit", self.tinit, 0)?;
        between("desc.tfinal", self.tfinal, 0)?;
        between("desc.total_step", self.total_step, 1)?;
        between("desc.delta_t", self.delta_t, 1)?;
        if self.tinit >= self.total_step - self.tfinal {
            return Err(Error::argument(
                "desc.tinit",
                self.tinit,
                format_args!(
                    "less than total_step - tfinal = {} - {}, or no step is left for the budget to fall",
                    self.total_step, self.tfinal
                ),
            ));
        }
        for (name, beta) in [("desc.beta1", self.beta1), ("desc.beta2", self.beta2)] {
            if !(beta > 0.0 && beta < 1.0) {
                return Err(Error::argument(name, beta, "a number between 0 and 1, both excluded"));
            }
        }
        Ok(())
    }
}

/// What a step reads, in the backend's memory.
#[derive(Clone, Copy, Debug)]
pub struct StepSource {
    /// The trainer's number, one i64.
    pub step: Address,
    /// Multiplies every gradient, one f64.
    pub grad_factor: Option<Address>,
    /// Above 0 where a gradient is not finite, one f32.
    pub found_inf: Option<Address>,
    /// 0 where an adapter has no gradient, one byte each.
    pub has_grad: Option<Address>,
}

impl StepSource {
    /// Refuses values in what the step writes.
    fn check(&self, binding: &Binding) -> Result<()> {
        let flags = binding.model.geometries.len();
        for (name, address, bytes) in [
            ("step.step", Some(self.step), size_of::<i64>()),
            ("step.grad_factor", self.grad_factor, size_of::<f64>()),
            ("step.found_inf", self.found_inf, size_of::<f32>()),
            ("step.has_grad", self.has_grad, flags),
        ] {
            address.map_or(Ok(()), |address| binding.apart(name, address, bytes))?;
        }
        Ok(())
    }
}

/// Bytes of the buffers that the caller gives.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// State.
    pub state: usize,
    /// Workspace.
    pub workspace: usize,
    /// Gram matrices.
    pub gram: usize,
}

/// Where a run stands.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// 1 where the triplet is kept.
    pub pattern: Vec<u8>,
    /// Triplets kept, for each adapter.
    pub ranks: Vec<i64>,
    /// Updates that AdamW applied, for each adapter.
    pub adam_steps: Vec<i64>,
    /// Counters.
    pub counters: Counters,
}

/// Counters of a run.
#[derive(Clone, Copy, Debug)]
pub struct Counters {
    /// Step of the last selection, -1 before the first.
    pub last_step: i64,
    /// Updates that `found_inf` suppressed.
    pub skipped: i64,
    /// Selections whose step did not rise.
    pub irregular: i64,
    /// How often the pattern was chosen anew.
    pub selections: i64,
    /// Budget at the last step.
    pub budget: i64,
    /// Triplets kept.
    pub live_triplets: i64,
    /// Their parameters.
    pub live_parameters: i64,
    /// Whether there is a pattern.
    pub has_pattern: bool,
    /// Whether it is final.
    pub is_final: bool,
}

/// The rank allocator over the adapters of a model.
pub struct Allocator {
    context: Arc<Context>,
    model: Arc<Model>,
    /// What a call that changes the run holds alone, and the others share.
    bound: RwLock<Option<Box<dyn BoundAllocator>>>,
}

type Reading<'a> = MappedRwLockReadGuard<'a, dyn BoundAllocator>;
type Writing<'a> = MappedRwLockWriteGuard<'a, dyn BoundAllocator>;

impl Allocator {
    /// An allocator over these adapters.
    pub fn new(context: &Arc<Context>, config: Config, adapters: &[&Adapter]) -> Result<Self> {
        if let Some(i) = adapters.iter().position(|a| !Arc::ptr_eq(a.context(), context)) {
            return Err(Error::argument(
                format_args!("desc.adapters[{i}]"),
                "an adapter of another context",
                "the allocator's",
            ));
        }
        let mut geometries = reserve(adapters.len(), "adapters")?;
        geometries.extend(adapters.iter().map(|a| *a.geometry()));
        let model = Model::new(&config, geometries)?;
        Ok(Self { context: Arc::clone(context), model: Arc::new(model), bound: RwLock::new(None) })
    }

    /// The budget over time.
    pub fn schedule(&self) -> &Schedule {
        &self.model.schedule
    }

    /// Bytes of the buffers for that many slices.
    pub fn sizes(&self, n_slices: usize) -> Result<Sizes> {
        Ok(Sizes {
            state: self.model.layout.bytes,
            workspace: self.context.backend().allocator_workspace(&self.model, n_slices)?,
            gram: self.gram_bytes(),
        })
    }

    fn gram_bytes(&self) -> usize {
        self.model.gram_offsets[self.model.geometries.len()] * size_of::<f64>()
    }

    /// Takes the caller's buffers.
    pub fn bind(
        &self,
        state: Address,
        workspace: Address,
        slices: &[SliceSource],
        hypers: &[HyperSource],
        stream: Stream,
    ) -> Result<()> {
        let sizes = self.sizes(slices.len())?;
        let binding = Binding::new(Arc::clone(&self.model), (state, workspace), sizes, slices, hypers)?;
        let mut bound = self.bound.write();
        let overwrites =
            |bound: &dyn BoundAllocator| bound.binding().apart("workspace", workspace, sizes.workspace).is_err();
        let loses_binding = bound.as_deref().is_some_and(overwrites);
        let binding = match bound.as_deref_mut() {
            Some(bound) => bound.rebind(binding, stream)?,
            None => Some(binding),
        };
        if let Some(binding) = binding {
            let made = self.context.backend().bind(binding, stream).map_err(|mut e| {
                if e.code == Code::Incomplete && loses_binding {
                    *bound = None;
                    e.message += "; nothing is bound now";
                }
                e
            })?;
            *bound = Some(made);
        }
        Ok(())
    }

    fn reading(&self) -> Result<Reading<'_>> {
        RwLockReadGuard::try_map(self.bound.read(), Option::as_deref).map_err(|_| Self::not_bound())
    }

    fn writing(&self) -> Result<Writing<'_>> {
        RwLockWriteGuard::try_map(self.bound.write(), Option::as_deref_mut).map_err(|_| Self::not_bound())
    }

    fn not_bound() -> Error {
        Error::new(Code::InvalidState, "allocator: found no buffers, expected adalora_allocator_bind before")
    }

    /// Gram matrices of the owned elements.
    pub fn gram(&self, gram: Address, stream: Stream) -> Result<()> {
        let mut bound = self.writing()?;
        bound.binding().panels()?;
        let bytes = self.gram_bytes();
        if bytes > 0 {
            gram.check("gram", align_of::<f64>())?;
        }
        bound.binding().apart("gram", gram, bytes)?;
        bound.gram(gram, stream)
    }

    /// The penalty, and its gradient added.
    pub fn orthogonality(
        &self,
        gram: Option<Address>,
        weight: f64,
        factor: Option<Address>,
        value: Option<Address>,
        stream: Stream,
    ) -> Result<()> {
        if !(weight.is_finite() && weight >= 0.0) {
            return Err(Error::argument("weight", weight, "a finite number, 0 or more"));
        }
        let gram = gram.map(|g| g.check("gram", align_of::<f64>())).transpose()?;
        let mut bound = self.writing()?;
        bound.binding().panels()?;
        self.needs_all("gram", gram, "the sum over all processes")?;
        if let Some(value) = value {
            let value = Region::contiguous(value, size_of::<f64>());
            let factor = factor.map(|f| ("factor", Region::contiguous(f, size_of::<f64>())));
            let gram = gram.map(|g| ("gram", Region::contiguous(g, self.gram_bytes())));
            let inputs: ArrayVec<_, 2> = factor.into_iter().chain(gram).collect();
            disjoint(&[("value", value)], &inputs)?;
        }
        for (name, address, bytes) in [
            ("value", value, size_of::<f64>()),
            ("factor", factor, size_of::<f64>()),
            ("gram", gram, self.gram_bytes()),
        ] {
            address.map_or(Ok(()), |address| bound.binding().apart(name, address, bytes))?;
        }
        bound.orthogonality(gram, weight, factor, value, stream)
    }

    /// Adds the gradients' squares to the trainer's sum.
    pub fn gradient_norm(
        &self,
        has_grad: Option<Address>,
        sum_of_squares: Address,
        found_inf: Option<Address>,
        stream: Stream,
    ) -> Result<()> {
        let mut bound = self.writing()?;
        let flags = has_grad.map(|h| (h, self.model.geometries.len()));
        for (name, operand) in [
            ("has_grad", flags),
            ("sum_of_squares", Some((sum_of_squares, size_of::<f64>()))),
            ("found_inf", found_inf.map(|f| (f, size_of::<f32>()))),
        ] {
            operand.map_or(Ok(()), |(address, bytes)| bound.binding().apart(name, address, bytes))?;
        }
        let mut outputs: ArrayVec<_, 2> = ArrayVec::new();
        outputs.push(("sum_of_squares", Region::contiguous(sum_of_squares, size_of::<f64>())));
        if let Some(flag) = found_inf {
            outputs.push(("found_inf", Region::contiguous(flag, size_of::<f32>())));
        }
        let flags = flags.map(|(address, bytes)| ("has_grad", Region::contiguous(address, bytes)));
        disjoint(&outputs, flags.as_slice())?;
        bound.gradient_norm(has_grad, sum_of_squares, found_inf, stream)
    }

    /// AdamW, if asked for, and importance.
    pub fn update(&self, step: &StepSource, with_adamw: bool, stream: Stream) -> Result<()> {
        self.needs_all("step.found_inf", step.found_inf, "what all processes found")?;
        let mut bound = self.writing()?;
        step.check(bound.binding())?;
        if with_adamw {
            bound.binding().serves_adamw()?;
        }
        bound.update(step, with_adamw, stream)
    }

    /// Scores of all triplets.
    pub fn scores(&self, scores: Address, stream: Stream) -> Result<()> {
        if self.model.triplets() > 0 {
            scores.check("scores", align_of::<f64>())?;
        }
        let bound = self.reading()?;
        bound.binding().apart("scores", scores, self.model.triplets() * size_of::<f64>())?;
        bound.scores(scores, stream)
    }

    /// Refuses to do without what all processes know, where this one knows a part.
    fn needs_all(&self, name: &str, given: Option<Address>, what: &str) -> Result<()> {
        if given.is_some() || !self.model.sharded {
            return Ok(());
        }
        let why = "the allocator is sharded, and its own share does not suffice";
        Err(Error::argument(name, "NULL", format_args!("{what}: {why}")))
    }

    fn given_scores(&self, bound: &dyn BoundAllocator, scores: Option<Address>) -> Result<Option<Address>> {
        if self.model.triplets() > 0 {
            self.needs_all("scores", scores, "the sum over all processes")?;
        }
        if let Some(scores) = scores {
            scores.check("scores", align_of::<f64>())?;
            bound.binding().apart("scores", scores, self.model.triplets() * size_of::<f64>())?;
        }
        Ok(scores)
    }

    /// What the schedule says for the step.
    pub fn select(&self, step: &StepSource, scores: Option<Address>, stream: Stream) -> Result<()> {
        let mut bound = self.writing()?;
        step.check(bound.binding())?;
        let scores = self.given_scores(&*bound, scores)?;
        bound.select(step, scores, stream)
    }

    /// Update, scores and selection.
    pub fn step(&self, step: &StepSource, with_adamw: bool, stream: Stream) -> Result<()> {
        if self.model.sharded {
            return Err(Error::new(
                Code::InvalidState,
                "allocator: found a sharded one, expected update, scores, their sum over processes, and select",
            ));
        }
        let mut bound = self.writing()?;
        step.check(bound.binding())?;
        if with_adamw {
            bound.binding().serves_adamw()?;
        }
        bound.step(step, with_adamw, stream)
    }

    /// The last mask, now.
    pub fn finalize(&self, scores: Option<Address>, stream: Stream) -> Result<()> {
        let mut bound = self.writing()?;
        let scores = self.given_scores(&*bound, scores)?;
        bound.finalize(scores, stream)
    }

    /// A new run.
    pub fn reset(&self, stream: Stream) -> Result<()> {
        self.writing()?.reset(stream)
    }

    /// A hash of what every process must agree on.
    pub fn digest(&self, digest: Address, stream: Stream) -> Result<()> {
        let bound = self.reading()?;
        bound.binding().apart("digest", digest, size_of::<u64>())?;
        bound.digest(digest, stream)
    }

    /// Sets the pattern.
    pub fn set_pattern(&self, pattern: Address, is_final: bool, stream: Stream) -> Result<()> {
        if self.model.triplets() > 0 {
            pattern.check("pattern", 1)?;
        }
        let mut bound = self.writing()?;
        bound.binding().apart("pattern", pattern, self.model.triplets())?;
        bound.set_pattern(pattern, is_final, stream)
    }

    /// Where the run stands.
    pub fn read_sync(&self, stream: Stream) -> Result<Snapshot> {
        let state = self.reading()?.read_sync(stream)?;
        let (model, header) = (&self.model, &state.header);
        let mut pattern = state.pattern;
        if !header.has_pattern() {
            pattern.fill(1);
        }
        let adapters = model.geometries.len();
        let mut ranks: Vec<i64> = reserve(adapters, "ranks")?;
        ranks.extend((0..adapters).map(|a| pattern[model.range(a)].iter().map(|kept| i64::from(*kept)).sum::<i64>()));
        let costs = model.geometries.iter().map(|g| g.cost() as i64);
        let started = header.steps > 0;
        let counters = Counters {
            last_step: if started { header.last_step } else { -1 },
            skipped: header.skipped,
            irregular: header.irregular,
            selections: header.selections,
            budget: match (header.is_final(), started) {
                (true, _) => model.schedule.target,
                (false, true) => model.schedule.at(header.last_step).0,
                (false, false) => model.schedule.initial,
            },
            live_triplets: ranks.iter().sum(),
            live_parameters: ranks.iter().zip(costs).map(|(rank, cost)| rank * cost).sum(),
            has_pattern: header.has_pattern(),
            is_final: header.is_final(),
        };
        Ok(Snapshot { pattern, ranks, adam_steps: state.clocks, counters })
    }

    /// How many adapters there are.
    pub fn n_adapters(&self) -> usize {
        self.model.geometries.len()
    }

    /// Sets the number of updates that led to each adapter's moments.
    pub fn set_adam_steps_sync(&self, adam_steps: &[i64], stream: Stream) -> Result<()> {
        if let Some((i, steps)) = adam_steps.iter().enumerate().find(|(_, steps)| **steps < 0) {
            return Err(Error::argument(format_args!("adam_steps[{i}]"), steps, "0 or more"));
        }
        let mut bound = self.writing()?;
        let mut state = bound.read_sync(stream)?;
        state.clocks.copy_from_slice(adam_steps);
        bound.write_sync(&state, stream)
    }

    /// Hands what the final pattern keeps, and where the run stands, to an allocator of those triplets alone.
    pub fn compact_sync(&self, compacted: &Self, stream: Stream) -> Result<()> {
        if std::ptr::eq(self, compacted) {
            return Err(Error::argument("compacted", "the allocator itself", "one over the compacted adapters"));
        }
        if !Arc::ptr_eq(&self.context, &compacted.context) {
            return Err(Error::argument("compacted", "an allocator of another context", "one of the same"));
        }
        compaction::check_adapters(&self.model, &compacted.model)?;
        let writing = || compacted.writing().at("compacted");
        // In the order of their addresses, or two calls could wait for each other.
        let (bound, mut target) = if std::ptr::from_ref(self) < std::ptr::from_ref(compacted) {
            let bound = self.reading()?;
            (bound, writing()?)
        } else {
            let target = writing()?;
            (self.reading()?, target)
        };
        let state = bound.read_sync(stream)?;
        if !state.header.is_final() {
            return Err(Error::new(
                Code::InvalidState,
                "allocator: found a pattern that may still change, expected a final one, after the last mask",
            ));
        }
        let ranks = self.model.geometries.iter().map(|g| g.rank);
        let own = compaction::compact_state(&state, ranks, &compacted.model, "compacted")?;
        let pairs = compaction::pair(bound.binding(), target.binding(), &state.pattern)?;
        bound.gather(&state.pattern, &pairs, stream)?;
        target.write_sync(&own, stream)
    }

    /// The state as bytes.
    pub fn save_state_sync(&self, stream: Stream) -> Result<Vec<u8>> {
        checkpoint::state::encode(&self.model, &self.reading()?.read_sync(stream)?)
    }

    /// The state from bytes.
    pub fn load_state_sync(&self, bytes: &[u8], stream: Stream) -> Result<()> {
        let mut bound = self.writing()?;
        let state = checkpoint::state::decode(&self.model, bytes)?;
        bound.write_sync(&state, stream)
    }
}
