//! Where an allocator's buffers lie, and the call that tells it.

use super::adapters::{Geometry, one_u64, overlapping};
use super::allocators::Allocator;
use super::memory::{Fill, Memory, Place, Writes, bytes_of, encode, size_of_dtype};
use super::{Choices, Expect, Outcome, World, call, ensure};
use crate::abi::allocator::*;
use crate::abi::status::*;
use crate::abi::types::*;
use std::ffi::c_void;
use std::mem::{MaybeUninit, offset_of};
use std::ptr::NonNull;

/// A slice and its arrays.
#[derive(Clone)]
pub(super) struct Piece {
    pub(super) adapter: usize,
    pub(super) matrix: i32,
    pub(super) begin: usize,
    pub(super) end: usize,
    pub(super) replica: bool,
    pub(super) p: (Place, DtypeCode),
    pub(super) p_low: Option<(Place, DtypeCode)>,
    pub(super) g: (Place, DtypeCode),
    pub(super) moments: Option<(Place, Place)>,
    pub(super) averages: (Place, Place),
    pub(super) state: DtypeCode,
    d: Slice,
}

impl Piece {
    pub(super) fn name(&self) -> String {
        let Self { adapter, matrix, begin, end, .. } = self;
        format!("elements {begin} to {end} of matrix {matrix} of adapter {adapter}")
    }

    pub(super) fn len(&self) -> usize {
        self.end - self.begin
    }

    /// Bytes of an array of the state type.
    pub(super) fn state_bytes(&self) -> usize {
        self.len() * size_of_dtype(self.state)
    }

    pub(super) fn array_bytes(&self, dtype: DtypeCode) -> usize {
        self.len() * size_of_dtype(dtype)
    }
}

/// Where an allocator's buffers lie.
#[derive(Clone)]
pub(super) struct Bound {
    blocks: Vec<usize>,
    pub(super) state: Place,
    pub(super) state_bytes: usize,
    pub(super) workspace: Place,
    pub(super) workspace_bytes: usize,
    pub(super) pieces: Vec<Piece>,
    hypers: Vec<Hyper>,
    /// Whether AdamW can be asked for.
    pub(super) serves_adamw: bool,
    /// Whether Gram matrices can be asked for.
    pub(super) whole_columns: bool,
}

fn elements(g: &Geometry, matrix: i32) -> usize {
    let columns = match matrix {
        ADALORA_MATRIX_A => g.input,
        ADALORA_MATRIX_E => 1,
        _ => g.output,
    };
    (g.rank * columns) as usize
}

/// A range that a process owns.
#[derive(Clone, Copy)]
struct Share {
    adapter: usize,
    matrix: i32,
    begin: usize,
    end: usize,
    /// Whether another process owns it too.
    replica: bool,
    /// Whether it has a low copy of the parameters, and the type of its gradients; any where it does not matter.
    types: Option<(bool, DtypeCode)>,
}

/// Ranges that a process owns: all elements where it is not sharded.
fn shares(geos: &[Geometry], sharded: bool, c: &mut Choices) -> Vec<Share> {
    let mut list = Vec::new();
    // Whole adapters, or any pieces.
    let whole = c.chance(60);
    for (adapter, g) in geos.iter().enumerate() {
        if sharded && whole && c.chance(30) {
            continue;
        }
        let replica = whole && c.chance(15);
        for matrix in [ADALORA_MATRIX_A, ADALORA_MATRIX_E, ADALORA_MATRIX_B] {
            let size = elements(g, matrix);
            let mut cuts = vec![0, size];
            for _ in 0..c.pick(&[0, 0, 1, 2]) {
                let cut = c.below(size + 1);
                let rows = matrix == ADALORA_MATRIX_B && c.chance(85);
                cuts.push(if rows { cut / g.rank.max(1) as usize * g.rank as usize } else { cut });
            }
            cuts.sort_unstable();
            for cut in cuts.windows(2) {
                let dropped = sharded && !whole && c.chance(25);
                let replica = if whole { replica } else { c.chance(10) };
                if !dropped && (cut[0] < cut[1] || c.chance(30)) {
                    list.push(Share { adapter, matrix, begin: cut[0], end: cut[1], replica, types: None });
                }
            }
        }
    }
    c.shuffle(&mut list);
    list
}

