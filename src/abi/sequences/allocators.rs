//! Calls on allocators, and what must hold after each.

use super::adapters::Geometry;
use super::binding::{Bound, Piece};
use super::memory::{Place, Writes, bytes_of};
use super::{Choices, Expect, Outcome, World, call, ensure};
use crate::abi::adapter::Adapter;
use crate::abi::allocator::{Allocator as Handle, *};
use crate::abi::status::*;
use crate::abi::types::*;
use std::ffi::c_void;
use std::mem::{MaybeUninit, offset_of};
use std::ops::Range;
use std::ptr::NonNull;

/// An allocator of the caller's, and what the caller knows of it.
pub(super) struct Allocator {
    pub(super) context: u64,
    pub(super) handle: *mut Handle,
    pub(super) d: AllocatorDesc,
    pub(super) geos: Vec<Geometry>,
    pub(super) sharded: bool,
    pub(super) bound: Option<Bound>,
    /// What the last look at it showed; nothing where a new run began since.
    pub(super) seen: Option<Seen>,
    schedule: Schedule,
}

/// What is wrong with a descriptor, a handle or a place for one.
#[derive(Default)]
pub(super) struct Wrong {
    size: Option<usize>,
    null: bool,
    no_slot: bool,
    no_context: bool,
    no_adapters: bool,
}

/// The schedule, as the header states it.
#[derive(Clone, Copy)]
struct Schedule {
    in_parameters: bool,
    initial: i64,
    target: i64,
    tinit: i64,
    end: i64,
    delta_t: i64,
}

impl Schedule {
    fn new(geos: &[Geometry], d: &AllocatorDesc) -> Self {
        Self {
            in_parameters: d.budget_unit == ADALORA_BUDGET_PARAMETERS,
            initial: geos.iter().map(|g| g.ranknum * cost(g, d.budget_unit)).sum(),
            target: geos.iter().map(|g| d.target_rank * cost(g, d.budget_unit)).sum(),
            tinit: d.tinit,
            end: d.total_step - d.tfinal,
            delta_t: d.delta_t,
        }
    }

    fn at(&self, step: i64) -> (i64, bool) {
        if step <= self.tinit {
            (self.initial, false)
        } else if step <= self.end {
            let progress = (step - self.tinit) as f64 / (self.end - self.tinit) as f64;
            let budget = (self.initial - self.target) as f64 * (1.0 - progress).powf(3.0) + self.target as f64;
            (budget as i64, step % self.delta_t == 0)
        } else {
            (self.target, true)
        }
    }
}

fn cost(g: &Geometry, budget_unit: i32) -> i64 {
    if budget_unit == ADALORA_BUDGET_PARAMETERS { g.cost() } else { 1 }
}

/// The highest target rank whose budget is at most the initial one.
pub(super) fn highest_target(geos: &[Geometry], budget_unit: i32) -> i64 {
    let initial: i64 = geos.iter().map(|g| g.ranknum * cost(g, budget_unit)).sum();
    initial / geos.iter().map(|g| cost(g, budget_unit)).sum::<i64>()
}

/// What a look at an allocator showed.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Seen {
    pub(super) pattern: Vec<u8>,
    adam_steps: Vec<i64>,
    last_step: i64,
    skipped: i64,
    irregular: i64,
    selections: i64,
    budget: i64,
    has_pattern: bool,
    is_final: bool,
}

impl Allocator {
    fn triplets(&self) -> usize {
        self.geos.iter().map(|g| g.rank as usize).sum()
    }

    pub(super) fn is_final(&self) -> bool {
        self.seen.as_ref().is_some_and(|s| s.is_final)
    }

    /// Whether an adapter was compacted.
    fn is_compacted(&self) -> bool {
        self.geos.iter().any(|g| g.rank < g.ranknum)
    }

    pub(super) fn pieces(&self) -> Vec<Piece> {
        self.bound.as_ref().map_or_else(Vec::new, |b| b.pieces.clone())
    }

    pub(super) fn first_triplet(&self, adapter: usize) -> usize {
        self.geos[..adapter].iter().map(|g| g.rank as usize).sum()
    }

    /// What a call that changes the run may always write.
    fn own_writes(&self) -> Writes {
        let mut writes = Writes::default();
        if let Some(b) = &self.bound {
            writes.bytes(b.state, b.state_bytes);
            writes.bytes(b.workspace, b.workspace_bytes);
        }
        writes
    }

    /// E of the triplets that a pattern masks; of all where it is not known.
    fn masked_writes(&self, pattern: Option<&[u8]>, writes: &mut Writes) {
        for p in self.pieces().iter().filter(|p| p.matrix == ADALORA_MATRIX_E) {
            let first = self.first_triplet(p.adapter);
            for i in p.begin..p.end {
                if pattern.is_none_or(|kept| kept[first + i] == 0) {
                    for (place, dtype) in [Some(p.p), p.p_low].into_iter().flatten() {
                        let size = super::memory::size_of_dtype(dtype);
                        writes.bytes(place.offset((i - p.begin) * size), size);
                    }
                }
            }
        }
    }

    /// Those of the elements of a piece's matrix that belong to kept triplets.
    pub(super) fn kept_elements(&self, p: &Piece, kept: &[u8], elements: Range<usize>) -> Vec<usize> {
        let (g, first) = (&self.geos[p.adapter], self.first_triplet(p.adapter));
        let triplet = |element: usize| match p.matrix {
            ADALORA_MATRIX_A => element / g.input as usize,
            ADALORA_MATRIX_E => element,
            _ => element % g.rank as usize,
        };
        elements.filter(|e| kept[first + triplet(*e)] != 0).collect()
    }

    /// What setting a pattern may write.
    pub(super) fn pattern_writes(&self, kept: &[u8], is_final: i32) -> Writes {
        let mut writes = self.own_writes();
        self.masked_writes(Some(kept), &mut writes);
        if is_final == 1 {
            self.averages().for_each(|(place, bytes)| writes.bytes(place, bytes));
        }
        writes
    }

    fn averages(&self) -> impl Iterator<Item = (Place, usize)> {
        self.pieces().into_iter().flat_map(|p| [(p.averages.0, p.state_bytes()), (p.averages.1, p.state_bytes())])
    }

    /// Whether a state's bytes are of these adapters, or of these before their compaction.
    fn takes(&self, bytes: &[u8]) -> bool {
        let number = |at: usize| i64::from_le_bytes(std::array::from_fn(|k| bytes[at + k]));
        let n = self.geos.len();
        if number(16) != n as i64 {
            return false;
        }
        let shape = |k: usize| [0, 1, 2].map(|field| number(24 + 24 * k + 8 * field));
        let of = |(k, g): (usize, &Geometry)| {
            let [rank, input, output] = shape(k);
            (g.rank..=g.ranknum).contains(&rank) && (input, output) == (g.input, g.output)
        };
        if !self.geos.iter().enumerate().all(of) {
            return false;
        }
        let is_theirs = self.geos.iter().enumerate().all(|(k, g)| shape(k)[0] == g.rank);
        let mut pattern = &bytes[counters_of(n) + 8 * (6 + n)..bytes.len() - 8];
        let keeps_these = self.geos.iter().enumerate().all(|(k, g)| {
            let (own, rest) = pattern.split_at(shape(k)[0] as usize);
            pattern = rest;
            own.iter().filter(|kept| **kept == 1).count() as i64 == g.rank
        });
        !self.is_compacted() || (number(counters_of(n) + 40) == 3 && (is_theirs || keeps_these))
    }

    /// The triplets that stay within a budget: highest scores first, then lower numbers.
    fn choice(&self, scores: &[f64], budget: i64) -> Option<Vec<u8>> {
        if scores.iter().any(|s| s.is_nan()) {
            return None;
        }
        let costs: Vec<i64> = self.geos.iter().flat_map(|g| vec![g.cost(); g.rank as usize]).collect();
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| scores[*b].partial_cmp(&scores[*a]).expect("no NaN"));
        let (mut pattern, mut left) = (vec![0; scores.len()], budget);
        for i in order {
            left -= if self.schedule.in_parameters { costs[i] } else { 1 };
            if left < 0 {
                break;
            }
            pattern[i] = 1;
        }
        Some(pattern)
    }
}

