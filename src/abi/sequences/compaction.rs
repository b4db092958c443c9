//! The call that hands a run over to an allocator of the kept triplets alone.

use super::adapters::Geometry;
use super::allocators::{Allocator, Wrong, highest_target};
use super::binding::Piece;
use super::memory::{Place, Writes, size_of_dtype};
use super::{Choices, Expect, Outcome, World, call, ensure};
use crate::abi::adapter::Adapter;
use crate::abi::allocator::*;
use crate::abi::types::*;
use std::ptr::NonNull;

/// The arrays that both pieces have: where each begins, element type.
fn arrays(from: &Piece, to: &Piece) -> Vec<(Place, Place, DtypeCode)> {
    let mut list = vec![(from.p.0, to.p.0, from.p.1), (from.g.0, to.g.0, from.g.1)];
    list.extend(from.p_low.zip(to.p_low).map(|(a, b)| (a.0, b.0, a.1)));
    let moments = from.moments.zip(to.moments);
    list.extend(moments.iter().flat_map(|(a, b)| [(a.0, b.0, from.state), (a.1, b.1, from.state)]));
    list.extend([(from.averages.0, to.averages.0, from.state), (from.averages.1, to.averages.1, from.state)]);
    list
}

/// What is wrong with the allocator that receives the run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    Handle,
    Itself,
    Unbound,
    Stranger,
    Rank,
    Features,
    Ranknum,
    Fewer,
    Slices,
}

impl Fault {
    fn some(w: &mut Choices) -> Self {
        use Fault::*;
        w.pick(&[Handle, Itself, Unbound, Stranger, Rank, Rank, Features, Ranknum, Fewer, Slices, Slices])
    }
}

impl World {
    pub(super) fn compact(&mut self, c: &mut Choices, mut w: Option<&mut Choices>) -> Outcome {
        let mut expect = Expect::default();
        let (i, handle, spoilt) = self.target(&mut expect, c, w.as_deref_mut())?;
        let id = self.allocators[i].context;
        let Some(context) = self.contexts.iter().position(|context| context.id == id) else {
            // Gone, and so nothing new can be made in it.
            return Ok(());
        };
        if self.allocators[i].bound.is_some() && !self.allocators[i].is_final() && c.chance(85) {
            self.fix_pattern(i, c)?;
        }
        let source = &self.allocators[i];
        if !source.is_final() {
            expect.state("allocator");
        }
        let all = vec![1; source.geos.iter().map(|g| g.rank as usize).sum()];
        let kept = source.seen.as_ref().map_or(all, |seen| seen.pattern.clone());
        let fault = w.filter(|_| !spoilt).map(|w| (Fault::some(w), w));
        let j = match fault {
            Some((fault, w)) => self.unfit((i, context), &kept, fault, &mut expect, w)?,
            None => Some(self.fit((i, context), &kept, c)?),
        };
        let compacted = match j {
            Some(j) => NonNull::new(self.allocators[j].handle),
            None => self.allocator_handle(i, true, c),
        };
        let (mut writes, mut pairs) = (Writes::default(), Vec::new());
        if let Some(j) = j.filter(|_| expect.is_success()) {
            let (from, to) = (&self.allocators[i], &self.allocators[j]);
            pairs = paired(from, to, &kept)?;
            for (from, to) in &pairs {
                arrays(from, to).iter().for_each(|(_, place, dtype)| writes.bytes(*place, to.array_bytes(*dtype)));
            }
            if let Some(b) = &to.bound {
                writes.bytes(b.state, b.state_bytes);
            }
        }
        if !call!(
            self,
            expect,
            writes,
            adalora_allocator_compact_sync(handle.map(|h| h.as_ref()), compacted, std::ptr::null_mut())
        )? {
            return Ok(());
        }
        let j = j.ok_or("no allocator received the run")?;
        let source = &self.allocators[i];
        for (from, to) in &pairs {
            let elements = source.kept_elements(from, &kept, from.begin..from.end);
            for (a, b, dtype) in arrays(from, to) {
                let size = size_of_dtype(dtype);
                let expected: Vec<u8> = elements
                    .iter()
                    .flat_map(|e| self.memory.read(a.offset((e - from.begin) * size), size))
                    .copied()
                    .collect();
                let found = self.memory.read(b, to.array_bytes(dtype));
                ensure!(found == expected, "{} holds {found:?}, expected {expected:?}", to.name());
            }
        }
        let mut expected = source.seen.clone().ok_or("nothing seen")?;
        expected.pattern = vec![1; kept.iter().filter(|k| **k != 0).count()];
        self.allocators[j].seen = None;
        self.inspect(j, c)?;
        let seen = self.allocators[j].seen.as_ref().ok_or("nothing seen")?;
        ensure!(*seen == expected, "after the compaction: {seen:?}, expected {expected:?}");
        Ok(())
    }

    /// Makes a pattern final.
    fn fix_pattern(&mut self, i: usize, c: &mut Choices) -> Outcome {
        let n: i64 = self.allocators[i].geos.iter().map(|g| g.rank).sum();
        let kept: Vec<u8> = (0..n).map(|_| c.pick(&[0, 1, 1])).collect();
        let place = self.memory.bytes(&kept, 1, c);
        let from = self.memory.pointer::<u8>(place).cast_const();
        let (handle, writes) = (self.allocator_handle(i, false, c), self.allocators[i].pattern_writes(&kept, 1));
        let nothing = std::ptr::null_mut();
        call!(self, Expect::default(), writes, adalora_allocator_set_pattern(handle, from, 1, nothing))?;
        self.check_pattern(i, &kept, 1, c)
    }

