//! Forward and backward calls, of several adapters that read one x, whole or in stages.

use super::adapters::{Geometry, described, overlapping, spoil_matrix, spoil_triplets, triplets};
use super::memory::{Fill, Mat, Memory, Place, Writes, bytes_of, size_of_dtype};
use super::{Choices, Expect, Outcome, World, call, ensure};
use crate::abi::adapter::{Adapter as Handle, *};
use crate::abi::status::*;
use crate::abi::types::*;
use std::ffi::c_void;
use std::mem::{MaybeUninit, offset_of};

const MINIMUM: usize = offset_of!(Call, params) + size_of::<Triplets>();

/// What no call may look at.
const UNREAD: Matrix =
    Matrix { data: 3 as *mut c_void, rows: -7, columns: i64::MAX, row_stride: -1, dtype: 77, reserved: 5 };

/// Bytes that belong to one adapter alone.
#[derive(Clone, Copy)]
struct Saved {
    place: Place,
    bytes: usize,
    address: *mut c_void,
}

impl Saved {
    fn new(m: &mut Memory, g: &Geometry, tokens: i64, c: &mut Choices) -> Self {
        let n = (tokens * g.rank) as usize;
        let size = size_of_dtype(g.compute());
        let place = m.place(n * size, size, c);
        m.fill(place, n, g.compute(), Fill::some(c), c);
        Self { place, bytes: n * size, address: m.pointer(place) }
    }
}

/// One adapter's share of a call.
struct Share {
    handle: *const Handle,
    g: Geometry,
    params: [Mat; 3],
    grads: Option<[Mat; 3]>,
    /// y or dy, where it is read.
    output: Option<Mat>,
    h: Option<Saved>,
    g_saved: Option<Saved>,
    pattern: Option<Place>,
    pattern_at: *const u8,
    dropout: Dropout,
    masks: bool,
    scaling: f64,
}

/// All arguments of a call.
struct Pass {
    backward: bool,
    stages: i32,
    tokens: i64,
    shares: Vec<Share>,
    x: Option<Mat>,
    dx: Option<Mat>,
    workspace: Place,
    workspace_at: *mut c_void,
    bytes: usize,
}

impl Pass {
    fn projects(&self) -> bool {
        self.stages & ADALORA_STAGE_PROJECT != 0
    }

    fn expands(&self) -> bool {
        self.stages & ADALORA_STAGE_EXPAND != 0
    }

    fn reads_x(&self) -> bool {
        if self.backward { self.expands() } else { self.projects() }
    }
}

/// A place in memory that a call names.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Field {
    Params(usize, usize),
    Grads(usize, usize),
    Output(usize),
    H(usize),
    G(usize),
    Pattern(usize),
    Seed(usize),
    X,
    Dx,
    Workspace,
}

struct Operand {
    field: Field,
    name: String,
    extent: usize,
    align: usize,
    written: bool,
}