/// Arguments of an update, a selection, or both.
struct StepValues {
    d: Step,
    t: i64,
    factor: f64,
    found_inf: Option<f32>,
    has_grad: Option<Vec<u8>>,
    null: bool,
    spoiled: Option<usize>,
}

impl World {
    pub(super) fn create_allocator(&mut self, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let context = self.some_context(c)?;
        let id = self.contexts[context].id;
        let wanted = c.pick(&[1, 1, 2, 3, 4]);
        while self.adapters.iter().filter(|a| a.context == id).count() < wanted {
            self.create_adapter_in(context, c, None)?;
        }
        let mut own: Vec<usize> = (0..self.adapters.len()).filter(|i| self.adapters[*i].context == id).collect();
        c.shuffle(&mut own);
        own.truncate(wanted);
        let geos: Vec<Geometry> = own.iter().map(|i| self.adapters[*i].g).collect();
        let mut handles: Vec<*const Adapter> = own.iter().map(|i| self.adapters[*i].handle.cast_const()).collect();
        let budget_unit = if c.chance(35) { ADALORA_BUDGET_PARAMETERS } else { c.pick(&[0, ADALORA_BUDGET_TRIPLETS]) };
        let highest = highest_target(&geos, budget_unit);
        let target_rank = c.below(highest as usize + 1) as i64;
        let total_step = 1 + c.below(20) as i64;
        let tfinal = c.below(total_step as usize) as i64;
        let tinit = c.below((total_step - tfinal) as usize) as i64;
        let mut d = AllocatorDesc {
            struct_size: 0,
            n_adapters: wanted as i64,
            adapters: std::ptr::null(),
            target_rank,
            tinit,
            tfinal,
            total_step,
            delta_t: c.pick(&[1, 1, 2, 3, 100]),
            beta1: c.pick(&[0.85, 0.5, 1e-9, 0.999_999_999]),
            beta2: c.pick(&[0.85, 0.5, 1e-9]),
            budget_unit,
            sharded: i32::from(c.chance(30)),
        };
        let mut expect = Expect::default();
        let mut wrong = Wrong::default();
        if let Some(w) = w {
            let i = w.below(wanted);
            match w.below(22) {
                0 => wrong.size = Some(0),
                1 => (wrong.null, ()) = (true, expect.argument("desc")),
                2 => (wrong.no_slot, ()) = (true, expect.argument("allocator")),
                3 => (wrong.no_context, ()) = (true, expect.handle("context")),
                4 => (wrong.no_adapters, ()) = (true, expect.argument("desc.adapters")),
                5 => {
                    handles[i] = self.adapter_handle(own[i], true, w);
                    expect.handle(format!("desc.adapters[{i}]"));
                }
                6 => {
                    if let Some(stranger) = self.adapters.iter().find(|a| a.context != id) {
                        handles[i] = stranger.handle;
                        expect.argument(format!("desc.adapters[{i}]"));
                    }
                }
                7 => {
                    (d.n_adapters, ()) = (w.pick(&[0, -1, (1 << 24) + 1, i64::MAX]), expect.argument("desc.n_adapters"))
                }
                8 | 9 => {
                    d.target_rank = w.pick(&[highest + 1, -1, i64::MAX, i64::MIN, 1 << 50]);
                    expect.argument("desc.target_rank");
                }
                10 | 11 => {
                    (d.tinit, ()) = (w.pick(&[total_step - tfinal, -1, i64::MAX]), expect.argument("desc.tinit"))
                }
                12 => (d.tfinal, ()) = (w.pick(&[-1, i64::MIN, i64::MAX]), expect.argument("desc.tfinal")),
                13 => (d.tfinal, ()) = (total_step - tinit, expect.argument("desc.tinit")),
                14 => (d.total_step, ()) = (w.pick(&[0, -1, i64::MAX, i64::MIN]), expect.argument("desc.total_step")),
                15 => (d.delta_t, ()) = (w.pick(&[0, -1, i64::MIN]), expect.argument("desc.delta_t")),
                16 => (d.beta1, ()) = (w.pick(&[0.0, 1.0, f64::NAN, -0.5, 2.0]), expect.argument("desc.beta1")),
                17 => (d.beta2, ()) = (w.pick(&[0.0, 1.0, f64::NAN, f64::INFINITY]), expect.argument("desc.beta2")),
                18 => (d.budget_unit, ()) = (w.pick(&[3, -1, i32::MAX]), expect.argument("desc.budget_unit")),
                _ => (d.sharded, ()) = (w.pick(&[2, -1]), expect.argument("desc.sharded")),
            }
        }
        self.make_allocator(context, (&geos, &handles), d, wrong, expect, c).map(drop)
    }

    /// The call; whether it succeeded.
    pub(super) fn make_allocator(
        &mut self,
        context: usize,
        (geos, handles): (&[Geometry], &[*const Adapter]),
        mut d: AllocatorDesc,
        wrong: Wrong,
        mut expect: Expect,
        c: &mut Choices,
    ) -> Result<bool, String> {
        let addresses: Vec<u8> = handles.iter().flat_map(|h| (h.addr()).to_le_bytes()).collect();
        let list = self.memory.private(addresses.len(), 8, c);
        self.memory.write(list, &addresses);
        d.adapters = if wrong.no_adapters { std::ptr::null() } else { self.memory.pointer(list) };
        let minimum = offset_of!(AllocatorDesc, beta2) + 8;
        let (place, _, name) = self.memory.descriptors(&[bytes_of(&d)], minimum, wrong.size, c);
        if wrong.size.is_some() {
            expect.argument(format!("desc{name}"));
        }
        let desc = if wrong.null { std::ptr::null() } else { self.memory.pointer::<AllocatorDesc>(place).cast_const() };
        let slot = self.slot(c);
        let to = self.memory.pointer::<MaybeUninit<*mut Handle>>(slot);
        let out = (!wrong.no_slot).then_some(to);
        let id = self.contexts[context].id;
        let handle = self.context_handle(context, wrong.no_context, c);
        let mut writes = Writes::default();
        writes.bytes(slot, 8);
        let made = call!(self, expect, writes, adalora_allocator_create(handle, desc, out.map(|to| &mut *to)))?;
        if made {
            let handle = self.handle_at(slot);
            let (sharded, geos) = (d.sharded == 1, geos.to_vec());
            let schedule = Schedule::new(&geos, &d);
            self.allocators.push(Allocator {
                context: id,
                handle,
                d,
                geos,
                sharded,
                bound: None,
                seen: None,
                schedule,
            });
        }
        Ok(made)
    }

    /// The handle, or, where it is to be spoilt, null or a handle of another kind.
    pub(super) fn allocator_handle(&self, i: usize, spoil: bool, c: &mut Choices) -> Option<NonNull<Handle>> {
        match (spoil, self.contexts.first()) {
            (false, _) => NonNull::new(self.allocators[i].handle),
            (true, Some(other)) if c.chance(50) => NonNull::new(other.handle.cast()),
            _ => None,
        }
    }

    pub(super) fn destroy_allocator(&mut self, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let i = self.some_allocator(c)?;
        let handle = self.allocator_handle(i, w.is_some(), c);
        let mut expect = Expect::default();
        if w.is_some() && handle.is_some() {
            expect.handle("allocator");
        }
        if w.is_none() {
            let gone = self.allocators.swap_remove(i);
            self.release_bound(gone);
        }
        self.perform_void("adalora_allocator_destroy", expect, || {
            // SAFETY: a live handle that is given up, or null, or one of another kind.
            unsafe { adalora_allocator_destroy(handle) }
        })
    }

