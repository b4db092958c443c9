//! Calls on one adapter: making it, its initial values, its delta weight.

use super::memory::{Fill, Mat, Memory, Place, Writes, bytes_of};
use super::{Choices, Expect, Outcome, World, call, ensure};
use crate::abi::adapter::{Adapter as Handle, *};
use crate::abi::context::Context;
use crate::abi::status::ADALORA_ERROR_INVALID_ARGUMENT;
use crate::abi::types::*;
use std::ffi::c_void;
use std::mem::{MaybeUninit, offset_of};

/// The geometry of an adapter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub(super) input: i64,
    pub(super) output: i64,
    pub(super) rank: i64,
    /// Its rank at creation: more where it was compacted.
    pub(super) ranknum: i64,
    pub(super) dropout: f64,
    pub(super) param: DtypeCode,
    pub(super) activation: DtypeCode,
    pub(super) in_local: i64,
    pub(super) in_begin: i64,
    pub(super) out_local: i64,
    pub(super) out_begin: i64,
}

impl Geometry {
    pub(super) fn compute(&self) -> DtypeCode {
        if self.param == ADALORA_FLOAT64 { ADALORA_FLOAT64 } else { ADALORA_FLOAT32 }
    }

    pub(super) fn cost(&self) -> i64 {
        self.input + self.output + 1
    }
}

/// An adapter of the caller's.
pub(super) struct Adapter {
    pub(super) context: u64,
    pub(super) handle: *mut Handle,
    pub(super) g: Geometry,
}

const HALVES_AND_FLOAT32: [DtypeCode; 3] = [ADALORA_FLOAT32, ADALORA_BFLOAT16, ADALORA_FLOAT16];
pub(super) const DTYPES: [DtypeCode; 4] = [ADALORA_FLOAT32, ADALORA_FLOAT64, ADALORA_BFLOAT16, ADALORA_FLOAT16];

fn features(c: &mut Choices) -> i64 {
    // Wide ones are rare: they are for the threads.
    if c.chance(3) { c.pick(&[600, 1500]) } else { c.pick(&[1, 1, 2, 3, 5, 8, 16, 17, 33, 64]) }
}

fn share(whole: i64, c: &mut Choices) -> (i64, i64) {
    if c.chance(75) {
        return (whole, 0);
    }
    let local = 1 + c.below(whole as usize) as i64;
    (local, c.below((whole - local + 1) as usize) as i64)
}

fn some_geometry(c: &mut Choices) -> Geometry {
    let (input, output) = (features(c), features(c));
    let ((in_local, in_begin), (out_local, out_begin)) = (share(input, c), share(output, c));
    let (param, activation) = if c.chance(25) {
        (ADALORA_FLOAT64, ADALORA_FLOAT64)
    } else {
        (c.pick(&HALVES_AND_FLOAT32), c.pick(&HALVES_AND_FLOAT32))
    };
    let dropout = if c.chance(65) { 0.0 } else { c.pick(&[0.1, 0.5, 0.999]) };
    let rank = c.pick(&[0, 1, 1, 2, 3, 4, 5, 8, 16, 17]);
    let ranknum = rank + if c.chance(90) { 0 } else { c.pick(&[1, 2, 7]) };
    Geometry { input, output, rank, ranknum, dropout, param, activation, in_local, in_begin, out_local, out_begin }
}

/// A descriptor of geometry that says the same in one of several ways.
fn descriptor(g: &Geometry, c: &mut Choices) -> AdapterDesc {
    let explicit = |whole: i64, local: i64, c: &mut Choices| if local == whole && c.chance(60) { 0 } else { local };
    AdapterDesc {
        struct_size: 0,
        in_features: g.input,
        out_features: g.output,
        rank: g.rank,
        alpha: c.pick(&[0.0, 0.0, 16.0, 1e-3, 1e30]),
        dropout: g.dropout,
        param_dtype: g.param,
        activation_dtype: g.activation,
        operand_terms: c.below(4) as i32,
        reserved: 0,
        in_local: explicit(g.input, g.in_local, c),
        in_begin: g.in_begin,
        out_local: explicit(g.output, g.out_local, c),
        out_begin: g.out_begin,
        ranknum: if g.ranknum == g.rank { c.pick(&[0, g.rank]) } else { g.ranknum },
    }
}