fn operands(pass: &Pass) -> Vec<Operand> {
    let mut list = Vec::new();
    let mut push = |field, name: String, extent: usize, align: usize, written| {
        if extent > 0 {
            list.push(Operand { field, name, extent, align, written });
        }
    };
    let size = |mat: &Mat| size_of_dtype(mat.d.dtype);
    for (i, share) in pass.shares.iter().enumerate() {
        for (k, factor) in ["A", "E", "B"].into_iter().enumerate() {
            let mat = &share.params[k];
            push(Field::Params(i, k), format!("calls[{i}].params.{factor}"), mat.extent(), size(mat), false);
            if let Some(grads) = &share.grads {
                let written = if k == 2 { pass.projects() } else { pass.expands() };
                let name = format!("calls[{i}].grads.{factor}");
                push(Field::Grads(i, k), name, grads[k].extent(), size(&grads[k]), written);
            }
        }
        if let Some(mat) = &share.output {
            let name = format!("calls[{i}].{}", if pass.backward { "dy" } else { "y" });
            push(Field::Output(i), name, mat.extent(), size(mat), !pass.backward);
        }
        let size = size_of_dtype(share.g.compute());
        if let Some(h) = &share.h {
            push(Field::H(i), format!("calls[{i}].h"), h.bytes, size, !pass.backward && pass.projects());
        }
        if let Some(g) = &share.g_saved {
            push(Field::G(i), format!("calls[{i}].g"), g.bytes, size, pass.projects());
        }
        if share.pattern.is_some() {
            push(Field::Pattern(i), format!("calls[{i}].pattern"), share.g.rank as usize, 1, false);
        }
        if share.masks {
            push(Field::Seed(i), format!("calls[{i}].dropout.seed"), 8, 8, false);
        }
    }
    if let Some(x) = pass.x.as_ref().filter(|_| pass.reads_x()) {
        push(Field::X, "x".into(), x.extent(), size(x), false);
    }
    if let Some(dx) = pass.dx.as_ref().filter(|_| pass.expands()) {
        push(Field::Dx, "dx".into(), dx.extent(), size(dx), true);
    }
    push(Field::Workspace, "workspace".into(), pass.bytes, 64, true);
    list
}

impl Pass {
    fn set(&mut self, field: Field, to: *mut c_void) {
        match field {
            Field::Params(i, k) => self.shares[i].params[k].d.data = to,
            Field::Grads(i, k) => {
                if let Some(grads) = &mut self.shares[i].grads {
                    grads[k].d.data = to;
                }
            }
            Field::Output(i) => {
                if let Some(mat) = &mut self.shares[i].output {
                    mat.d.data = to;
                }
            }
            Field::H(i) => self.shares[i].h.iter_mut().for_each(|h| h.address = to),
            Field::G(i) => self.shares[i].g_saved.iter_mut().for_each(|g| g.address = to),
            Field::Pattern(i) => self.shares[i].pattern_at = to.cast(),
            Field::Seed(i) => self.shares[i].dropout.seed = to.cast(),
            Field::X => self.x.iter_mut().for_each(|x| x.d.data = to),
            Field::Dx => self.dx.iter_mut().for_each(|dx| dx.d.data = to),
            Field::Workspace => self.workspace_at = to,
        }
    }
}

impl World {
    /// Positions of one to three adapters that may read one x.
    fn group(&mut self, c: &mut Choices) -> Result<Vec<usize>, String> {
        let first = self.some_adapter(c)?;
        let lead = (self.adapters[first].context, self.adapters[first].g);
        let mut others: Vec<usize> = (0..self.adapters.len())
            .filter(|i| {
                let (context, g) = (self.adapters[*i].context, self.adapters[*i].g);
                *i != first
                    && context == lead.0
                    && (g.input, g.in_local, g.in_begin, g.activation)
                        == (lead.1.input, lead.1.in_local, lead.1.in_begin, lead.1.activation)
            })
            .collect();
        c.shuffle(&mut others);
        others.truncate(c.below(4));
        others.insert(c.below(others.len() + 1), first);
        Ok(others)
    }

    fn empty_calls(&self, group: &[usize]) -> Vec<Call> {
        let zero = Matrix { data: std::ptr::null_mut(), rows: 0, columns: 0, row_stride: 0, dtype: 0, reserved: 0 };
        let none = Triplets { A: zero, E: zero, B: zero };
        let dropout = Dropout { seed: std::ptr::null(), offset: std::ptr::null(), token0: 0 };
        let call = |i: &usize| Call {
            struct_size: 0,
            adapter: self.adapters[*i].handle,
            params: none,
            grads: none,
            scaling: 0.0,
            y: zero,
            dy: zero,
            h: std::ptr::null_mut(),
            g: std::ptr::null_mut(),
            pattern: std::ptr::null(),
            dropout,
        };
        group.iter().map(call).collect()
    }