    pub(super) fn allocator_sizes(&mut self, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let i = self.some_allocator(c)?;
        let mut handle = self.allocator_handle(i, false, c);
        let mut expect = Expect::default();
        let mut n = c.below(100) as i64;
        if let Some(w) = w {
            if w.chance(40) {
                handle = self.allocator_handle(i, true, w);
                expect.handle("allocator");
            } else {
                n = w.pick(&[-1, i64::MIN, i64::MAX]);
                expect.argument("n_slices");
            }
        }
        let place = self.memory.private(24, 8, c);
        let mut writes = Writes::default();
        let mut slots = [None; 3];
        for (k, slot) in slots.iter_mut().enumerate() {
            if c.chance(70) {
                *slot = Some(self.memory.pointer::<MaybeUninit<usize>>(place.offset(8 * k)));
                writes.bytes(place.offset(8 * k), 8);
            }
        }
        let [state, workspace, gram] = slots;
        call!(
            self,
            expect,
            writes,
            adalora_allocator_sizes(
                handle.map(|h| h.as_ref()),
                n,
                state.map(|s| &mut *s),
                workspace.map(|s| &mut *s),
                gram.map(|s| &mut *s)
            )
        )
        .map(drop)
    }

    pub(super) fn budget(&mut self, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let i = self.some_allocator(c)?;
        let schedule = self.allocators[i].schedule;
        let step = c.pick(&[i64::MIN, -1, 0, 1, 2, 3, 5, 8, 13, 19, 21, i64::MAX]);
        let mut handle = self.allocator_handle(i, false, c);
        let mut expect = Expect::default();
        let (budget, masks) = (self.any_u64(c), self.any_u64(c));
        let (to, mut no_budget) = (self.memory.pointer::<MaybeUninit<i64>>(budget), false);
        let flag = self.memory.pointer::<MaybeUninit<i32>>(masks);
        let asks = c.chance(70);
        if let Some(w) = w {
            if w.chance(50) {
                handle = self.allocator_handle(i, true, w);
                expect.handle("allocator");
            } else {
                (no_budget, ()) = (true, expect.argument("budget"));
            }
        }
        let mut writes = Writes::default();
        writes.bytes(budget, 8);
        if asks {
            writes.bytes(masks, 4);
        }
        let out = (!no_budget).then_some(to);
        let flag = asks.then_some(flag);
        if call!(
            self,
            expect,
            writes,
            adalora_allocator_budget(handle.map(|h| h.as_ref()), step, out.map(|b| &mut *b), flag.map(|m| &mut *m))
        )? {
            let found = self.memory.read_i64(budget, 0);
            ensure!(found == schedule.at(step).0, "budget {found} at {step}, expected {}", schedule.at(step).0);
            let mask = self.memory.read(masks, 4) == [1, 0, 0, 0];
            ensure!(!asks || mask == schedule.at(step).1, "masks is {mask} at {step}");
        }
        Ok(())
    }

    /// An allocator for a call, its handle, spoilt now and then, and whether it has buffers.
    pub(super) fn target(
        &mut self,
        expect: &mut Expect,
        c: &mut Choices,
        w: Option<&mut Choices>,
    ) -> Result<(usize, Option<NonNull<Handle>>, bool), String> {
        let i = self.some_bound(c)?;
        let mut handle = self.allocator_handle(i, false, c);
        if self.allocators[i].bound.is_none() {
            expect.state("allocator");
        }
        let mut spoilt = false;
        if let Some(w) = w
            && w.chance(10)
        {
            handle = self.allocator_handle(i, true, w);
            expect.handle("allocator");
            spoilt = true;
        }
        Ok((i, handle, spoilt))
    }

    pub(super) fn gram(&mut self, c: &mut Choices, mut w: Option<&mut Choices>) -> Outcome {
        let mut expect = Expect::default();
        let (i, handle, spoilt) = self.target(&mut expect, c, w.as_deref_mut())?;
        let [_, _, bytes] = self.ask_allocator_sizes(i, 1, c)?;
        let place = self.memory.place(bytes, 8, c);
        let mut to = self.memory.pointer::<f64>(place);
        if self.allocators[i].bound.as_ref().is_some_and(|b| !b.whole_columns) {
            expect.state("slices");
        }
        if let Some(w) = w.filter(|_| !spoilt && bytes > 0) {
            let inside = self.within_bound(i, bytes, w).map(|p| p.cast());
            to = w.pick(&[std::ptr::null_mut(), to.wrapping_byte_add(4), inside.unwrap_or(std::ptr::null_mut())]);
            expect.argument("gram");
        }
        let mut writes = self.workspace_writes(i);
        writes.bytes(place, bytes);
        call!(self, expect, writes, adalora_allocator_gram(handle, to, std::ptr::null_mut())).map(drop)
    }

    fn workspace_writes(&self, i: usize) -> Writes {
        let mut writes = Writes::default();
        if let Some(b) = &self.allocators[i].bound {
            writes.bytes(b.workspace, b.workspace_bytes);
        }
        writes
    }

    pub(super) fn orthogonality(&mut self, c: &mut Choices, mut w: Option<&mut Choices>) -> Outcome {
        let mut expect = Expect::default();
        let (i, handle, spoilt) = self.target(&mut expect, c, w.as_deref_mut())?;
        let [_, _, bytes] = self.ask_allocator_sizes(i, 1, c)?;
        let place = self.memory.place(bytes, 8, c);
        let fill = super::memory::Fill::some(c);
        self.memory.fill(place, bytes / 8, ADALORA_FLOAT64, fill, c);
        let sharded = self.allocators[i].sharded;
        let mut gram =
            if sharded || c.chance(40) { self.memory.pointer::<f64>(place).cast_const() } else { std::ptr::null() };
        let mut weight = c.pick(&[0.1, 0.5, 0.0, 1e30]);
        let scale = self.one_f64(c.pick(&[1.0, 1024.0, f64::INFINITY]), c);
        let mut factor = if c.chance(50) { std::ptr::null() } else { self.memory.pointer::<f64>(scale).cast_const() };
        let result = self.any_u64(c);
        let mut value = if c.chance(30) { std::ptr::null_mut() } else { self.memory.pointer::<f64>(result) };
        if self.allocators[i].bound.as_ref().is_some_and(|b| !b.whole_columns) {
            expect.state("slices");
        }
        let mut writes = self.workspace_writes(i);
        for p in self.allocators[i].pieces().iter().filter(|p| p.matrix != ADALORA_MATRIX_E) {
            writes.bytes(p.g.0, p.array_bytes(p.g.1));
        }
        if !value.is_null() {
            writes.bytes(result, 8);
        }
        if let Some(w) = w.filter(|_| !spoilt) {
            let inside = self.within_bound(i, 8, w);
            match w.below(7) {
                5 if inside.is_some() => {
                    value = inside.unwrap_or(std::ptr::null_mut()).cast();
                    expect.argument("value");
                }
                6 if bytes > 0 && !gram.is_null() => {
                    value = gram.cast_mut().wrapping_add(w.below(bytes / 8));
                    expect.refuse(ADALORA_ERROR_INVALID_ARGUMENT, ["value", "gram"]);
                }
                0 if sharded => (gram, ()) = (std::ptr::null(), expect.argument("gram")),
                1 => (gram, ()) = (self.memory.pointer::<f64>(place).wrapping_byte_add(4), expect.argument("gram")),
                2 => (factor, ()) = (self.memory.pointer::<f64>(scale).wrapping_byte_add(1), expect.argument("factor")),
                3 => (value, ()) = (self.memory.pointer::<f64>(result).wrapping_byte_add(4), expect.argument("value")),
                _ => (weight, ()) = (w.pick(&[-1.0, f64::NAN, f64::INFINITY]), expect.argument("weight")),
            }
        }
        call!(
            self,
            expect,
            writes,
            adalora_allocator_orthogonality(handle, gram, weight, factor, value, std::ptr::null_mut())
        )
        .map(drop)
    }

    fn flags(&mut self, i: usize, c: &mut Choices) -> Option<Vec<u8>> {
        let n = self.allocators[i].geos.len();
        c.chance(50).then(|| (0..n).map(|_| c.pick(&[0, 1, 1, 7])).collect())
    }

    /// Whether a gradient is not finite that counts.
    fn any_non_finite(&self, i: usize, has_grad: Option<&[u8]>, replicas: bool) -> bool {
        let counts = |p: &&Piece| has_grad.is_none_or(|flags| flags[p.adapter] != 0) && (replicas || !p.replica);
        let non_finite = |p: &Piece| self.memory.elements(p.g.0, p.len(), p.g.1).iter().any(|x| !x.is_finite());
        self.allocators[i].pieces().iter().filter(counts).any(non_finite)
    }