/// For each column of A and each row of B that is owned at all: whether all of it is, and by slices that agree on `replica`.
fn owns_whole_columns(geos: &[Geometry], pieces: &[Piece]) -> bool {
    geos.iter().enumerate().all(|(adapter, g)| {
        let of = |matrix| pieces.iter().filter(move |p| p.adapter == adapter && p.matrix == matrix && p.len() > 0);
        let mut columns = vec![[0; 2]; g.input as usize];
        for piece in of(ADALORA_MATRIX_A) {
            (piece.begin..piece.end).for_each(|i| columns[i % g.input as usize][usize::from(piece.replica)] += 1);
        }
        let rank = g.rank as usize;
        columns.iter().all(|count| [[0, 0], [g.rank, 0], [0, g.rank]].contains(count))
            // A row of B has to be in one slice.
            && of(ADALORA_MATRIX_B).all(|p| p.begin % rank == 0 && p.end % rank == 0)
    })
}

fn piece(
    m: &mut Memory,
    g: &Geometry,
    Share { adapter, matrix, begin, end, replica, types }: Share,
    (hypers, moments, fill): (usize, bool, Fill),
    c: &mut Choices,
) -> Piece {
    let n = end - begin;
    let state = g.compute();
    let low = g.param;
    let (master, g_dtype) = types.unwrap_or((low != state && c.chance(50), c.pick(&[low, state])));
    let p_dtype = if master { state } else { low };
    let has_moments = moments || c.chance(30);
    let bytes = |dtype| n * size_of_dtype(dtype);
    let sizes = [
        bytes(p_dtype),
        if master { bytes(low) } else { 0 },
        bytes(g_dtype),
        if has_moments { bytes(state) } else { 0 },
        if has_moments { bytes(state) } else { 0 },
        bytes(state),
        bytes(state),
    ];
    let places = m.pack(&sizes, 8, c);
    m.fill(places[0], n, p_dtype, fill, c);
    if master {
        m.fill(places[1], n, low, fill, c);
    }
    m.fill(places[2], n, g_dtype, fill, c);
    let zeros = vec![0; sizes[5]];
    for i in (3..7).filter(|i| sizes[*i] > 0) {
        m.write(places[i], &zeros);
    }
    let null = n == 0 && c.chance(50);
    let at = |i: usize| if null { std::ptr::null_mut() } else { m.pointer::<c_void>(places[i]) };
    let absent = std::ptr::null_mut();
    let d = Slice {
        struct_size: 0,
        adapter: adapter as i64,
        begin: begin as i64,
        end: end as i64,
        matrix,
        hyper: c.below(hypers.max(1)) as i32,
        p_dtype: if c.chance(50) { 0 } else { p_dtype },
        g_dtype: if g_dtype == low && c.chance(50) { 0 } else { g_dtype },
        replica: i32::from(replica),
        reserved: 0,
        p: at(0),
        p_low: if master { m.pointer(places[1]) } else { absent },
        g: at(2),
        m: if has_moments { m.pointer(places[3]) } else { absent },
        v: if has_moments { m.pointer(places[4]) } else { absent },
        exp_avg_ipt: at(5),
        exp_avg_unc: at(6),
    };
    Piece {
        adapter,
        matrix,
        begin,
        end,
        replica,
        p: (places[0], p_dtype),
        p_low: master.then_some((places[1], low)),
        g: (places[2], g_dtype),
        moments: has_moments.then_some((places[3], places[4])),
        averages: (places[5], places[6]),
        state,
        d,
    }
}

fn hyper(m: &mut Memory, c: &mut Choices) -> Hyper {
    let lr = m.bytes(&encode(c.pick(&[1e-3, 1e-2, 0.0, 1e30, f64::NAN]), ADALORA_FLOAT64), 8, c);
    let decay = m.bytes(&encode(c.pick(&[0.0, 0.01, 1.0]), ADALORA_FLOAT64), 8, c);
    Hyper {
        struct_size: 0,
        lr: m.pointer::<f64>(lr),
        weight_decay: m.pointer::<f64>(decay),
        beta1: c.pick(&[0.9, 0.0, 0.5]),
        beta2: c.pick(&[0.999, 0.0, 0.5]),
        eps: c.pick(&[1e-8, 0.0, 1.0]),
    }
}