    pub(super) fn pass_sizes(&mut self, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let group = self.group(c)?;
        let tokens = c.pick(&[0, 1, 7, 1000]);
        self.ask_sizes(&group, tokens, c, w).map(drop)
    }

    /// Bytes of workspace.
    fn ask_sizes(
        &mut self,
        group: &[usize],
        mut tokens: i64,
        c: &mut Choices,
        w: Option<&mut Choices>,
    ) -> Result<usize, String> {
        let mut calls = self.empty_calls(group);
        let mut expect = Expect::default();
        let (mut spoiled, mut null, mut n) = (None, false, group.len() as i64);
        let saved = self.memory.place(8 * group.len(), 8, c);
        let workspace = self.memory.private(8, 8, c);
        let (mut saved_at, mut no_workspace, mut narrow) = (self.memory.pointer::<usize>(saved), false, false);
        if c.chance(30) {
            saved_at = std::ptr::null_mut();
        }
        if let Some(w) = w {
            let i = w.below(group.len());
            match w.below(8) {
                0 => (spoiled, ()) = (Some(i), ()),
                1 => (null, ()) = (true, expect.argument("calls")),
                2 => (n, ()) = (w.pick(&[0, -1, 65, i64::MIN]), expect.argument("n")),
                3 => (narrow, ()) = (true, expect.argument("stride of calls")),
                4 => {
                    calls[i].adapter = self.adapter_handle(group[i], true, w);
                    expect.handle(format!("calls[{i}].adapter"));
                }
                5 => {
                    // Where no adapter has a triplet, any number of tokens fits memory.
                    let some = group.iter().any(|i| self.adapters[*i].g.rank > 0);
                    tokens = w.pick(&[-1, i64::MIN, if some { i64::MAX } else { -2 }]);
                    expect.argument("tokens");
                }
                6 => {
                    saved_at = self.memory.pointer::<usize>(saved).wrapping_byte_add(4);
                    expect.argument("saved");
                }
                _ => (no_workspace, ()) = (true, expect.argument("workspace")),
            }
        }
        // Where the size of one adapter's h overflows, the text says whose.
        if tokens == i64::MAX {
            expect.refuse(ADALORA_ERROR_INVALID_ARGUMENT, (0..group.len()).map(|i| format!("calls[{i}].tokens")));
        }
        let bytes: Vec<Vec<u8>> = calls.iter().map(bytes_of).collect();
        let (list, stride, wrong) = self.memory.descriptors(&bytes, MINIMUM, spoiled, c);
        if let Some(i) = spoiled {
            expect.argument(format!("calls[{i}]{wrong}"));
        }
        let from = if null { std::ptr::null() } else { self.memory.pointer::<Call>(list).cast_const() };
        let stride = if narrow { c.pick(&[0, 8, MINIMUM - 1]) } else { stride };
        let mut writes = Writes::default();
        writes.bytes(workspace, 8);
        if !saved_at.is_null() {
            writes.bytes(saved, 8 * group.len());
        }
        let to = self.memory.pointer::<MaybeUninit<usize>>(workspace);
        let slot = (!no_workspace).then_some(to);
        if !call!(
            self,
            expect,
            writes,
            adalora_adapter_sizes(from, stride, n, tokens, saved_at, slot.map(|to| &mut *to))
        )? {
            return Ok(0);
        }
        if !saved_at.is_null() {
            for (i, adapter) in group.iter().enumerate() {
                let g = &self.adapters[*adapter].g;
                let (found, expected) =
                    (self.memory.read_i64(saved, i), tokens * g.rank * size_of_dtype(g.compute()) as i64);
                ensure!(found == expected, "saved[{i}] is {found}, expected {expected}");
            }
        }
        Ok(self.memory.read_i64(workspace, 0) as usize)
    }