    pub(super) fn gradient_norm(&mut self, c: &mut Choices, mut w: Option<&mut Choices>) -> Outcome {
        let mut expect = Expect::default();
        let (i, handle, spoilt) = self.target(&mut expect, c, w.as_deref_mut())?;
        if c.chance(30) {
            self.new_gradients(i, c);
        }
        let has_grad = self.flags(i, c);
        let flags = has_grad.as_ref().map(|flags| self.memory.bytes(flags, 1, c));
        let flags = flags.map_or(std::ptr::null(), |f| self.memory.pointer::<u8>(f).cast_const());
        let sum = self.one_f64(2.5, c);
        let found = self.memory.bytes(&0.25f32.to_le_bytes(), 4, c);
        let mut to = self.memory.pointer::<f64>(sum);
        let mut flag = if c.chance(70) { self.memory.pointer::<f32>(found) } else { std::ptr::null_mut() };
        let asks = !flag.is_null();
        if let Some(w) = w.filter(|_| !spoilt) {
            let inside = self.within_bound(i, 8, w);
            match w.below(6) {
                3 if inside.is_some() => {
                    to = inside.unwrap_or(std::ptr::null_mut()).cast();
                    expect.argument("sum_of_squares");
                }
                4 if inside.is_some() => {
                    flag = inside.unwrap_or(std::ptr::null_mut()).cast();
                    expect.argument("found_inf");
                }
                5 => {
                    flag = to.cast::<f32>().wrapping_byte_add(w.pick(&[0, 4]));
                    expect.refuse(ADALORA_ERROR_INVALID_ARGUMENT, ["found_inf", "sum_of_squares"]);
                }
                0 => (to, ()) = (std::ptr::null_mut(), expect.argument("sum_of_squares")),
                1 => (to, ()) = (to.wrapping_byte_add(4), expect.argument("sum_of_squares")),
                _ => {
                    (flag, ()) = (self.memory.pointer::<f32>(found).wrapping_byte_add(1), expect.argument("found_inf"))
                }
            }
        }
        let mut writes = self.workspace_writes(i);
        writes.bytes(sum, 8);
        if asks {
            writes.bytes(found, 4);
        }
        if call!(self, expect, writes, adalora_allocator_gradient_norm(handle, flags, to, flag, std::ptr::null_mut()))?
        {
            let non_finite = self.any_non_finite(i, has_grad.as_deref(), false);
            let value: f32 = if non_finite { 1.0 } else { 0.25 };
            let said = self.memory.read(found, 4);
            ensure!(
                !asks || said == value.to_le_bytes(),
                "found_inf holds {said:?}; a gradient is not finite: {non_finite}"
            );
            let total = self.memory.read_f64(sum);
            ensure!(non_finite || total >= 2.5, "the sum of squares fell to {total}");
        }
        Ok(())
    }

    pub(super) fn scores(&mut self, c: &mut Choices, mut w: Option<&mut Choices>) -> Outcome {
        let mut expect = Expect::default();
        let (i, handle, spoilt) = self.target(&mut expect, c, w.as_deref_mut())?;
        let n = self.allocators[i].triplets();
        let place = self.memory.place(8 * n, 8, c);
        let mut to = self.memory.pointer::<f64>(place);
        if let Some(w) = w.filter(|_| !spoilt && n > 0) {
            let inside = self.within_bound(i, 8 * n, w).map(|p| p.cast());
            to = w.pick(&[std::ptr::null_mut(), to.wrapping_byte_add(4), inside.unwrap_or(std::ptr::null_mut())]);
            expect.argument("scores");
        }
        self.read_scores(expect, handle, to, place, n).map(drop)
    }

    /// Scores are written nowhere but to their place: other calls may read the object meanwhile.
    fn read_scores(
        &mut self,
        expect: Expect,
        handle: Option<NonNull<Handle>>,
        to: *mut f64,
        place: Place,
        n: usize,
    ) -> Result<Vec<f64>, String> {
        let mut writes = Writes::default();
        writes.bytes(place, 8 * n);
        if !call!(self, expect, writes, adalora_allocator_scores(handle.map(|h| h.as_ref()), to, std::ptr::null_mut()))?
        {
            return Ok(Vec::new());
        }
        let scores = self.memory.elements(place, n, ADALORA_FLOAT64);
        ensure!(scores.iter().all(|s| s.is_finite()), "scores {scores:?} are not finite");
        Ok(scores)
    }

    fn some_step(&mut self, i: usize, c: &mut Choices) -> StepValues {
        let a = &self.allocators[i];
        let last = a.seen.as_ref().map_or(-1, |s| s.last_step);
        // Mostly the next one; now and then again, backwards, far ahead.
        let t = match c.below(20) {
            0 => last,
            1 => c.below(25) as i64,
            2 => last.saturating_add(7),
            3 => c.pick(&[i64::MIN, i64::MAX, a.schedule.end, a.schedule.end - 1, a.schedule.end + 1]),
            _ => last.saturating_add(1),
        };
        let sharded = a.sharded;
        let place = self.memory.bytes(&t.to_le_bytes(), 8, c);
        let factor = c.pick(&[1.0, 1.0, 0.5, 0.0, 1e-30, 1e30, f64::NAN]);
        let factor_at = self.one_f64(factor, c);
        let scaled = c.chance(50);
        let found_inf = (sharded || c.chance(40)).then(|| c.pick(&[0.0, 0.0, 0.0, 1.0, f32::NAN]));
        let found_at = self.memory.bytes(&found_inf.unwrap_or(1.0).to_le_bytes(), 4, c);
        let has_grad = self.flags(i, c);
        let flags = has_grad.as_ref().map(|flags| self.memory.bytes(flags, 1, c));
        let m = &self.memory;
        let d = Step {
            struct_size: 0,
            step: m.pointer::<i64>(place),
            grad_factor: if scaled { m.pointer::<f64>(factor_at) } else { std::ptr::null_mut() },
            found_inf: if found_inf.is_some() { m.pointer::<f32>(found_at) } else { std::ptr::null_mut() },
            has_grad: flags.map_or(std::ptr::null(), |f| m.pointer::<u8>(f).cast_const()),
        };
        let factor = if scaled { factor } else { 1.0 };
        StepValues { d, t, factor, found_inf, has_grad, null: false, spoiled: None }
    }

    fn spoil_step(&self, i: usize, s: &mut StepValues, sharded: bool, expect: &mut Expect, w: &mut Choices) {
        let inside = self.within_bound(i, 8, w);
        match w.below(9) {
            8 if inside.is_some() => {
                (s.d.has_grad, ()) = (inside.unwrap_or(std::ptr::null_mut()).cast(), expect.argument("step.has_grad"));
            }
            7 if inside.is_some() => {
                (s.d.step, ()) = (inside.unwrap_or(std::ptr::null_mut()).cast(), expect.argument("step.step"));
            }
            0 => (s.null, ()) = (true, expect.argument("step")),
            1 => (s.spoiled, ()) = (Some(0), ()),
            2 => (s.d.step, ()) = (std::ptr::null(), expect.argument("step.step")),
            3 => (s.d.step, ()) = (s.d.step.wrapping_byte_add(4), expect.argument("step.step")),
            4 => {
                (s.d.grad_factor, ()) =
                    (s.d.step.cast::<f64>().wrapping_byte_add(2), expect.argument("step.grad_factor"))
            }
            5 if sharded => (s.d.found_inf, ()) = (std::ptr::null(), expect.argument("step.found_inf")),
            _ => (s.d.found_inf, ()) = (s.d.step.cast::<f32>().wrapping_byte_add(2), expect.argument("step.found_inf")),
        }
    }

    fn step_descriptor(&mut self, s: &StepValues, expect: &mut Expect, c: &mut Choices) -> *const Step {
        let minimum = offset_of!(Step, step) + 8;
        let (place, _, wrong) = self.memory.descriptors(&[bytes_of(&s.d)], minimum, s.spoiled, c);
        if s.spoiled.is_some() {
            expect.argument(format!("step{wrong}"));
        }
        if s.null { std::ptr::null() } else { self.memory.pointer::<Step>(place).cast_const() }
    }