/// An array's name, extent and alignment, and which of a slice's it is.
type Array = (String, usize, usize, Option<(usize, usize)>);

/// Arguments of a bind.
struct Arguments {
    state: *mut c_void,
    workspace: *mut c_void,
    slices: Vec<Slice>,
    hypers: Vec<Hyper>,
    n: i64,
    n_hyper: i64,
    spoiled_slice: Option<usize>,
    spoiled_hyper: Option<usize>,
    null: [bool; 2],
    narrow: [Option<usize>; 2],
}

impl World {
    /// State and workspace of that many slices, and Gram matrices.
    pub(super) fn ask_allocator_sizes(
        &mut self,
        i: usize,
        slices: usize,
        c: &mut Choices,
    ) -> Result<[usize; 3], String> {
        let handle = self.allocators[i].handle.cast_const();
        let place = self.memory.private(24, 8, c);
        let at = |k: usize| self.memory.pointer::<MaybeUninit<usize>>(place.offset(8 * k));
        let (a, b, d) = (at(0), at(1), at(2));
        let mut writes = Writes::default();
        writes.bytes(place, 24);
        call!(
            self,
            Expect::default(),
            writes,
            adalora_allocator_sizes(handle.as_ref(), slices as i64, Some(&mut *a), Some(&mut *b), Some(&mut *d))
        )?;
        Ok([0, 1, 2].map(|k| self.memory.read_i64(place, k) as usize))
    }

    /// Position of an allocator, made if there is none.
    pub(super) fn some_allocator(&mut self, c: &mut Choices) -> Result<usize, String> {
        if self.allocators.is_empty() {
            self.create_allocator(c, None)?;
        }
        Ok(c.below(self.allocators.len()))
    }

    /// The same, almost always with buffers.
    pub(super) fn some_bound(&mut self, c: &mut Choices) -> Result<usize, String> {
        let i = self.some_allocator(c)?;
        if self.allocators[i].bound.is_none() && c.chance(95) {
            self.bind_at(i, c, None)?;
        }
        Ok(i)
    }

    pub(super) fn bind(&mut self, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let i = self.some_allocator(c)?;
        self.bind_at(i, c, w)
    }

    pub(super) fn bind_at(&mut self, i: usize, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let shares = shares(&self.allocators[i].geos, self.allocators[i].sharded, c);
        self.bind_shares(i, shares, c, w)
    }