    pub(super) fn pass(&mut self, backward: bool, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let group = self.group(c)?;
        let tokens = if c.chance(4) { c.pick(&[130, 300]) } else { c.pick(&[0, 1, 2, 3, 5, 17, 33, 65]) };
        let bytes = self.ask_sizes(&group, tokens, c, None)?;
        let stages = c.pick(&[ADALORA_STAGE_BOTH, ADALORA_STAGE_BOTH, ADALORA_STAGE_PROJECT, ADALORA_STAGE_EXPAND]);
        let room = bytes + c.pick(&[0, 0, 64, 1]);
        let workspace = self.memory.workspace(room, c);
        let mut pass = Pass {
            backward,
            stages,
            tokens,
            shares: Vec::new(),
            x: None,
            dx: None,
            workspace,
            workspace_at: self.memory.pointer(workspace),
            bytes: room,
        };
        if bytes == 0 && c.chance(50) {
            (pass.workspace_at, pass.bytes) = (std::ptr::null_mut(), 0);
        }
        let lead = self.adapters[group[0]].g;
        let fill = Fill::some(c);
        if pass.reads_x() || c.chance(40) {
            pass.x = Some(self.memory.matrix(tokens, lead.in_local, lead.activation, fill, c));
        }
        if backward && c.chance(70) {
            pass.dx = Some(self.memory.matrix(tokens, lead.in_local, lead.activation, fill, c));
        }
        let reads_output = if backward { pass.projects() } else { pass.expands() };
        let widths: Vec<i64> = group.iter().map(|i| self.adapters[*i].g.out_local).collect();
        let mut outputs: Vec<Option<Mat>> = vec![None; group.len()];
        if reads_output {
            let mats = if c.chance(40) {
                let pitch = widths.iter().sum::<i64>() + c.below(3) as i64;
                self.memory.beside(tokens, &widths, pitch, lead.activation, fill, c)
            } else {
                widths.iter().map(|n| self.memory.matrix(tokens, *n, lead.activation, fill, c)).collect()
            };
            outputs = mats.into_iter().map(Some).collect();
        }
        for (i, output) in group.iter().zip(outputs) {
            let share = self.share(*i, &pass, output, fill, c);
            pass.shares.push(share);
        }
        let accumulate = c.below(2) as i32;
        let writes = self.writes(&pass);
        let written: Vec<Mat> = pass.shares.iter().filter_map(|s| s.grads).flatten().collect();
        let done = self.pass_call(&group, pass, accumulate, writes, c, w)?;
        if done && backward && tokens == 0 && accumulate == 0 {
            for (k, mat) in written.iter().enumerate() {
                let computed = if k % 3 == 2 { ADALORA_STAGE_PROJECT } else { ADALORA_STAGE_EXPAND };
                let zero = self.memory.matrix_elements(mat).iter().all(|x| *x == 0.0);
                ensure!(zero || stages & computed == 0, "gradient {k} is not zero without tokens");
            }
        }
        Ok(())
    }