    /// What an update may write, and what it does to the counters.
    fn expect_update(&self, i: usize, s: &StepValues, with_adamw: bool, writes: &mut Writes) -> Updated {
        let a = &self.allocators[i];
        let mut after = a.seen.clone();
        let suppressed = match s.found_inf {
            Some(found) => found > 0.0 || found.is_nan(),
            None => self.any_non_finite(i, s.has_grad.as_deref(), true),
        };
        if suppressed || !s.factor.is_finite() {
            after.iter_mut().for_each(|seen| seen.skipped += 1);
            return Updated { after, takes_importance: false };
        }
        let has_grad = |adapter: usize| s.has_grad.as_ref().is_none_or(|flags| flags[adapter] != 0);
        let takes_importance = s.t < a.schedule.end && !a.is_final();
        for p in a.pieces() {
            if with_adamw && has_grad(p.adapter) {
                for (place, dtype) in [Some(p.p), p.p_low].into_iter().flatten() {
                    writes.bytes(place, p.array_bytes(dtype));
                }
                for place in p.moments.into_iter().flat_map(|(m, v)| [m, v]) {
                    writes.bytes(place, p.state_bytes());
                }
            }
            if takes_importance {
                writes.bytes(p.averages.0, p.state_bytes());
                writes.bytes(p.averages.1, p.state_bytes());
            }
        }
        if let Some(seen) = after.as_mut().filter(|_| with_adamw) {
            for (adapter, steps) in seen.adam_steps.iter_mut().enumerate() {
                *steps += i64::from(has_grad(adapter));
            }
        }
        Updated { after, takes_importance }
    }

    pub(super) fn update(&mut self, c: &mut Choices, mut w: Option<&mut Choices>) -> Outcome {
        let mut expect = Expect::default();
        let (i, handle, spoilt) = self.target(&mut expect, c, w.as_deref_mut())?;
        if c.chance(60) {
            self.new_gradients(i, c);
        }
        let mut s = self.some_step(i, c);
        let serves = self.allocators[i].bound.as_ref().is_some_and(|b| b.serves_adamw);
        let mut with_adamw = i32::from(if serves { c.chance(75) } else { c.chance(20) });
        let mut writes = self.allocators[i].own_writes();
        let updated = self.expect_update(i, &s, with_adamw == 1, &mut writes);
        if with_adamw == 1 && !serves {
            expect.state("with_adamw");
        }
        if let Some(w) = w.filter(|_| !spoilt) {
            if w.chance(15) {
                (with_adamw, ()) = (w.pick(&[2, -1]), expect.argument("with_adamw"));
            } else {
                self.spoil_step(i, &mut s, self.allocators[i].sharded, &mut expect, w);
            }
        }
        let step = self.step_descriptor(&s, &mut expect, c);
        if call!(self, expect, writes, adalora_allocator_update(handle, step, with_adamw, std::ptr::null_mut()))? {
            self.check_updated(i, updated, c)?;
        }
        Ok(())
    }

    fn check_updated(&mut self, i: usize, updated: Updated, c: &mut Choices) -> Outcome {
        self.inspect(i, c)?;
        if updated.takes_importance {
            self.check_averages(i, f64::is_finite, "finite")?;
        }
        let seen = &self.allocators[i].seen;
        ensure!(*seen == updated.after, "after the update: {seen:?}, expected {:?}", updated.after);
        Ok(())
    }

    fn check_averages(&self, i: usize, good: impl Fn(f64) -> bool, what: &str) -> Outcome {
        for p in self.allocators[i].pieces() {
            for place in [p.averages.0, p.averages.1] {
                let values = self.memory.elements(place, p.len(), p.state);
                ensure!(values.iter().all(|x| good(*x)), "averages {values:?} of {} are not {what}", p.name());
            }
        }
        Ok(())
    }

    /// Scores for a selection: given by the caller, or nothing, and what they are; where nothing is given they are read first.
    fn scores_for(&mut self, i: usize, c: &mut Choices) -> Result<(*const f64, Option<Vec<f64>>), String> {
        let n = self.allocators[i].triplets();
        let place = self.memory.place(8 * n, 8, c);
        if self.allocators[i].sharded || c.chance(30) {
            let fill = super::memory::Fill::some(c);
            self.memory.fill(place, n, ADALORA_FLOAT64, fill, c);
            let values = self.memory.elements(place, n, ADALORA_FLOAT64);
            return Ok((self.memory.pointer::<f64>(place), Some(values)));
        }
        if self.allocators[i].bound.is_none() {
            return Ok((std::ptr::null(), None));
        }
        let (handle, to) = (self.allocator_handle(i, false, c), self.memory.pointer::<f64>(place));
        let values = self.read_scores(Expect::default(), handle, to, place, n)?;
        Ok((std::ptr::null(), Some(values)))
    }

    /// What a selection may write, and what must be seen after it.
    fn expect_select(
        &self,
        i: usize,
        t: i64,
        scores: Option<&[f64]>,
        before: Option<Seen>,
        writes: &mut Writes,
    ) -> Selected {
        let a = &self.allocators[i];
        let Some(mut after) = before else { return Selected { after: None, reached: false } };
        let (budget, masks) = a.schedule.at(t);
        let reached = t >= a.schedule.end && !after.is_final;
        let chooses = !after.is_final && (masks || reached);
        let mut pattern = Some(after.pattern.clone());
        if chooses {
            pattern = scores.and_then(|scores| a.choice(scores, budget));
            after.has_pattern = true;
            after.selections += 1;
        }
        if reached {
            after.is_final = true;
            a.averages().for_each(|(place, bytes)| writes.bytes(place, bytes));
        }
        if after.has_pattern && (masks || after.is_final) {
            a.masked_writes(pattern.as_deref(), writes);
        }
        // Without a pattern to compare with, only how much it keeps can be checked.
        after.pattern = pattern.unwrap_or_default();
        after.last_step = t;
        after.budget = if after.is_final { a.schedule.target } else { budget };
        Selected { after: Some(after), reached }
    }

    fn check_selected(&mut self, i: usize, selected: Selected, c: &mut Choices) -> Outcome {
        let Some(mut expected) = selected.after else { return self.inspect(i, c) };
        let t = expected.last_step;
        let (repeated, last) = self.allocators[i].seen.as_ref().map_or((0, -1), |s| (s.irregular, s.last_step));
        self.inspect(i, c)?;
        let a = &self.allocators[i];
        let seen = a.seen.as_ref().ok_or("nothing seen")?;
        if expected.pattern.is_empty() {
            let kept = seen.pattern.iter().map(|k| i64::from(*k)).sum::<i64>();
            let budget = a.schedule.at(t).0.min(a.triplets() as i64);
            ensure!(a.schedule.in_parameters || kept == budget, "{kept} triplets kept, budget {budget}");
            expected.pattern.clone_from(&seen.pattern);
        }
        let rose = seen.irregular - repeated;
        // Whether an earlier selection was made at all is not to be seen from -1, which may also be a step.
        let expected_rise = if last == -1 { rose.clamp(0, 1) } else { i64::from(t <= last) };
        ensure!(rose == expected_rise, "irregular went from {repeated} by {rose}, from step {last} to {t}");
        expected.irregular = seen.irregular;
        ensure!(*seen == expected, "after the selection: {seen:?}, expected {expected:?}");
        if selected.reached {
            self.check_averages(i, |x| x == 0.0, "cleared")?;
        }
        let masks = a.schedule.at(t).1 || seen.is_final;
        if seen.has_pattern && masks { self.check_masked(i) } else { Ok(()) }
    }

    fn check_masked(&self, i: usize) -> Outcome {
        let a = &self.allocators[i];
        let seen = a.seen.as_ref().ok_or("nothing seen")?;
        for p in a.pieces().iter().filter(|p| p.matrix == ADALORA_MATRIX_E) {
            let first = a.first_triplet(p.adapter);
            for (place, dtype) in [Some(p.p), p.p_low].into_iter().flatten() {
                let values = self.memory.elements(place, p.len(), dtype);
                for (k, e) in values.iter().enumerate().filter(|(k, _)| seen.pattern[first + p.begin + k] == 0) {
                    ensure!(*e == 0.0, "E[{}] of adapter {} is {e}, and is masked", p.begin + k, p.adapter);
                }
            }
        }
        Ok(())
    }