    fn bind_shares(&mut self, i: usize, shares: Vec<Share>, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let geos = self.allocators[i].geos.clone();
        let sharded = self.allocators[i].sharded;
        let mut expect = Expect::default();
        self.memory.begin_keeping();
        let moves = self.allocators[i].bound.is_some() && c.chance(50);
        let hypers: Vec<Hyper> = (0..c.pick(&[0, 1, 1, 2, 3])).map(|_| hyper(&mut self.memory, c)).collect();
        let (moments, fill) = (c.chance(85), Fill::some(c));
        let pieces: Vec<Piece> = shares
            .into_iter()
            .map(|share| piece(&mut self.memory, &geos[share.adapter], share, (hypers.len(), moments, fill), c))
            .collect();
        let [state_bytes, workspace_bytes, _] = self.ask_allocator_sizes(i, pieces.len(), c)?;
        let state = self.memory.place(state_bytes, 64, c);
        // Where a run goes on at another address, its state is copied there.
        let old = self.allocators[i].bound.as_ref().filter(|_| moves).map(|b| self.memory.read(b.state, b.state_bytes));
        let content = old.map_or_else(|| vec![0; state_bytes], <[u8]>::to_vec);
        self.memory.write(state, &content);
        let workspace = self.memory.workspace(workspace_bytes, c);
        let blocks = self.memory.end_keeping();
        let filled = |p: &&Piece| p.len() > 0;
        let serves_adamw = pieces.iter().filter(filled).all(|p| p.moments.is_some())
            && (!hypers.is_empty() || !pieces.iter().any(|p| p.len() > 0));
        let whole_columns = owns_whole_columns(&geos, &pieces);
        let bound = Bound {
            blocks,
            state,
            state_bytes,
            workspace,
            workspace_bytes,
            pieces,
            hypers,
            serves_adamw,
            whole_columns,
        };
        let mut handle = NonNull::new(self.allocators[i].handle);
        let mut a = Arguments {
            state: self.memory.pointer(state),
            workspace: self.memory.pointer(workspace),
            slices: bound.pieces.iter().map(|p| p.d).collect(),
            hypers: bound.hypers.clone(),
            n: bound.pieces.len() as i64,
            n_hyper: bound.hypers.len() as i64,
            spoiled_slice: None,
            spoiled_hyper: None,
            null: [false; 2],
            narrow: [None; 2],
        };
        if let Some(w) = w {
            if w.chance(5) {
                handle = self.allocator_handle(i, true, w);
                expect.handle("allocator");
            } else {
                self.spoil_binding(&mut a, &bound, &self.allocators[i].geos.clone(), sharded, &mut expect, w);
            }
        }
        let slices: Vec<Vec<u8>> = a.slices.iter().map(bytes_of).collect();
        let minimum = offset_of!(Slice, exp_avg_unc) + 8;
        let (list, mut stride, wrong) = self.memory.descriptors(&slices, minimum, a.spoiled_slice, c);
        if let Some(k) = a.spoiled_slice {
            expect.argument(format!("slices[{k}]{wrong}"));
        }
        let hypers: Vec<Vec<u8>> = a.hypers.iter().map(bytes_of).collect();
        let minimum = offset_of!(Hyper, eps) + 8;
        let (table, mut hyper_stride, wrong) = self.memory.descriptors(&hypers, minimum, a.spoiled_hyper, c);
        if let Some(k) = a.spoiled_hyper {
            expect.argument(format!("hypers[{k}]{wrong}"));
        }
        let nothing = std::ptr::null();
        let from = if a.null[0] { nothing } else { self.memory.pointer::<Slice>(list).cast_const() };
        let table = if a.null[1] { std::ptr::null() } else { self.memory.pointer::<Hyper>(table).cast_const() };
        stride = a.narrow[0].unwrap_or(stride);
        hyper_stride = a.narrow[1].unwrap_or(hyper_stride);
        let mut writes = Writes::default();
        writes.bytes(state, state_bytes);
        writes.bytes(workspace, workspace_bytes);
        if call!(
            self,
            expect,
            writes,
            adalora_allocator_bind(
                handle,
                a.state,
                a.workspace,
                from,
                stride,
                a.n,
                table,
                hyper_stride,
                a.n_hyper,
                std::ptr::null_mut()
            )
        )? {
            if moves {
                ensure!(
                    self.memory.read(state, state_bytes) == content,
                    "a state that goes on was changed by the bind"
                );
            }
            let allocator = &mut self.allocators[i];
            if !moves {
                allocator.seen = None;
            }
            if let Some(old) = allocator.bound.replace(bound) {
                self.memory.release(old.blocks);
            }
            self.inspect(i, c)
        } else {
            self.memory.release(bound.blocks);
            Ok(())
        }
    }

    /// Binds an allocator of the triplets alone that another keeps: to what is kept of the other's slices.
    pub(super) fn bind_kept(&mut self, i: usize, of: usize, kept: &[u8], c: &mut Choices) -> Outcome {
        let other = &self.allocators[of];
        if other.bound.is_none() {
            return self.bind_at(i, c, None);
        }
        let mut shares = Vec::new();
        for p in other.pieces() {
            let before = |element: usize| other.kept_elements(&p, kept, 0..element).len();
            let (begin, end) = (before(p.begin), before(p.end));
            let types = Some((p.p_low.is_some(), p.g.1));
            if begin < end || c.chance(30) {
                shares.push(Share { adapter: p.adapter, matrix: p.matrix, begin, end, replica: p.replica, types });
            }
        }
        c.shuffle(&mut shares);
        self.bind_shares(i, shares, c, None)
    }

    /// Gives an allocator's buffers back after its end.
    pub(super) fn release_bound(&mut self, allocator: Allocator) {
        if let Some(bound) = allocator.bound {
            self.memory.release(bound.blocks);
        }
    }