    fn share(&mut self, adapter: usize, pass: &Pass, output: Option<Mat>, fill: Fill, c: &mut Choices) -> Share {
        let (g, handle) = (self.adapters[adapter].g, self.adapters[adapter].handle.cast_const());
        let m = &mut self.memory;
        let mut params = triplets(m, &g, [g.param; 3], fill, c);
        if g.rank > 0 && c.chance(30) {
            // At the start, all of E is 0.
            params[1] = m.vector(g.rank, g.param, Fill::Zero, c);
        }
        let grads = pass.backward.then(|| {
            let dtypes = [(); 3].map(|()| c.pick(&[g.param, g.compute()]));
            triplets(m, &g, dtypes, fill, c)
        });
        let split = pass.stages != ADALORA_STAGE_BOTH;
        let needs_h = split || (pass.backward && g.in_local < g.input);
        let h = (needs_h || c.chance(50)).then(|| Saved::new(m, &g, pass.tokens, c));
        let g_saved = (pass.backward && (split || c.chance(50))).then(|| Saved::new(m, &g, pass.tokens, c));
        let pattern = c.chance(40).then(|| {
            let kept: Vec<u8> = (0..g.rank).map(|_| c.pick(&[0, 1, 1, 255])).collect();
            m.bytes(&kept, 1, c)
        });
        let masks = g.dropout > 0.0 && pass.reads_x();
        let (seed, offset) = (super::adapters::one_u64(m, c), super::adapters::one_u64(m, c));
        let token0 = c.pick(&[0, 5, (1 << 32) - pass.tokens]);
        let dropout = if masks {
            Dropout { seed: m.pointer::<u64>(seed), offset: m.pointer::<u64>(offset), token0 }
        } else {
            Dropout { seed: UNREAD.data.cast(), offset: std::ptr::null(), token0: -9 }
        };
        Share {
            handle,
            g,
            params,
            grads,
            output,
            h,
            g_saved,
            pattern,
            pattern_at: pattern.map_or(std::ptr::null(), |p| m.pointer::<u8>(p).cast_const()),
            dropout,
            masks,
            scaling: c.pick(&[0.0, 0.0, 1.0, -3.5, 1e30]),
        }
    }

    fn writes(&self, pass: &Pass) -> Writes {
        let mut writes = Writes::default();
        writes.bytes(pass.workspace, pass.bytes);
        for share in &pass.shares {
            if let Some([a, e, b]) = &share.grads {
                if pass.expands() {
                    writes.matrix(a);
                    writes.matrix(e);
                }
                if pass.projects() {
                    writes.matrix(b);
                }
            }
            if let Some(y) = share.output.as_ref().filter(|_| !pass.backward) {
                writes.matrix(y);
            }
            if let Some(h) = share.h.filter(|_| !pass.backward && pass.projects()) {
                writes.bytes(h.place, h.bytes);
            }
            if let Some(g) = share.g_saved.filter(|_| pass.projects()) {
                writes.bytes(g.place, g.bytes);
            }
        }
        if let Some(dx) = pass.dx.as_ref().filter(|_| pass.expands()) {
            writes.matrix(dx);
        }
        writes
    }