    pub(super) fn select(&mut self, c: &mut Choices, mut w: Option<&mut Choices>) -> Outcome {
        let mut expect = Expect::default();
        let (i, handle, spoilt) = self.target(&mut expect, c, w.as_deref_mut())?;
        let mut s = self.some_step(i, c);
        let (mut from, scores) = self.scores_for(i, c)?;
        let mut writes = self.allocators[i].own_writes();
        let before = self.allocators[i].seen.clone();
        let selected = self.expect_select(i, s.t, scores.as_deref(), before, &mut writes);
        if let Some(w) = w.filter(|_| !spoilt) {
            let n = self.allocators[i].triplets();
            let sharded = self.allocators[i].sharded && n > 0;
            match w.below(5) {
                0 if sharded => (from, ()) = (std::ptr::null(), expect.argument("scores")),
                1 => (from, ()) = (s.d.step.cast::<f64>().wrapping_byte_add(4), expect.argument("scores")),
                2 if n > 0 => {
                    if let Some(inside) = self.within_bound(i, 8 * n, w) {
                        (from, ()) = (inside.cast(), expect.argument("scores"));
                    }
                }
                // A selection needs no found_inf.
                _ => self.spoil_step(i, &mut s, false, &mut expect, w),
            }
        }
        let step = self.step_descriptor(&s, &mut expect, c);
        if call!(self, expect, writes, adalora_allocator_select(handle, step, from, std::ptr::null_mut()))? {
            self.check_selected(i, selected, c)?;
        }
        Ok(())
    }

    pub(super) fn step(&mut self, c: &mut Choices, mut w: Option<&mut Choices>) -> Outcome {
        let mut expect = Expect::default();
        let (i, handle, spoilt) = self.target(&mut expect, c, w.as_deref_mut())?;
        if c.chance(60) {
            self.new_gradients(i, c);
        }
        let mut s = self.some_step(i, c);
        let serves = self.allocators[i].bound.as_ref().is_some_and(|b| b.serves_adamw);
        let mut with_adamw = i32::from(if serves { c.chance(75) } else { c.chance(20) });
        let sharded = self.allocators[i].sharded;
        if sharded {
            expect.state("allocator");
        }
        if with_adamw == 1 && !serves {
            expect.state("with_adamw");
        }
        let mut writes = self.allocators[i].own_writes();
        let updated = self.expect_update(i, &s, with_adamw == 1, &mut writes);
        let selected = self.expect_select(i, s.t, None, updated.after.clone(), &mut writes);
        if let Some(w) = w.filter(|_| !spoilt) {
            if w.chance(15) {
                (with_adamw, ()) = (w.pick(&[2, -1]), expect.argument("with_adamw"));
            } else {
                self.spoil_step(i, &mut s, sharded, &mut expect, w);
            }
        }
        let step = self.step_descriptor(&s, &mut expect, c);
        if call!(self, expect, writes, adalora_allocator_step(handle, step, with_adamw, std::ptr::null_mut()))? {
            self.check_selected(i, selected, c)?;
            if updated.takes_importance {
                self.check_averages(i, f64::is_finite, "finite")?;
            }
        }
        Ok(())
    }

    pub(super) fn finalize(&mut self, c: &mut Choices, mut w: Option<&mut Choices>) -> Outcome {
        let mut expect = Expect::default();
        let (i, handle, spoilt) = self.target(&mut expect, c, w.as_deref_mut())?;
        let (mut from, scores) = self.scores_for(i, c)?;
        let a = &self.allocators[i];
        let was_final = a.is_final();
        let mut writes = if was_final { Writes::default() } else { a.own_writes() };
        let mut after = a.seen.clone();
        let known = scores.and_then(|scores| a.choice(&scores, a.schedule.target));
        if let Some(seen) = after.as_mut().filter(|seen| !seen.is_final) {
            a.averages().for_each(|(place, bytes)| writes.bytes(place, bytes));
            a.masked_writes(known.as_deref(), &mut writes);
            (seen.has_pattern, seen.is_final, seen.budget) = (true, true, a.schedule.target);
            seen.selections += 1;
            seen.pattern = known.unwrap_or_default();
        }
        if let Some(w) = w.filter(|_| !spoilt) {
            let (sharded, odd) = (a.sharded && a.triplets() > 0, self.any_u64(w));
            if sharded && w.chance(50) {
                (from, ()) = (std::ptr::null(), expect.argument("scores"));
            } else {
                (from, ()) = (self.memory.pointer::<f64>(odd).wrapping_byte_add(4), expect.argument("scores"));
            }
        }
        if call!(self, expect, writes, adalora_allocator_finalize(handle, from, std::ptr::null_mut()))? {
            self.inspect(i, c)?;
            let seen = self.allocators[i].seen.as_ref();
            if let (Some(seen), Some(mut expected)) = (seen, after) {
                if expected.pattern.is_empty() {
                    expected.pattern.clone_from(&seen.pattern);
                }
                ensure!(*seen == expected, "after finalize: {seen:?}, expected {expected:?}");
            }
            if !was_final {
                self.check_masked(i)?;
            }
        }
        Ok(())
    }

    pub(super) fn reset(&mut self, c: &mut Choices, mut w: Option<&mut Choices>) -> Outcome {
        let mut expect = Expect::default();
        let (i, _, _) = self.target(&mut expect, c, None)?;
        let mut handle = self.allocator_handle(i, false, c);
        if let Some(w) = w.as_mut() {
            handle = self.allocator_handle(i, true, w);
            expect.handle("allocator");
        }
        let mut writes = self.allocators[i].own_writes();
        for p in self.allocators[i].pieces() {
            let moments = p.moments.into_iter().flat_map(|(m, v)| [m, v]);
            [p.averages.0, p.averages.1]
                .into_iter()
                .chain(moments)
                .for_each(|place| writes.bytes(place, p.state_bytes()));
        }
        if call!(self, expect, writes, adalora_allocator_reset(handle, std::ptr::null_mut()))? {
            self.allocators[i].seen = None;
            self.inspect(i, c)?;
            self.check_averages(i, |x| x == 0.0, "cleared")?;
            for p in self.allocators[i].pieces() {
                for place in p.moments.into_iter().flat_map(|(m, v)| [m, v]) {
                    let clear = self.memory.read(place, p.state_bytes()).iter().all(|b| *b == 0);
                    ensure!(clear, "moments of {} are not cleared", p.name());
                }
            }
            let seen = self.allocators[i].seen.as_ref().ok_or("nothing seen")?;
            let fresh = seen.has_pattern == self.allocators[i].is_compacted()
                && seen.last_step == -1
                && seen.selections + seen.skipped + seen.irregular == 0;
            ensure!(fresh && seen.adam_steps.iter().all(|n| *n == 0), "after the reset: {seen:?}");
        }
        Ok(())
    }

    pub(super) fn digest(&mut self, c: &mut Choices, mut w: Option<&mut Choices>) -> Outcome {
        let mut expect = Expect::default();
        let (i, handle, spoilt) = self.target(&mut expect, c, w.as_deref_mut())?;
        let place = self.any_u64(c);
        let mut to = self.memory.pointer::<u64>(place);
        if let Some(w) = w.filter(|_| !spoilt) {
            let inside = self.within_bound(i, 8, w).map(|p| p.cast());
            to = w.pick(&[std::ptr::null_mut(), to.wrapping_byte_add(4), inside.unwrap_or(std::ptr::null_mut())]);
            expect.argument("digest");
        }
        let mut writes = Writes::default();
        writes.bytes(place, 8);
        call!(self, expect, writes, adalora_allocator_digest(handle.map(|h| h.as_ref()), to, std::ptr::null_mut()))
            .map(drop)
    }