/// Makes one field of the geometry wrong.
fn spoil_geometry(d: &mut AdapterDesc, g: &Geometry, w: &mut Choices) -> &'static str {
    let features = [0, -1, (1 << 34) + 1, i64::MAX, i64::MIN];
    match w.below(14) {
        0 => {
            d.in_features = w.pick(&features);
            "desc.in_features"
        }
        1 => {
            d.out_features = w.pick(&features);
            "desc.out_features"
        }
        2 => {
            d.rank = w.pick(&[-1, i64::MIN, i64::MAX, 1 << 61]);
            "desc.rank"
        }
        3 => {
            d.alpha = w.pick(&[-1.0, f64::NAN, f64::INFINITY, -5e-324]);
            "desc.alpha"
        }
        4 => {
            d.dropout = w.pick(&[1.0, -0.1, f64::NAN, f64::INFINITY, 2.0]);
            "desc.dropout"
        }
        5 => {
            d.param_dtype = w.pick(&[0, 5, -1, i32::MAX]);
            "desc.param_dtype"
        }
        6 => {
            let other = if d.param_dtype == ADALORA_FLOAT64 { ADALORA_FLOAT32 } else { ADALORA_FLOAT64 };
            d.activation_dtype = w.pick(&[0, 5, -1, other, other]);
            "desc.activation_dtype"
        }
        7 => {
            d.operand_terms = w.pick(&[-1, 4]);
            "desc.operand_terms"
        }
        8 => {
            d.reserved = w.pick(&[1, -1]);
            "desc.reserved"
        }
        9 => {
            d.in_local = w.pick(&[g.input + 1, -1, i64::MAX]);
            "desc.in_local"
        }
        10 => {
            d.in_begin = w.pick(&[g.input - g.in_local + 1, -1, i64::MAX]);
            "desc.in_begin"
        }
        11 => {
            d.ranknum = w.pick(&[-1, i64::MIN, i64::MAX, if g.rank > 1 { g.rank - 1 } else { -1 }]);
            "desc.ranknum"
        }
        12 => {
            d.out_local = w.pick(&[g.output + 1, -1, i64::MIN]);
            "desc.out_local"
        }
        _ => {
            d.out_begin = w.pick(&[g.output - g.out_local + 1, -1, i64::MAX]);
            "desc.out_begin"
        }
    }
}

/// Makes a matrix wrong, and says what the refusal names. `fixed` says whether another operand or the geometry fixes rows and columns.
pub(super) fn spoil_matrix(
    mat: &mut Mat,
    name: &str,
    allowed: &[DtypeCode],
    (rows_fixed, columns_fixed): (bool, bool),
    w: &mut Choices,
) -> Option<String> {
    let empty = mat.extent() == 0;
    let d = &mut mat.d;
    let size = super::memory::size_of_dtype(d.dtype);
    let field = |field: &str| Some(format!("{name}.{field}"));
    match w.below(11) {
        0 if !empty => d.data = std::ptr::null_mut(),
        1 if !empty => d.data = d.data.wrapping_byte_add(w.below(size - 1) + 1),
        2 if rows_fixed => d.rows += 1,
        3 if rows_fixed && d.rows > 0 => d.rows -= 1,
        4 if columns_fixed => {
            d.columns += 1;
            d.row_stride = 0;
        }
        5 if columns_fixed && d.columns > 0 => d.columns -= 1,
        6 if d.columns > 1 => {
            d.row_stride = d.columns - 1;
            return field("row_stride");
        }
        7 => {
            d.row_stride = w.pick(&[-1, i64::MIN]);
            return field("row_stride");
        }
        8 => {
            d.dtype = w.pick(&[0, 5, -1, 77]);
            return field("dtype");
        }
        9 => {
            d.reserved = w.pick(&[1, -1]);
            return field("reserved");
        }
        10 => match w.below(4) {
            0 => {
                d.rows = w.pick(&[-1, i64::MIN]);
                return field("rows");
            }
            1 => {
                d.columns = w.pick(&[-1, i64::MIN]);
                d.row_stride = 0;
                return field("columns");
            }
            2 if d.columns > 0 => {
                d.rows = w.pick(&[1 << 62, i64::MAX]);
                d.row_stride = 0;
            }
            _ => {
                let other =
                    DTYPES.into_iter().find(|t| !allowed.contains(t) && super::memory::size_of_dtype(*t) <= size)?;
                d.dtype = other;
            }
        },
        _ => return None,
    }
    Some(name.to_owned())
}