    fn spoil_binding(
        &mut self,
        a: &mut Arguments,
        bound: &Bound,
        geos: &[Geometry],
        sharded: bool,
        expect: &mut Expect,
        w: &mut Choices,
    ) {
        let k = w.below(a.slices.len().max(1));
        let filled = bound.pieces.get(k).is_some_and(|p| p.len() > 0);
        let triplets: i64 = geos.iter().map(|g| g.rank).sum();
        match w.below(14) {
            0 => {
                a.state = w.pick(&[std::ptr::null_mut(), a.state.wrapping_byte_add(8), a.state.wrapping_byte_add(1)]);
                expect.argument("state");
            }
            1 if bound.workspace_bytes > 0 => {
                a.workspace = w.pick(&[std::ptr::null_mut(), a.workspace.wrapping_byte_add(8)]);
                expect.argument("workspace");
            }
            2 => {
                // Neither zeros nor a state of these adapters: bytes, or the state of others.
                let mut content = self.memory.read(bound.state, bound.state_bytes).to_vec();
                if content.iter().all(|b| *b == 0) || w.chance(50) {
                    let at = w.below(content.len());
                    content.fill(0);
                    content[at] = 1 + w.below(255) as u8;
                } else {
                    content[8 + w.below(8)] ^= 1 << w.below(8);
                }
                self.memory.write(bound.state, &content);
                expect.argument("state");
            }
            3 if !a.slices.is_empty() => (a.null[0], ()) = (true, expect.argument("slices")),
            4 if !a.slices.is_empty() => {
                a.narrow[0] = Some(w.pick(&[0, 8, offset_of!(Slice, exp_avg_unc) + 7, (1 << 16) + 1]));
                expect.argument("stride of slices");
            }
            5 => (a.n, ()) = (w.pick(&[-1, i64::MIN]), expect.argument("number of slices")),
            6 if !a.hypers.is_empty() => match w.below(3) {
                0 => (a.null[1], ()) = (true, expect.argument("hypers")),
                1 => (a.narrow[1], ()) = (Some(w.pick(&[0, 8])), expect.argument("stride of hypers")),
                _ => (a.n_hyper, ()) = (w.pick(&[-1, i64::MIN]), expect.argument("number of hypers")),
            },
            7 if !a.hypers.is_empty() => {
                let k = w.below(a.hypers.len());
                let h = &mut a.hypers[k];
                let name = match w.below(8) {
                    7 => {
                        let Some(piece) = bound.pieces.iter().find(|p| p.len() > 0) else { return };
                        let inside = w.pick(&[piece.p.0, piece.g.0, piece.averages.0, bound.state]);
                        h.lr = self.memory.pointer::<f64>(inside);
                        "lr"
                    }
                    0 => {
                        h.lr = w.pick(&[std::ptr::null(), h.lr.wrapping_byte_add(4)]);
                        "lr"
                    }
                    1 => {
                        h.weight_decay = w.pick(&[std::ptr::null(), h.weight_decay.wrapping_byte_add(1)]);
                        "weight_decay"
                    }
                    2 => {
                        h.beta1 = w.pick(&[1.0, -0.1, f64::NAN, f64::INFINITY]);
                        "beta1"
                    }
                    3 => {
                        h.beta2 = w.pick(&[1.0, -0.1, f64::NAN]);
                        "beta2"
                    }
                    4 => {
                        h.eps = w.pick(&[-1.0, f64::NAN, f64::INFINITY]);
                        "eps"
                    }
                    _ => {
                        a.spoiled_hyper = Some(k);
                        return;
                    }
                };
                expect.argument(format!("hypers[{k}].{name}"));
            }
            8 if !a.slices.is_empty() => a.spoiled_slice = Some(k),
            9 if !a.slices.is_empty() => {
                // A slice that is not there, or there twice.
                let p = &bound.pieces[k];
                if filled && !sharded && w.chance(50) {
                    a.slices.swap_remove(k);
                    a.n -= 1;
                    expect.argument("slices");
                } else if filled {
                    let twice = a.slices[k];
                    let n = p.array_bytes(ADALORA_FLOAT64);
                    let places = self.memory.pack(&[n; 7], 8, w);
                    let at = |i: usize| self.memory.pointer::<c_void>(places[i]);
                    let null = std::ptr::null_mut();
                    let other = |old: *mut c_void, i: usize| if old.is_null() { null } else { at(i) };
                    let begin = twice.begin + w.below(p.len()) as i64;
                    a.slices.push(Slice {
                        begin,
                        p: at(0),
                        p_low: other(twice.p_low, 1),
                        g: at(2),
                        m: other(twice.m, 3),
                        v: other(twice.v, 4),
                        exp_avg_ipt: at(5),
                        exp_avg_unc: at(6),
                        ..twice
                    });
                    a.n += 1;
                    let names = (0..a.slices.len()).map(|i| format!("slices[{i}].begin"));
                    // One more slice may also need one more workspace than there is; that is not looked at.
                    expect.refuse(ADALORA_ERROR_INVALID_ARGUMENT, names);
                }
            }
            10 if filled => self.spoil_overlap(a, bound, expect, w),
            11 if triplets > 0 && filled => self.spoil_overlap(a, bound, expect, w),
            _ if !a.slices.is_empty() => {
                if let Some(name) = spoil_slice(&mut a.slices[k], &bound.pieces[k], geos, bound.hypers.len(), w) {
                    expect.argument(format!("slices[{k}].{name}"));
                }
            }
            _ => {}
        }
    }