    pub(super) fn read_sync(&mut self, c: &mut Choices, mut w: Option<&mut Choices>) -> Outcome {
        let mut expect = Expect::default();
        let (i, handle, spoilt) = self.target(&mut expect, c, w.as_deref_mut())?;
        if w.is_none() && expect.is_success() {
            return self.inspect(i, c);
        }
        let n = self.allocators[i].geos.len();
        let (ranks, steps) = (self.memory.place(8 * n, 8, c), self.memory.place(8 * n, 8, c));
        let room = size_of::<Report>() + 16;
        let report = self.memory.place(room, 8, c);
        self.memory.write(report, &vec![0; room]);
        let size = size_of::<Report>();
        self.memory.write(report, &size.to_le_bytes());
        let (mut to_ranks, mut to_steps) = (self.memory.pointer::<i64>(ranks), self.memory.pointer::<i64>(steps));
        if let Some(w) = w.filter(|_| !spoilt) {
            match w.below(4) {
                0 => (to_ranks, ()) = (to_ranks.wrapping_byte_add(4), expect.argument("ranks")),
                1 => (to_steps, ()) = (to_steps.wrapping_byte_add(1), expect.argument("adam_steps")),
                2 => {
                    self.memory.write(report, &w.pick(&[0usize, 7, (1 << 16) + 1, usize::MAX]).to_le_bytes());
                    expect.argument("report.struct_size");
                }
                _ => {
                    self.memory.write(report, &(size + 9).to_le_bytes());
                    self.memory.write(report.offset(size + w.below(9)), &[1]);
                    expect.argument("report");
                }
            }
        }
        let mut writes = Writes::default();
        writes.bytes(ranks, 8 * n);
        writes.bytes(steps, 8 * n);
        writes.bytes(report, size);
        let report = self.memory.pointer::<Report>(report);
        call!(
            self,
            expect,
            writes,
            adalora_allocator_read_sync(
                handle.map(|h| h.as_ref()),
                std::ptr::null_mut(),
                to_ranks,
                to_steps,
                report,
                std::ptr::null_mut()
            )
        )
        .map(drop)
    }

    /// Looks at an allocator, and checks what it reports against itself and against what was seen before.
    pub(super) fn inspect(&mut self, i: usize, c: &mut Choices) -> Outcome {
        let (n, triplets) = (self.allocators[i].geos.len(), self.allocators[i].triplets());
        let pattern = self.memory.place(triplets, 1, c);
        let (ranks, steps) = (self.memory.place(8 * n, 8, c), self.memory.place(8 * n, 8, c));
        // An older caller's report is shorter, a newer one's longer.
        let whole = size_of::<Report>();
        let size = c.pick(&[whole, whole, whole + 24]);
        let report = self.memory.place(size, 8, c);
        self.memory.write(report, &vec![0; size]);
        self.memory.write(report, &size.to_le_bytes());
        let mut writes = Writes::default();
        writes.bytes(pattern, triplets);
        writes.bytes(ranks, 8 * n);
        writes.bytes(steps, 8 * n);
        writes.bytes(report, whole);
        let handle = self.allocators[i].handle.cast_const();
        let m = &self.memory;
        let (to_pattern, to_ranks, to_steps) =
            (m.pointer::<u8>(pattern), m.pointer::<i64>(ranks), m.pointer::<i64>(steps));
        let to_report = m.pointer::<Report>(report);
        call!(
            self,
            Expect::default(),
            writes,
            adalora_allocator_read_sync(
                handle.as_ref(),
                to_pattern,
                to_ranks,
                to_steps,
                to_report,
                std::ptr::null_mut()
            )
        )?;
        let (a, m) = (&self.allocators[i], &self.memory);
        let pattern = m.read(pattern, triplets).to_vec();
        ensure!(pattern.iter().all(|k| *k <= 1), "pattern {pattern:?}");
        let field = |k: usize| m.read_i64(report, k);
        let flags = field(8).to_le_bytes();
        let seen = Seen {
            adam_steps: (0..n).map(|k| m.read_i64(steps, k)).collect(),
            last_step: field(1),
            skipped: field(2),
            irregular: field(3),
            selections: field(4),
            budget: field(5),
            has_pattern: flags[..4] == [1, 0, 0, 0],
            is_final: flags[4..] == [1, 0, 0, 0],
            pattern,
        };
        ensure!(field(0) == size as i64, "struct_size became {}", field(0));
        let mut parameters = 0;
        for (k, g) in a.geos.iter().enumerate() {
            let first = a.first_triplet(k);
            let kept = seen.pattern[first..first + g.rank as usize].iter().map(|k| i64::from(*k)).sum::<i64>();
            ensure!(m.read_i64(ranks, k) == kept, "rank {} of adapter {k}, and {kept} kept", m.read_i64(ranks, k));
            parameters += kept * g.cost();
        }
        let kept = seen.pattern.iter().map(|k| i64::from(*k)).sum::<i64>();
        ensure!(field(6) == kept && field(7) == parameters, "live {} and {}: {seen:?}", field(6), field(7));
        ensure!(seen.has_pattern || kept == triplets as i64, "masked without a pattern: {seen:?}");
        ensure!(seen.has_pattern || !seen.is_final, "final without a pattern: {seen:?}");
        ensure!(seen.is_final || !a.is_compacted(), "compacted, and the pattern is not final: {seen:?}");
        let counters = [seen.skipped, seen.irregular, seen.selections];
        ensure!(counters.iter().chain(&seen.adam_steps).all(|n| *n >= 0), "a counter below 0: {seen:?}");
        if let Some(old) = &a.seen {
            let before = [old.skipped, old.irregular, old.selections];
            let pairs = counters.iter().chain(&seen.adam_steps).zip(before.iter().chain(&old.adam_steps));
            ensure!(pairs.into_iter().all(|(new, old)| new >= old), "a counter fell from {old:?} to {seen:?}");
            ensure!(!old.is_final || seen.is_final, "a final pattern is not final any more");
            ensure!(!old.is_final || old.pattern == seen.pattern, "a final pattern changed from {old:?} to {seen:?}");
        }
        self.allocators[i].seen = Some(seen);
        Ok(())
    }

    pub(super) fn set_pattern(&mut self, c: &mut Choices, mut w: Option<&mut Choices>) -> Outcome {
        let mut expect = Expect::default();
        let (i, handle, spoilt) = self.target(&mut expect, c, w.as_deref_mut())?;
        let n = self.allocators[i].triplets();
        let kept: Vec<u8> = (0..n).map(|_| c.pick(&[0, 1, 1, 255])).collect();
        let place = self.memory.bytes(&kept, 1, c);
        let mut from = self.memory.pointer::<u8>(place).cast_const();
        let mut is_final = i32::from(c.chance(15));
        let writes = self.allocators[i].pattern_writes(&kept, is_final);
        if let Some(w) = w.filter(|_| !spoilt) {
            if n > 0 && w.chance(60) {
                let inside = self.within_bound(i, n, w).map(|p| p.cast_const().cast());
                (from, ()) =
                    (w.pick(&[std::ptr::null(), inside.unwrap_or(std::ptr::null())]), expect.argument("pattern"));
            } else {
                (is_final, ()) = (w.pick(&[2, -1]), expect.argument("is_final"));
            }
        }
        if call!(self, expect, writes, adalora_allocator_set_pattern(handle, from, is_final, std::ptr::null_mut()))? {
            self.check_pattern(i, &kept, is_final, c)?;
        }
        Ok(())
    }

    pub(super) fn check_pattern(&mut self, i: usize, kept: &[u8], is_final: i32, c: &mut Choices) -> Outcome {
        let was_final = self.allocators[i].is_final();
        let expected: Vec<u8> = kept.iter().map(|k| u8::from(*k != 0)).collect();
        // Set by hand, even a final pattern is another.
        self.allocators[i].seen.iter_mut().for_each(|seen| seen.pattern.clone_from(&expected));
        self.inspect(i, c)?;
        let seen = self.allocators[i].seen.as_ref().ok_or("nothing seen")?;
        ensure!(seen.pattern == expected && seen.has_pattern, "after set_pattern: {seen:?}, expected {expected:?}");
        ensure!(seen.is_final == (is_final == 1 || was_final), "after set_pattern: {seen:?}, is_final {is_final}");
        if is_final == 1 {
            self.check_averages(i, |x| x == 0.0, "cleared")?;
        }
        self.check_masked(i)
    }