/// Parameters or gradients.
pub(super) fn triplets(m: &mut Memory, g: &Geometry, dtypes: [DtypeCode; 3], fill: Fill, c: &mut Choices) -> [Mat; 3] {
    [
        m.matrix(g.rank, g.in_local, dtypes[0], fill, c),
        m.vector(g.rank, dtypes[1], fill, c),
        m.matrix(g.out_local, g.rank, dtypes[2], fill, c),
    ]
}

pub(super) fn described(mats: &[Mat; 3]) -> Triplets {
    Triplets { A: mats[0].d, E: mats[1].d, B: mats[2].d }
}

/// Spoils one of the triplets.
pub(super) fn spoil_triplets(
    mats: &mut [Mat; 3],
    name: &str,
    allowed: &[DtypeCode],
    w: &mut Choices,
) -> Option<String> {
    let i = w.below(3);
    let field = format!("{name}.{}", ["A", "E", "B"][i]);
    // A vector of one element may be lengthened in either direction; one without may have any number of rows.
    let fixed = if i == 1 && mats[i].extent() == 0 { (false, false) } else { (true, true) };
    spoil_matrix(&mut mats[i], &field, allowed, fixed, w)
}

/// Lays two operands so that they share an element: the last of one, the first of the other.
pub(super) fn overlapping(
    m: &mut Memory,
    a: (&mut *mut c_void, usize),
    b: (&mut *mut c_void, usize, usize),
    c: &mut Choices,
) -> bool {
    if a.1 == 0 || b.1 == 0 {
        return false;
    }
    let place = m.private(a.1 + b.1, 64, c);
    *a.0 = m.pointer(place);
    *b.0 = m.pointer(place.offset((a.1 - 1) / b.2 * b.2));
    true
}

impl World {
    pub(super) fn create_adapter(&mut self, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let context = self.some_context(c)?;
        self.create_adapter_in(context, c, w)
    }

    pub(super) fn create_adapter_in(&mut self, context: usize, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let mut g = some_geometry(c);
        let id = self.contexts[context].id;
        let siblings: Vec<Geometry> = self.adapters.iter().filter(|a| a.context == id).map(|a| a.g).collect();
        if !siblings.is_empty() && c.chance(50) {
            // Query, key and value read one x.
            let s = c.pick(&siblings);
            (g.input, g.in_local, g.in_begin, g.activation) = (s.input, s.in_local, s.in_begin, s.activation);
            if (g.activation == ADALORA_FLOAT64) != (g.param == ADALORA_FLOAT64) {
                g.param = s.param;
            }
        }
        self.make_adapter(context, g, c, w)
    }

    pub(super) fn make_adapter(
        &mut self,
        context: usize,
        g: Geometry,
        c: &mut Choices,
        w: Option<&mut Choices>,
    ) -> Outcome {
        let id = self.contexts[context].id;
        let mut d = descriptor(&g, c);
        let mut expect = Expect::default();
        let (mut sizes, mut null, mut no_slot, mut no_context) = (None, false, false, false);
        if let Some(w) = w {
            match w.below(8) {
                0 => (sizes, ()) = (Some(0), ()),
                1 => (null, ()) = (true, expect.argument("desc")),
                2 => (no_slot, ()) = (true, expect.argument("adapter")),
                3 => (no_context, ()) = (true, expect.handle("context")),
                _ => expect.argument(spoil_geometry(&mut d, &g, w)),
            }
        }
        let minimum = offset_of!(AdapterDesc, activation_dtype) + 4;
        let (place, _, wrong) = self.memory.descriptors(&[bytes_of(&d)], minimum, sizes, c);
        if sizes.is_some() {
            expect.argument(format!("desc{wrong}"));
        }
        let desc = if null { std::ptr::null() } else { self.memory.pointer::<AdapterDesc>(place).cast_const() };
        let slot = self.slot(c);
        let to = self.memory.pointer::<MaybeUninit<*mut Handle>>(slot);
        let context = self.context_handle(context, no_context, c);
        let mut writes = Writes::default();
        writes.bytes(slot, 8);
        let out = (!no_slot).then_some(to);
        if call!(self, expect, writes, adalora_adapter_create(context, desc, out.map(|to| &mut *to)))? {
            let handle = self.handle_at(slot);
            self.adapters.push(Adapter { context: id, handle, g });
        }
        Ok(())
    }