    /// Two arrays that share an element.
    fn spoil_overlap(&mut self, a: &mut Arguments, bound: &Bound, expect: &mut Expect, w: &mut Choices) {
        let mut list: Vec<Array> = Vec::new();
        list.push(("state".into(), bound.state_bytes, 64, None));
        list.push(("workspace".into(), bound.workspace_bytes, 64, None));
        for (k, piece) in bound.pieces.iter().enumerate() {
            let bytes = |dtype| (piece.array_bytes(dtype), size_of_dtype(dtype));
            let mut push = |name: &str, (extent, align): (usize, usize), which| {
                list.push((format!("slices[{k}].{name}"), extent, align, Some((k, which))));
            };
            push("p", bytes(piece.p.1), 0);
            push("g", bytes(piece.g.1), 2);
            push("exp_avg_ipt", bytes(piece.state), 5);
            push("exp_avg_unc", bytes(piece.state), 6);
            if let Some((_, dtype)) = piece.p_low {
                push("p_low", bytes(dtype), 1);
            }
            if piece.moments.is_some() {
                push("m", bytes(piece.state), 3);
                push("v", bytes(piece.state), 4);
            }
        }
        list.retain(|entry| entry.1 > 0);
        let (i, j) = (w.below(list.len()), w.below(list.len()));
        let (mut first, mut second) = (std::ptr::null_mut(), std::ptr::null_mut());
        if i == j || !overlapping(&mut self.memory, (&mut first, list[i].1), (&mut second, list[j].1, list[j].2), w) {
            return;
        }
        for (entry, to) in [(&list[i], first), (&list[j], second)] {
            match entry.3 {
                None if entry.0 == "state" => {
                    // Zeros, so that it is the overlap that is refused.
                    a.state = to;
                }
                None => a.workspace = to,
                Some((k, which)) => {
                    let s = &mut a.slices[k];
                    *[&mut s.p, &mut s.p_low, &mut s.g, &mut s.m, &mut s.v, &mut s.exp_avg_ipt, &mut s.exp_avg_unc]
                        [which] = to;
                }
            }
        }
        expect.refuse(ADALORA_ERROR_INVALID_ARGUMENT, [&list[i].0, &list[j].0]);
    }

    /// Writes other gradients, where a caller's backward pass would.
    pub(super) fn new_gradients(&mut self, i: usize, c: &mut Choices) {
        let Some(bound) = &self.allocators[i].bound else { return };
        let fill = if c.chance(15) { Fill::Wild } else { Fill::Plain };
        for p in bound.pieces.clone() {
            if c.chance(80) {
                self.memory.fill(p.g.0, p.len(), p.g.1, fill, c);
                if c.chance(2) && p.len() > 0 {
                    self.memory.write_element(p.g.0, c.below(p.len()), p.g.1, f64::INFINITY);
                }
            }
        }
    }