    pub(super) fn set_adam_steps(&mut self, c: &mut Choices, mut w: Option<&mut Choices>) -> Outcome {
        let mut expect = Expect::default();
        let (i, handle, spoilt) = self.target(&mut expect, c, w.as_deref_mut())?;
        let n = self.allocators[i].geos.len();
        let mut steps: Vec<i64> = (0..n).map(|_| c.pick(&[0, 1, 7, 100_000])).collect();
        let wrong = w.filter(|_| !spoilt).map(|w| w.below(3));
        if wrong == Some(2) {
            (steps[n - 1], ()) = (-1, expect.argument("adam_steps"));
        }
        let place = self.memory.place(8 * n, 8, c);
        steps.iter().enumerate().for_each(|(k, s)| self.memory.write(place.offset(8 * k), &s.to_le_bytes()));
        let mut from = self.memory.pointer::<i64>(place).cast_const();
        match wrong {
            Some(0) => (from, ()) = (std::ptr::null(), expect.argument("adam_steps")),
            Some(1) => (from, ()) = (from.wrapping_byte_add(1), expect.argument("adam_steps")),
            _ => {}
        }
        let writes = self.allocators[i].own_writes();
        if call!(self, expect, writes, adalora_allocator_set_adam_steps_sync(handle, from, std::ptr::null_mut()))? {
            self.allocators[i].seen.iter_mut().for_each(|seen| seen.adam_steps.clone_from(&steps));
            self.inspect(i, c)?;
            let seen = self.allocators[i].seen.as_ref().ok_or("nothing seen")?;
            ensure!(seen.adam_steps == steps, "after set_adam_steps: {seen:?}, expected {steps:?}");
        }
        Ok(())
    }

    pub(super) fn save(&mut self, c: &mut Choices, mut w: Option<&mut Choices>) -> Outcome {
        let mut expect = Expect::default();
        let (i, handle, spoilt) = self.target(&mut expect, c, w.as_deref_mut())?;
        let good = self.allocators[i].handle.cast_const();
        let size = self.memory.place(8, 8, c);
        self.memory.write(size, &[0; 8]);
        let at = self.memory.pointer::<usize>(size);
        let sized = |size| {
            let mut writes = Writes::default();
            writes.even_if_refused(size, 8);
            writes
        };
        if self.allocators[i].bound.is_none() {
            let (nothing, stream) = (std::ptr::null_mut(), std::ptr::null_mut());
            let handle = handle.map_or(std::ptr::null(), |h| h.as_ptr().cast_const());
            return call!(
                self,
                expect,
                sized(size),
                adalora_allocator_save_state_sync(handle.as_ref(), nothing, Some(&mut *at), stream)
            )
            .map(drop);
        }
        call!(
            self,
            Expect::default(),
            sized(size),
            adalora_allocator_save_state_sync(
                good.as_ref(),
                std::ptr::null_mut(),
                Some(&mut *at),
                std::ptr::null_mut()
            )
        )?;
        let needed = self.memory.read_i64(size, 0) as usize;
        let (mut room, mut no_size) = (needed + c.pick(&[0, 0, 9]), false);
        if let Some(w) = w.filter(|_| !spoilt) {
            if w.chance(70) {
                (room, ()) = (w.pick(&[0, needed - 1]), expect.argument("bytes"));
            } else {
                (no_size, ()) = (true, expect.argument("size"));
            }
        }
        let place = self.memory.place(room, 1, c);
        self.memory.write(size, &room.to_le_bytes());
        let to = self.memory.pointer::<c_void>(place);
        let mut writes = sized(size);
        writes.bytes(place, needed.min(room));
        if call!(
            self,
            expect,
            writes,
            adalora_allocator_save_state_sync(
                handle.map(|h| h.as_ref()),
                to,
                if no_size { None } else { Some(&mut *at) },
                std::ptr::null_mut()
            )
        )? {
            ensure!(self.memory.read_i64(size, 0) as usize == needed, "the size changed");
            self.images.push(self.memory.read(place, needed).to_vec());
        }
        Ok(())
    }

    pub(super) fn load(&mut self, c: &mut Choices, mut w: Option<&mut Choices>) -> Outcome {
        if self.images.is_empty() {
            self.save(c, None)?;
        }
        let mut expect = Expect::default();
        let (i, handle, spoilt) = self.target(&mut expect, c, w.as_deref_mut())?;
        let own: Vec<&Vec<u8>> = self.images.iter().filter(|image| self.allocators[i].takes(image)).collect();
        let images = if own.is_empty() || c.chance(50) { self.images.iter().collect() } else { own };
        if images.is_empty() {
            return Ok(());
        }
        let mut bytes = c.pick(&images).clone();
        let fits = self.allocators[i].takes(&bytes);
        if !fits {
            expect.argument("bytes");
        }
        let (mut null, mut size) = (false, bytes.len());
        if let Some(w) = w.filter(|_| !spoilt) {
            let corrupt = |expect: &mut Expect| expect.refuse(ADALORA_ERROR_CORRUPT_DATA, ["bytes"]);
            let n = self.allocators[i].geos.len();
            let counters = counters_of(n);
            match w.below(8) {
                0 => (null, ()) = (true, expect.argument("bytes")),
                1 => (size, ()) = (usize::MAX - w.below(2), expect.argument("size")),
                2 => {
                    bytes.truncate(w.below(bytes.len()));
                    if w.chance(50) {
                        seal(&mut bytes);
                    }
                    size = bytes.len();
                    corrupt(&mut expect);
                }
                3 | 4 => {
                    let at = w.below(bytes.len());
                    bytes[at] ^= 1 << w.below(8);
                    corrupt(&mut expect);
                }
                // Wrong values under a right checksum.
                5 if fits => {
                    let k = 1 + w.below(4 + n);
                    let k = if k >= 5 { k + 1 } else { k };
                    write_i64(&mut bytes, counters + 8 * k, w.pick(&[-1, i64::MIN, i64::MAX, (1 << 53) + 1]));
                    seal(&mut bytes);
                    corrupt(&mut expect);
                }
                6 if fits => {
                    write_i64(&mut bytes, counters + 40, w.pick(&[2, 4, 7, -1, i64::MAX]));
                    seal(&mut bytes);
                    corrupt(&mut expect);
                }
                _ => {
                    let pattern = counters + 8 * (6 + n);
                    let triplets = self.allocators[i].triplets();
                    // A mask may have left none.
                    if fits && triplets > 0 && w.chance(60) {
                        bytes[pattern + w.below(triplets)] = 2 + w.below(254) as u8;
                    } else {
                        // Version, and what is reserved after it.
                        bytes[w.pick(&[8, 11, 12, 15])] = w.pick(&[2, 255]);
                    }
                    seal(&mut bytes);
                    corrupt(&mut expect);
                }
            }
        }
        let place = self.memory.bytes(&bytes, 1, c);
        let from = if null { std::ptr::null() } else { self.memory.pointer::<c_void>(place).cast_const() };
        let mut writes = Writes::default();
        if let Some(b) = &self.allocators[i].bound {
            writes.bytes(b.state, b.state_bytes);
        }
        if call!(self, expect, writes, adalora_allocator_load_state_sync(handle, from, size, std::ptr::null_mut()))? {
            self.allocators[i].seen = None;
            self.inspect(i, c)?;
        }
        Ok(())
    }
}

/// Where in a state's bytes the counters begin.
fn counters_of(adapters: usize) -> usize {
    24 + 24 * adapters
}

/// Makes the checksum right again: FNV-1a of all before it.
fn seal(bytes: &mut [u8]) {
    let Some((body, sum)) = bytes.split_last_chunk_mut::<8>() else { return };
    let hash =
        body.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, b| (hash ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3));
    *sum = hash.to_le_bytes();
}

fn write_i64(bytes: &mut [u8], at: usize, value: i64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// What an update is expected to leave.
struct Updated {
    after: Option<Seen>,
    takes_importance: bool,
}

/// What a selection is expected to leave.
struct Selected {
    after: Option<Seen>,
    reached: bool,
}