    /// Position of an adapter, made if there is none.
    pub(super) fn some_adapter(&mut self, c: &mut Choices) -> Result<usize, String> {
        if self.adapters.is_empty() {
            self.create_adapter(c, None)?;
        }
        Ok(c.below(self.adapters.len()))
    }

    /// The handle, or, where it is to be spoilt, null or a handle of another kind.
    pub(super) fn adapter_handle(&self, i: usize, spoil: bool, c: &mut Choices) -> *mut Handle {
        match (spoil, self.contexts.first()) {
            (false, _) => self.adapters[i].handle,
            (true, Some(other)) if c.chance(50) => other.handle.cast::<Context>().cast(),
            _ => std::ptr::null_mut(),
        }
    }

    pub(super) fn destroy_adapter(&mut self, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let i = self.some_adapter(c)?;
        let handle = std::ptr::NonNull::new(self.adapter_handle(i, w.is_some(), c));
        let mut expect = Expect::default();
        if w.is_some() && handle.is_some() {
            expect.handle("adapter");
        }
        if w.is_none() {
            self.adapters.swap_remove(i);
        }
        self.perform_void("adalora_adapter_destroy", expect, || {
            // SAFETY: a live handle that is given up, or null, or one of another kind.
            unsafe { adalora_adapter_destroy(handle) }
        })
    }