    /// An allocator that can receive a run, bound.
    fn fit(&mut self, (i, context): (usize, usize), kept: &[u8], c: &mut Choices) -> Result<usize, String> {
        let geos = compacted(&self.allocators[i], kept);
        let j = self.make_like(i, context, &geos, c)?;
        self.bind_kept(j, i, kept, c)?;
        Ok(j)
    }

    /// An allocator of these adapters, with the same descriptor.
    fn make_like(&mut self, i: usize, context: usize, geos: &[Geometry], c: &mut Choices) -> Result<usize, String> {
        let first = self.adapters.len();
        geos.iter().try_for_each(|g| self.make_adapter(context, *g, c, None))?;
        let handles: Vec<*const Adapter> = self.adapters[first..].iter().map(|a| a.handle.cast_const()).collect();
        let mut d = AllocatorDesc { n_adapters: geos.len() as i64, ..self.allocators[i].d };
        d.target_rank = d.target_rank.min(highest_target(geos, d.budget_unit));
        self.make_allocator(context, (geos, &handles), d, Wrong::default(), Expect::default(), c)?;
        Ok(self.allocators.len() - 1)
    }

    /// An allocator that cannot; nothing where the handle is to be spoilt.
    fn unfit(
        &mut self,
        (i, context): (usize, usize),
        kept: &[u8],
        fault: Fault,
        expect: &mut Expect,
        w: &mut Choices,
    ) -> Result<Option<usize>, String> {
        let mut geos = compacted(&self.allocators[i], kept);
        let k = w.below(geos.len());
        match fault {
            Fault::Handle => {
                expect.handle("compacted");
                return Ok(None);
            }
            Fault::Itself => {
                expect.argument("compacted");
                return Ok(Some(i));
            }
            Fault::Unbound => {
                expect.state("compacted");
                return self.make_like(i, context, &geos, w).map(Some);
            }
            Fault::Stranger => {
                self.create_context(w, None)?;
                expect.argument("compacted");
                let j = self.make_like(i, self.contexts.len() - 1, &geos, w)?;
                self.bind_at(j, w, None)?;
                return Ok(Some(j));
            }
            Fault::Rank => {
                let g = &mut geos[k];
                let others: Vec<i64> = (0..=g.ranknum).filter(|rank| *rank != g.rank).collect();
                if others.is_empty() {
                    expect.argument("compacted");
                    return Ok(Some(i));
                }
                g.rank = w.pick(&others);
            }
            Fault::Features => {
                let g = &mut geos[k];
                let side = if w.chance(50) { &mut g.input } else { &mut g.output };
                *side += 1;
            }
            Fault::Ranknum => geos[k].ranknum += 1,
            Fault::Fewer if geos.len() > 1 => drop(geos.remove(k)),
            Fault::Fewer => geos.push(geos[0]),
            // Cut elsewhere; where that is no difference, it is bound as it has to be.
            Fault::Slices => {
                let j = self.make_like(i, context, &geos, w)?;
                self.bind_at(j, w, None)?;
                let fits = paired(&self.allocators[i], &self.allocators[j], kept).is_ok();
                if fits {
                    self.bind_kept(j, i, kept, w)?;
                } else {
                    expect.argument("compacted");
                }
                return Ok(Some(j));
            }
        }
        expect.argument("compacted");
        let j = self.make_like(i, context, &geos, w)?;
        self.bind_at(j, w, None)?;
        Ok(Some(j))
    }
}

/// The adapters that are left.
fn compacted(source: &Allocator, kept: &[u8]) -> Vec<Geometry> {
    let left = |(k, g): (usize, &Geometry)| {
        let first = source.first_triplet(k);
        let rank = kept[first..first + g.rank as usize].iter().filter(|k| **k != 0).count();
        Geometry { rank: rank as i64, ..*g }
    };
    source.geos.iter().enumerate().map(left).collect()
}

/// Pieces, and those that hold what is kept of them.
fn paired(from: &Allocator, to: &Allocator, kept: &[u8]) -> Result<Vec<(Piece, Piece)>, String> {
    let mut others: Vec<Piece> = to.pieces().into_iter().filter(|p| p.len() > 0).collect();
    let mut pairs = Vec::new();
    for piece in from.pieces() {
        let before = |element: usize| from.kept_elements(&piece, kept, 0..element).len();
        let range = (before(piece.begin), before(piece.end));
        if range.0 == range.1 {
            continue;
        }
        let same = |p: &Piece| {
            (p.adapter, p.matrix, (p.begin, p.end)) == (piece.adapter, piece.matrix, range)
                && (p.p.1, p.p_low.map(|low| low.1), p.g.1) == (piece.p.1, piece.p_low.map(|low| low.1), piece.g.1)
        };
        let at = others.iter().position(same).ok_or_else(|| format!("no piece holds {}", piece.name()))?;
        pairs.push((piece, others.swap_remove(at)));
    }
    others.first().map_or(Ok(pairs), |other| Err(format!("{} holds nothing kept", other.name())))
}