    /// An address within an allocator's buffers, with that much room behind it.
    pub(super) fn within_bound(&self, i: usize, bytes: usize, w: &mut Choices) -> Option<*mut c_void> {
        let bound = self.allocators[i].bound.as_ref()?;
        let mut places = vec![(bound.state, bound.state_bytes), (bound.workspace, bound.workspace_bytes)];
        for p in &bound.pieces {
            let state = p.state_bytes();
            places.extend([(p.p.0, p.array_bytes(p.p.1)), (p.g.0, p.array_bytes(p.g.1))]);
            places.extend([(p.averages.0, state), (p.averages.1, state)]);
            places.extend(p.p_low.map(|(place, dtype)| (place, p.array_bytes(dtype))));
            places.extend(p.moments.into_iter().flat_map(|(m, v)| [(m, state), (v, state)]));
        }
        // All of them begin at multiples of eight bytes and are followed by nothing up to the next.
        places.retain(|(_, room)| *room > 0 && bytes <= room.next_multiple_of(8));
        let first = (!places.is_empty()).then(|| w.pick(&places))?;
        Some(self.memory.pointer(first.0))
    }

    /// One value in the caller's memory.
    pub(super) fn one_f64(&mut self, value: f64, c: &mut Choices) -> Place {
        self.memory.bytes(&encode(value, ADALORA_FLOAT64), 8, c)
    }

    pub(super) fn any_u64(&mut self, c: &mut Choices) -> Place {
        one_u64(&mut self.memory, c)
    }
}

/// Makes a field of a slice wrong.
fn spoil_slice(
    s: &mut Slice,
    piece: &Piece,
    geos: &[Geometry],
    hypers: usize,
    w: &mut Choices,
) -> Option<&'static str> {
    let g = &geos[piece.adapter];
    let size = elements(g, piece.matrix) as i64;
    let filled = piece.len() > 0;
    let misplaced = |old: *mut c_void, w: &mut Choices| w.pick(&[std::ptr::null_mut(), old.wrapping_byte_add(1)]);
    Some(match w.below(16) {
        0 => {
            s.adapter = w.pick(&[-1, geos.len() as i64, i64::MAX, i64::MIN]);
            "adapter"
        }
        1 => {
            s.matrix = w.pick(&[0, 4, -1]);
            "matrix"
        }
        2 => {
            s.begin = w.pick(&[-1, s.end + 1, i64::MIN]);
            "begin and end"
        }
        3 => {
            s.end = w.pick(&[size + 1, s.begin - 1, -1, i64::MAX]);
            "begin and end"
        }
        4 => {
            s.hyper = w.pick(&[-1, hypers.max(1) as i32, i32::MAX]);
            "hyper"
        }
        5 => {
            s.p_dtype = w.pick(&[5, -1]);
            "p_dtype"
        }
        6 => {
            let wrong = super::adapters::DTYPES.into_iter().find(|t| *t != piece.p.1)?;
            s.p_dtype = wrong;
            "p_dtype"
        }
        7 => {
            let fits = |t: &DtypeCode| *t != g.param && *t != piece.state;
            let wrong = super::adapters::DTYPES.into_iter().find(fits)?;
            s.g_dtype = w.pick(&[wrong, 5, -1]);
            "g_dtype"
        }
        8 => {
            s.replica = w.pick(&[2, -1]);
            "replica"
        }
        9 => {
            s.reserved = w.pick(&[1, -1]);
            "reserved"
        }
        10 if filled => {
            s.p = misplaced(s.p, w);
            "p"
        }
        11 if filled => {
            s.g = misplaced(s.g, w);
            "g"
        }
        12 if filled && g.param == piece.state => {
            s.p_low = s.p;
            "p_low"
        }
        12 if filled && piece.p_low.is_some() => {
            s.p_low = s.p_low.wrapping_byte_add(1);
            "p_low"
        }
        13 if filled => {
            s.exp_avg_ipt = misplaced(s.exp_avg_ipt, w);
            "exp_avg_ipt"
        }
        14 if filled => {
            s.exp_avg_unc = misplaced(s.exp_avg_unc, w);
            "exp_avg_unc"
        }
        15 if piece.moments.is_some() => {
            if w.chance(50) {
                s.m = std::ptr::null_mut();
                "m"
            } else {
                s.v = if filled { misplaced(s.v, w) } else { std::ptr::null_mut() };
                "v"
            }
        }
        _ => return None,
    })
}