    pub(super) fn initialize(&mut self, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let i = self.some_adapter(c)?;
        let g = self.adapters[i].g;
        let allowed = [g.param, g.compute()];
        let dtype = c.pick(&allowed);
        let mut mats = triplets(&mut self.memory, &g, [dtype; 3], Fill::some(c), c);
        let mut handle = self.adapter_handle(i, false, c);
        let mut expect = Expect::default();
        let mut writes = Writes::default();
        mats.iter().for_each(|mat| writes.matrix(mat));
        let mut null = false;
        if let Some(w) = w {
            match w.below(6) {
                0 => (handle, ()) = (self.adapter_handle(i, true, w), expect.handle("adapter")),
                1 => (null, ()) = (true, expect.argument("params")),
                2 | 3 => {
                    let (j, k) = w.pick(&[(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]);
                    let (a, b) = (mats[j].extent(), mats[k].extent());
                    let size = super::memory::size_of_dtype(dtype);
                    let (mut first, mut second) = (mats[j].d.data, mats[k].d.data);
                    if overlapping(&mut self.memory, (&mut first, a), (&mut second, b, size), w) {
                        (mats[j].d.data, mats[k].d.data) = (first, second);
                        let names = ["params.A", "params.E", "params.B"];
                        expect.refuse(ADALORA_ERROR_INVALID_ARGUMENT, [names[j], names[k]]);
                    }
                }
                _ => {
                    if let Some(name) = spoil_triplets(&mut mats, "params", &allowed, w) {
                        expect.argument(name);
                    }
                }
            }
        }
        let params = described(&mats);
        let from = if null { std::ptr::null() } else { &raw const params };
        let seed = c.next();
        call!(self, expect, writes, adalora_adapter_initialize(handle.as_ref(), from, seed, std::ptr::null_mut()))
            .map(drop)
    }

    pub(super) fn delta_weight(&mut self, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let mut weight = self.weight(c)?;
        let mut writes = Writes::default();
        writes.matrix(&weight.w);
        if let Some(w) = w {
            self.spoil_weight(&mut weight, true, w);
        }
        let Weight { handle, scaling, fan, accumulate, expect, null_w, null_params, .. } = weight;
        let params = described(&weight.params);
        let params = if null_params { std::ptr::null() } else { &raw const params };
        let to = if null_w { std::ptr::null() } else { &raw const weight.w.d };
        call!(
            self,
            expect,
            writes,
            adalora_adapter_delta_weight(handle.as_ref(), params, scaling, fan, accumulate, to, std::ptr::null_mut())
        )
        .map(drop)
    }

    pub(super) fn merge(&mut self, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let mut weight = self.weight(c)?;
        let base = self.memory.matrix_bytes(&weight.w);
        let (rows, columns, dtype) = (weight.w.d.rows, weight.w.d.columns, weight.w.d.dtype);
        let mut backup = c.chance(60).then(|| self.memory.matrix(rows, columns, dtype, Fill::Plain, c));
        let flag_place = self.memory.bytes(&7.0f32.to_le_bytes(), 4, c);
        let mut flag = if c.chance(60) { self.memory.pointer::<f32>(flag_place) } else { std::ptr::null_mut() };
        let mut writes = Writes::default();
        writes.matrix(&weight.w);
        backup.iter().for_each(|b| writes.matrix(b));
        if !flag.is_null() {
            writes.bytes(flag_place, 4);
        }
        if let Some(w) = w {
            match (w.below(8), &mut backup) {
                (0, _) => {
                    (flag, ()) = (
                        self.memory.pointer::<f32>(flag_place).wrapping_byte_add(2),
                        weight.expect.argument("non_finite"),
                    )
                }
                (1, _) => {
                    // A flag within an operand: any element will do, since all are larger than nothing.
                    let inside = w.pick(&[weight.w.d, weight.params[0].d, weight.params[2].d, weight.params[1].d]);
                    if !inside.data.is_null() && inside.rows * inside.columns > 0 {
                        flag = (inside.data as usize & !3) as *mut f32;
                        weight.expect.refuse(ADALORA_ERROR_INVALID_ARGUMENT, ["non_finite", "w"]);
                    }
                }
                (2, Some(backup)) => {
                    let sizes = (weight.w.extent(), backup.extent(), super::memory::size_of_dtype(dtype));
                    let (mut a, mut b) = (weight.w.d.data, backup.d.data);
                    if overlapping(&mut self.memory, (&mut a, sizes.0), (&mut b, sizes.1, sizes.2), w) {
                        (weight.w.d.data, backup.d.data) = (a, b);
                        weight.expect.refuse(ADALORA_ERROR_INVALID_ARGUMENT, ["w", "backup"]);
                    }
                }
                (3, Some(backup)) => {
                    let k = w.below(3);
                    let p = &mut weight.params[k];
                    let (mut a, mut b) = (backup.d.data, p.d.data);
                    let size = super::memory::size_of_dtype(p.d.dtype);
                    if overlapping(&mut self.memory, (&mut a, backup.extent()), (&mut b, p.extent(), size), w) {
                        (backup.d.data, p.d.data) = (a, b);
                        let names = ["backup", ["params.A", "params.E", "params.B"][k]];
                        weight.expect.refuse(ADALORA_ERROR_INVALID_ARGUMENT, names);
                    }
                }
                (4, Some(backup)) => {
                    if let Some(name) = spoil_matrix(backup, "backup", &[dtype], (true, true), w) {
                        weight.expect.argument(name);
                    }
                }
                _ => self.spoil_weight(&mut weight, false, w),
            }
        }
        let Weight { handle, scaling, fan, expect, null_w, null_params, .. } = weight;
        let params = described(&weight.params);
        let params_from = if null_params { std::ptr::null() } else { &raw const params };
        let to = if null_w { std::ptr::null() } else { &raw const weight.w.d };
        let kept = backup.map(|b| b.d);
        let kept = kept.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        if !call!(
            self,
            expect,
            writes,
            adalora_adapter_merge(handle.as_ref(), params_from, scaling, fan, to, kept, flag, std::ptr::null_mut())
        )? {
            return Ok(());
        }
        if !flag.is_null() {
            let finite = self.memory.matrix_elements(&weight.w).iter().all(|x| x.is_finite());
            let found = self.memory.read(flag_place, 4) == 1.0f32.to_le_bytes();
            ensure!(
                found != finite,
                "non_finite was{} set, and all of w is finite: {finite}",
                if found { "" } else { " not" }
            );
        }
        let Some(backup) = backup else { return Ok(()) };
        ensure!(self.memory.matrix_bytes(&backup) == base, "the backup is not the base");
        let mut writes = Writes::default();
        writes.matrix(&weight.w);
        call!(
            self,
            Expect::default(),
            writes,
            adalora_adapter_unmerge(
                handle.as_ref(),
                std::ptr::null(),
                scaling,
                fan,
                to,
                &raw const backup.d,
                std::ptr::null_mut()
            )
        )?;
        ensure!(self.memory.matrix_bytes(&weight.w) == base, "the base did not come back");
        Ok(())
    }

    pub(super) fn unmerge(&mut self, c: &mut Choices, w: Option<&mut Choices>) -> Outcome {
        let mut weight = self.weight(c)?;
        let mut writes = Writes::default();
        writes.matrix(&weight.w);
        if let Some(w) = w {
            self.spoil_weight(&mut weight, false, w);
        }
        let Weight { handle, scaling, fan, expect, null_w, null_params, .. } = weight;
        let params = described(&weight.params);
        let params = if null_params { std::ptr::null() } else { &raw const params };
        let to = if null_w { std::ptr::null() } else { &raw const weight.w.d };
        call!(
            self,
            expect,
            writes,
            adalora_adapter_unmerge(handle.as_ref(), params, scaling, fan, to, std::ptr::null(), std::ptr::null_mut())
        )
        .map(drop)
    }

    /// Arguments of a valid call on a base weight.
    fn weight(&mut self, c: &mut Choices) -> Result<Weight, String> {
        let i = self.some_adapter(c)?;
        let g = self.adapters[i].g;
        let fan = c.below(2) as i32;
        let (rows, columns) = if fan == 0 { (g.out_local, g.in_local) } else { (g.in_local, g.out_local) };
        let fill = Fill::some(c);
        let dtype = c.pick(&DTYPES);
        Ok(Weight {
            adapter: i,
            g,
            handle: self.adapter_handle(i, false, c),
            params: triplets(&mut self.memory, &g, [g.param; 3], fill, c),
            w: self.memory.matrix(rows, columns, dtype, fill, c),
            scaling: c.pick(&[0.0, 0.0, 1.5, -2.0, 1e-300, 1e300]),
            fan,
            accumulate: c.below(2) as i32,
            expect: Expect::default(),
            null_w: false,
            null_params: false,
        })
    }

    fn spoil_weight(&mut self, weight: &mut Weight, accumulates: bool, w: &mut Choices) {
        let expect = &mut weight.expect;
        match w.below(10) {
            0 => (weight.handle, ()) = (self.adapter_handle(weight.adapter, true, w), expect.handle("adapter")),
            1 => (weight.scaling, ()) = (w.pick(&[f64::NAN, f64::INFINITY]), expect.argument("scaling")),
            2 => (weight.fan, ()) = (w.pick(&[2, -1, i32::MAX]), expect.argument("fan_in_fan_out")),
            3 if accumulates => (weight.accumulate, ()) = (w.pick(&[2, -1]), expect.argument("accumulate")),
            4 => (weight.null_w, ()) = (true, expect.argument("w")),
            5 => (weight.null_params, ()) = (true, expect.argument("params")),
            6 | 7 => {
                let k = w.below(3);
                let p = &mut weight.params[k];
                let (mut a, mut b) = (weight.w.d.data, p.d.data);
                let size = super::memory::size_of_dtype(p.d.dtype);
                if overlapping(&mut self.memory, (&mut a, weight.w.extent()), (&mut b, p.extent(), size), w) {
                    (weight.w.d.data, p.d.data) = (a, b);
                    let names = ["w", ["params.A", "params.E", "params.B"][k]];
                    expect.refuse(ADALORA_ERROR_INVALID_ARGUMENT, names);
                }
            }
            8 => {
                if let Some(name) = spoil_matrix(&mut weight.w, "w", &DTYPES, (true, true), w) {
                    expect.refuse(ADALORA_ERROR_INVALID_ARGUMENT, [name.as_str(), "backup"]);
                }
            }
            _ => {
                if let Some(name) = spoil_triplets(&mut weight.params, "params", &[weight.g.param], w) {
                    expect.argument(name);
                }
            }
        }
    }
}

/// Arguments of a call on a base weight.
struct Weight {
    adapter: usize,
    g: Geometry,
    handle: *mut Handle,
    params: [Mat; 3],
    w: Mat,
    scaling: f64,
    fan: i32,
    accumulate: i32,
    expect: Expect,
    null_w: bool,
    null_params: bool,
}

/// One value of eight bytes.
pub(super) fn one_u64(m: &mut Memory, c: &mut Choices) -> Place {
    let value = c.next();
    m.values(&[value.to_le_bytes()], 8, c)
}