    fn pass_call(
        &mut self,
        group: &[usize],
        mut pass: Pass,
        mut accumulate: i32,
        writes: Writes,
        c: &mut Choices,
        w: Option<&mut Choices>,
    ) -> Result<bool, String> {
        let mut expect = Expect::default();
        let mut array = Array { spoiled: None, null: false, narrow: None, n: pass.shares.len() as i64 };
        let mut stages = pass.stages;
        let mut null_x = false;
        if let Some(w) = w {
            let i = w.below(pass.shares.len());
            match w.below(22) {
                0 => (array.null, ()) = (true, expect.argument("calls")),
                1 => (array.narrow, ()) = (Some(w.pick(&[0, 8, MINIMUM - 1])), expect.argument("stride of calls")),
                2 => (array.n, ()) = (w.pick(&[0, -1, 65, i64::MAX]), expect.argument("n")),
                3 => (stages, ()) = (w.pick(&[0, 4, -1, i32::MIN]), expect.argument("stages")),
                4 if pass.backward => (accumulate, ()) = (w.pick(&[2, -1]), expect.argument("accumulate")),
                5 => {
                    pass.shares[i].handle = self.adapter_handle(group[i], true, w);
                    expect.handle(format!("calls[{i}].adapter"));
                }
                6 if pass.shares.len() > 1 => {
                    // Twice the same, or one of another context.
                    let stranger = self.adapters.iter().find(|a| a.context != self.adapters[group[0]].context);
                    let other = stranger.filter(|_| w.chance(60)).map(|a| a.handle.cast_const());
                    pass.shares[1].handle = other.unwrap_or(pass.shares[0].handle);
                    expect.argument("calls[1].adapter");
                }
                7 => (array.spoiled, ()) = (Some(i), ()),
                8 => {
                    let share = &mut pass.shares[i];
                    let name = format!("calls[{i}].params");
                    if let Some(name) = spoil_triplets(&mut share.params, &name, &[share.g.param], w) {
                        expect.argument(name);
                    }
                }
                9 => {
                    let share = &mut pass.shares[i];
                    let allowed = [share.g.param, share.g.compute()];
                    if let Some(grads) = &mut share.grads
                        && let Some(name) = spoil_triplets(grads, &format!("calls[{i}].grads"), &allowed, w)
                    {
                        expect.argument(name);
                    }
                }
                10 => {
                    // Rows are fixed by x, or by another output, or by nothing.
                    let fixed = pass.x.is_some() || pass.dx.is_some() || pass.shares.len() > 1;
                    let g = pass.shares[i].g;
                    let name = format!("calls[{i}].{}", if pass.backward { "dy" } else { "y" });
                    if let Some(mat) = &mut pass.shares[i].output
                        && let Some(name) = spoil_matrix(mat, &name, &[g.activation], (fixed, true), w)
                    {
                        let mut names = vec![name, "x".into(), "dx".into()];
                        names.extend(
                            (0..pass.shares.len()).flat_map(|i| [format!("calls[{i}].y"), format!("calls[{i}].dy")]),
                        );
                        expect.refuse(ADALORA_ERROR_INVALID_ARGUMENT, names);
                    }
                }
                11 => {
                    let g = pass.shares[0].g;
                    let reads_output = pass.shares[0].output.is_some();
                    let fixed = reads_output || pass.dx.is_some();
                    if let Some(mat) = &mut pass.x
                        && let Some(name) = spoil_matrix(mat, "x", &[g.activation], (fixed, true), w)
                    {
                        expect.refuse(ADALORA_ERROR_INVALID_ARGUMENT, [&name, "dx", "calls[0].y", "calls[0].dy"]);
                    }
                }
                12 => {
                    let g = pass.shares[0].g;
                    if let Some(mat) = &mut pass.dx
                        && let Some(name) = spoil_matrix(mat, "dx", &[g.activation], (true, true), w)
                    {
                        expect.argument(name);
                    }
                }
                13 => {
                    // h or g that is needed and missing, or at an odd address.
                    let share = &mut pass.shares[i];
                    let split = pass.stages != ADALORA_STAGE_BOTH;
                    let needs_h = split || (pass.backward && share.g.in_local < share.g.input);
                    let (saved, name, needed) = if pass.backward && w.chance(50) {
                        (&mut share.g_saved, "g", split)
                    } else {
                        (&mut share.h, "h", needs_h)
                    };
                    if let Some(saved) = saved {
                        if needed && saved.bytes > 0 && w.chance(50) {
                            saved.address = std::ptr::null_mut();
                        } else {
                            saved.address = saved.address.wrapping_byte_add(2);
                        }
                        expect.argument(format!("calls[{i}].{name}"));
                    }
                }
                14 => {
                    let share = &mut pass.shares[i];
                    share.scaling = w.pick(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY]);
                    expect.argument(format!("calls[{i}].scaling"));
                }
                15 if pass.shares[i].masks => {
                    let d = &mut pass.shares[i].dropout;
                    let name = match w.below(5) {
                        0 => {
                            d.seed = std::ptr::null();
                            "dropout.seed and dropout.offset"
                        }
                        1 => {
                            d.offset = std::ptr::null();
                            "dropout.seed and dropout.offset"
                        }
                        2 => {
                            d.seed = d.seed.wrapping_byte_add(4);
                            "dropout.seed"
                        }
                        3 => {
                            d.offset = d.offset.wrapping_byte_add(1);
                            "dropout.offset"
                        }
                        _ => {
                            d.token0 = w.pick(&[-1, i64::MIN, (1 << 32) - pass.tokens + 1, i64::MAX]);
                            "dropout.token0"
                        }
                    };
                    expect.argument(format!("calls[{i}].{name}"));
                }
                16 => {
                    let needed = self.ask_sizes(group, pass.tokens, c, None)?;
                    match w.below(4) {
                        0 if needed > 0 => pass.bytes = needed - 1,
                        1 if needed > 0 => pass.workspace_at = std::ptr::null_mut(),
                        2 if needed > 0 => pass.workspace_at = pass.workspace_at.wrapping_byte_add(w.pick(&[1, 8, 32])),
                        _ if needed > 0 => pass.bytes = usize::MAX,
                        _ => return Ok(false),
                    }
                    expect.argument("workspace");
                }
                17 if pass.reads_x() => (null_x, ()) = (true, expect.argument("x")),
                _ => {
                    let list = operands(&pass);
                    let written: Vec<&Operand> = list.iter().filter(|o| o.written).collect();
                    if list.len() > 1 && !written.is_empty() {
                        let a = w.pick(&written);
                        let b = &list[w.below(list.len())];
                        let (a, b) = if w.chance(50) { (a, b) } else { (b, a) };
                        let (mut first, mut second) = (std::ptr::null_mut(), std::ptr::null_mut());
                        if a.field != b.field
                            && overlapping(
                                &mut self.memory,
                                (&mut first, a.extent),
                                (&mut second, b.extent, b.align),
                                w,
                            )
                        {
                            pass.set(a.field, first);
                            pass.set(b.field, second);
                            expect.refuse(ADALORA_ERROR_INVALID_ARGUMENT, [a.name.as_str(), b.name.as_str()]);
                        }
                    }
                }
            }
        }
        let list = self.described_calls(&pass);
        let (calls, stride, wrong) = self.memory.descriptors(&list, MINIMUM, array.spoiled, c);
        if let Some(i) = array.spoiled {
            expect.argument(format!("calls[{i}]{wrong}"));
        }
        let from = if array.null { std::ptr::null() } else { self.memory.pointer::<Call>(calls).cast_const() };
        let stride = array.narrow.unwrap_or(stride);
        let (x, dx) = (pass.x.filter(|_| !null_x).map(|x| x.d), pass.dx.map(|dx| dx.d));
        let x = x.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        let dx = dx.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        let (workspace, bytes) = (pass.workspace_at, pass.bytes);
        let stream = std::ptr::null_mut();
        if pass.backward {
            call!(
                self,
                expect,
                writes,
                adalora_adapter_backward(from, stride, array.n, stages, accumulate, x, dx, workspace, bytes, stream)
            )
        } else {
            call!(
                self,
                expect,
                writes,
                adalora_adapter_forward(from, stride, array.n, stages, x, workspace, bytes, stream)
            )
        }
    }

    fn described_calls(&self, pass: &Pass) -> Vec<Vec<u8>> {
        let unread = Triplets { A: UNREAD, E: UNREAD, B: UNREAD };
        let call = |share: &Share| {
            let output = share.output.map_or(UNREAD, |mat| mat.d);
            let null = std::ptr::null_mut();
            let call = Call {
                struct_size: 0,
                adapter: share.handle,
                params: described(&share.params),
                grads: share.grads.as_ref().map_or(unread, described),
                scaling: share.scaling,
                y: if pass.backward { UNREAD } else { output },
                dy: if pass.backward { output } else { UNREAD },
                h: share.h.map_or(null, |h| h.address),
                g: if pass.backward { share.g_saved.map_or(null, |g| g.address) } else { 3 as *mut c_void },
                pattern: share.pattern_at,
                dropout: share.dropout,
            };
            bytes_of(&call)
        };
        pass.shares.iter().map(call).collect()
    }
}

/// How the array of calls is given.
struct Array {
    spoiled: Option<usize>,
    null: bool,
    narrow: Option<usize>,
    n: i64,
}
