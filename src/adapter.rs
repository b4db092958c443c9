//! The adapter: the geometry of one layer's triplets, and the checks of everything that is computed with them.

use crate::context::Context;
use crate::error::{At, Code, Error, Result};
use crate::tensor::{Address, Buffer, Dtype, Matrix, Names, Region, Stream, Triplets, Vector, disjoint};
use arrayvec::ArrayVec;
use std::sync::Arc;

/// Adapters that may read one x in a call.
pub(crate) const MAX_GROUP: usize = 64;
/// Columns that Philox's counter can tell apart, four to a word.
pub(crate) const MAX_FEATURES: usize = 1 << 34;
/// Tokens that Philox's counter can tell apart.
const MAX_TOKENS: u64 = 1 << 32;
/// Alignment of workspace and state.
pub(crate) const ALIGNMENT: usize = 64;
/// Keeps the scaling's divisor away from zero, as PEFT's `ranknum + 1e-5` does.
const RANKNUM_EPS: f64 = 1e-5;

/// Multiplier of an adapter's output.
pub(crate) fn scaling(alpha: f64, rank: usize) -> f64 {
    let rank = rank as f64;
    (if alpha > 0.0 { alpha } else { rank }) / (rank + RANKNUM_EPS)
}

/// A range of a dimension that one process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// The whole dimension.
    pub whole: usize,
    /// First of the process's share.
    pub begin: usize,
    /// Length of the process's share.
    pub local: usize,
}

/// The geometry of one layer's adapter.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Input features.
    pub input: Share,
    /// Output features.
    pub output: Share,
    /// Triplets.
    pub rank: usize,
    /// Triplets at creation: more, where the adapter was compacted.
    pub ranknum: usize,
    /// `lora_alpha`.
    pub alpha: f64,
    /// Probability of dropout.
    pub dropout: f64,
    /// Type of A, E, B.
    pub param_dtype: Dtype,
    /// Type of x, y, dx, dy.
    pub activation_dtype: Dtype,
    /// Terms, 1 to 3, of an operand that is multiplied in fewer bits than it has.
    pub operand_terms: usize,
}

impl Geometry {
    /// The type that sums are taken in.
    pub fn compute_dtype(&self) -> Dtype {
        self.param_dtype.compute()
    }

    /// Parameters of one triplet, over the whole layer.
    pub fn cost(&self) -> usize {
        self.input.whole + self.output.whole + 1
    }

    /// Multiplier of the adapter's output: `(alpha > 0 ? alpha : ranknum) / (ranknum + 1e-5)`.
    pub fn scaling(&self) -> f64 {
        scaling(self.alpha, self.ranknum)
    }

    fn scaling_or_own(&self, given: f64) -> Result<f64> {
        if !given.is_finite() {
            return Err(Error::argument("scaling", given, "a finite number, or 0 for the adapter's own"));
        }
        Ok(if given == 0.0 { self.scaling() } else { given })
    }

    /// Checks triplets against the geometry: whole shapes, and one of `dtypes`.
    fn triplets(&self, raw: &RawTriplets, name: &str, dtypes: &[Dtype]) -> Result<Triplets> {
        raw.a.expect(format_args!("{name}.A"), self.rank, self.input.local, dtypes)?;
        raw.b.expect(format_args!("{name}.B"), self.output.local, self.rank, dtypes)?;
        let e = Vector::from_matrix(&raw.e, self.rank).filter(|e| dtypes.contains(&e.dtype)).ok_or_else(|| {
            Error::argument(
                format_args!("{name}.E"),
                format_args!("[{}, {}] of {}", raw.e.rows, raw.e.columns, raw.e.dtype),
                format_args!("a vector of {} elements of {}", self.rank, Names(dtypes)),
            )
        })?;
        Ok(Triplets { a: raw.a, e, b: raw.b })
    }
}

/// Triplets as the caller described them, not yet held against a geometry.
#[derive(Clone, Copy, Debug)]
pub struct RawTriplets {
    /// Right vectors.
    pub a: Matrix,
    /// Values, as a matrix of one row or one column.
    pub e: Matrix,
    /// Left vectors.
    pub b: Matrix,
}

/// Layout of a base weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// [out, in], as PyTorch's Linear.
    OutIn,
    /// [in, out], as transformers' Conv1D.
    InOut,
}

impl Layout {
    /// From C's `fan_in_fan_out`.
    pub fn from_code(code: i32) -> Result<Self> {
        match code {
            0 => Ok(Self::OutIn),
            1 => Ok(Self::InOut),
            _ => Err(Error::argument("fan_in_fan_out", code, "0 or 1")),
        }
    }
}

/// What becomes of a base weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combine {
    /// w = delta.
    Overwrite,
    /// w += delta.
    Add,
    /// w -= delta.
    Subtract,
}

/// Which pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Adds to y.
    Forward,
    /// From dy.
    Backward,
}

/// Which products of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stages {
    /// With the first factor.
    pub project: bool,
    /// With the second factor.
    pub expand: bool,
}

/// Where a dropout mask stands.
#[derive(Clone, Copy, Debug)]
pub struct DropoutPlace {
    /// One u64.
    pub seed: Address,
    /// One u64.
    pub offset: Address,
    /// Logical number of x's first row.
    pub token0: i64,
}

/// One adapter's share in a call, as the caller described it: what the direction and stages read, and nothing else.
pub struct RawCall<'a> {
    /// The adapter.
    pub adapter: &'a Adapter,
    /// Parameters.
    pub params: RawTriplets,
    /// Gradients (backward).
    pub grads: Option<RawTriplets>,
    /// Multiplier, 0 for the adapter's own.
    pub scaling: f64,
    /// y (forward's second stage) or dy (backward's first).
    pub output: Option<Matrix>,
    /// Saved `x A^T`.
    pub h: Option<Address>,
    /// `scaling dy B` (backward).
    pub g: Option<Address>,
    /// Kept triplets.
    pub pattern: Option<Address>,
    /// Place of the dropout mask.
    pub dropout: Option<DropoutPlace>,
}

/// One adapter's share in a call, checked.
pub struct Call<'a> {
    /// Geometry.
    pub geometry: &'a Geometry,
    /// Parameters.
    pub params: Triplets,
    /// Gradients (backward).
    pub grads: Option<Triplets>,
    /// Multiplier.
    pub scaling: f64,
    /// y (forward's second stage) or dy (backward's first).
    pub output: Option<Matrix>,
    /// Saved `x A^T`.
    pub h: Option<Address>,
    /// `scaling dy B` (backward).
    pub g: Option<Address>,
    /// Kept triplets.
    pub pattern: Option<Address>,
    /// Place of the dropout mask, where dropout is above 0 and x is read.
    pub dropout: Option<DropoutPlace>,
}

/// A checked pass, ready for a backend.
pub struct Pass<'a> {
    /// Shares.
    pub calls: &'a [Call<'a>],
    /// Which products.
    pub stages: Stages,
    /// Input, where it is read.
    pub x: Option<Matrix>,
    /// Rows.
    pub tokens: usize,
    /// The caller's workspace.
    pub workspace: Buffer,
    /// The caller's stream.
    pub stream: Stream,
}

/// Bytes that a call needs.
pub struct Sizes {
    /// Of h, and of g, for each adapter.
    pub saved: ArrayVec<usize, MAX_GROUP>,
    /// Of workspace.
    pub workspace: usize,
}

/// One layer's adapter.
pub struct Adapter {
    context: Arc<Context>,
    geometry: Geometry,
}

impl Adapter {
    /// An adapter of that geometry.
    pub fn new(context: Arc<Context>, geometry: Geometry) -> Self {
        Self { context, geometry }
    }

    /// Its geometry.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Its context.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Writes initial triplets.
    pub fn initialize(&self, params: &RawTriplets, seed: u64, stream: Stream) -> Result<()> {
        let g = &self.geometry;
        let params = g.triplets(params, "params", &[g.param_dtype, g.compute_dtype()])?;
        disjoint(&regions(&params), &[])?;
        self.context.backend().initialize(g, &params, seed, stream)
    }

    /// Writes or adds the delta weight.
    pub fn delta_weight(
        &self,
        params: &RawTriplets,
        scaling: f64,
        layout: Layout,
        accumulate: bool,
        w: &Matrix,
        stream: Stream,
    ) -> Result<()> {
        let combine = if accumulate { Combine::Add } else { Combine::Overwrite };
        self.apply_delta(params, scaling, layout, combine, w, (None, None), stream)
    }

    /// Adds the delta weight to a base, after the base was copied to the backup.
    #[expect(clippy::too_many_arguments, reason = "the C function's own")]
    pub fn merge(
        &self,
        params: &RawTriplets,
        scaling: f64,
        layout: Layout,
        w: &Matrix,
        backup: Option<&Matrix>,
        non_finite: Option<Address>,
        stream: Stream,
    ) -> Result<()> {
        self.apply_delta(params, scaling, layout, Combine::Add, w, (backup, non_finite), stream)
    }

    /// Subtracts the delta weight.
    pub fn unmerge(
        &self,
        params: &RawTriplets,
        scaling: f64,
        layout: Layout,
        w: &Matrix,
        stream: Stream,
    ) -> Result<()> {
        self.apply_delta(params, scaling, layout, Combine::Subtract, w, (None, None), stream)
    }

    /// Copies a backup over the base.
    pub fn restore(&self, layout: Layout, w: &Matrix, backup: &Matrix, stream: Stream) -> Result<()> {
        self.check_weight(layout, w)?;
        backup.expect("backup", w.rows, w.columns, &[w.dtype])?;
        disjoint(&[("w", w.region()), ("backup", backup.region())], &[])?;
        self.context.backend().copy(backup, w, stream)
    }

    fn check_weight(&self, layout: Layout, w: &Matrix) -> Result<()> {
        let (out, input) = (self.geometry.output.local, self.geometry.input.local);
        let (rows, columns) = if layout == Layout::OutIn { (out, input) } else { (input, out) };
        w.expect("w", rows, columns, &[w.dtype])
    }

    #[expect(clippy::too_many_arguments, reason = "three C functions meet here")]
    fn apply_delta(
        &self,
        params: &RawTriplets,
        scaling: f64,
        layout: Layout,
        combine: Combine,
        w: &Matrix,
        (backup, non_finite): (Option<&Matrix>, Option<Address>),
        stream: Stream,
    ) -> Result<()> {
        let g = &self.geometry;
        self.check_weight(layout, w)?;
        let params = g.triplets(params, "params", &[g.param_dtype])?;
        let mut outputs: ArrayVec<_, 3> = ArrayVec::new();
        outputs.push(("w", w.region()));
        if let Some(backup) = backup {
            backup.expect("backup", w.rows, w.columns, &[w.dtype])?;
            outputs.push(("backup", backup.region()));
        }
        if let Some(flag) = non_finite {
            outputs.push(("non_finite", Region::contiguous(flag, size_of::<f32>())));
        }
        disjoint(&outputs, &regions(&params))?;
        let scaling = g.scaling_or_own(scaling)?;
        let backend = self.context.backend();
        if let Some(backup) = backup {
            backend.copy(w, backup, stream)?;
        }
        backend.delta_weight(g, &params, scaling, layout, combine, w, non_finite, stream)
    }
}

fn regions(params: &Triplets) -> [(&'static str, Region); 3] {
    [("params.A", params.a.region()), ("params.E", params.e.region()), ("params.B", params.b.region())]
}

/// Bytes that a call of these adapters needs.
pub fn sizes(adapters: &[&Adapter], tokens: usize) -> Result<Sizes> {
    let geometries: ArrayVec<&Geometry, MAX_GROUP> = adapters.iter().map(|a| &a.geometry).collect();
    let first = adapters[0];
    let mut saved = ArrayVec::new();
    for (i, adapter) in adapters.iter().enumerate() {
        same_group(first, adapter).at_index("calls", i)?;
        saved.push(saved_bytes(&adapter.geometry, tokens)?);
    }
    Ok(Sizes { saved, workspace: first.context.backend().workspace(&geometries, tokens)? })
}

fn saved_bytes(geometry: &Geometry, tokens: usize) -> Result<usize> {
    let size = geometry.compute_dtype().size();
    tokens
        .checked_mul(geometry.rank)
        .and_then(|n| n.checked_mul(size))
        .filter(|bytes| isize::try_from(*bytes).is_ok())
        .ok_or_else(|| {
            Error::argument("tokens", tokens, format_args!("fewer: [tokens, {}] overflows memory", geometry.rank))
        })
}

fn same_group(first: &Adapter, other: &Adapter) -> Result<()> {
    if !Arc::ptr_eq(&first.context, &other.context) {
        return Err(Error::argument("adapter", "an adapter of another context", "the context of calls[0].adapter"));
    }
    let (a, b) = (&first.geometry, &other.geometry);
    if a.input != b.input || a.activation_dtype != b.activation_dtype {
        return Err(Error::argument(
            "adapter",
            format_args!("one that reads {} of {} features of {}", b.input.local, b.input.whole, b.activation_dtype),
            format_args!(
                "the same x as calls[0].adapter: {} of {} features of {}",
                a.input.local, a.input.whole, a.activation_dtype
            ),
        ));
    }
    Ok(())
}

/// Adds every adapter's output.
pub fn forward(calls: &[RawCall], stages: Stages, x: Option<Matrix>, workspace: Buffer, stream: Stream) -> Result<()> {
    let mut checked = ArrayVec::new();
    let pass = check_pass(calls, &mut checked, stages, Direction::Forward, [x, None], workspace, stream)?;
    calls[0].adapter.context.backend().forward(&pass)
}

/// Gradients of every adapter, and of x.
pub fn backward(
    calls: &[RawCall],
    stages: Stages,
    accumulate: bool,
    x: Option<Matrix>,
    dx: Option<Matrix>,
    workspace: Buffer,
    stream: Stream,
) -> Result<()> {
    let mut checked = ArrayVec::new();
    let pass = check_pass(calls, &mut checked, stages, Direction::Backward, [x, dx], workspace, stream)?;
    let dx = if stages.expand { dx } else { None };
    calls[0].adapter.context.backend().backward(&pass, accumulate, dx.as_ref())
}

/// A pass over `raw`, whose shares are put into `calls`: returned, room for the largest group would be copied.
fn check_pass<'p, 'a>(
    raw: &[RawCall<'a>],
    calls: &'p mut ArrayVec<Call<'a>, MAX_GROUP>,
    stages: Stages,
    direction: Direction,
    [x, dx]: [Option<Matrix>; 2],
    workspace: Buffer,
    stream: Stream,
) -> Result<Pass<'p>> {
    let first = raw[0].adapter;
    let reads_x = match direction {
        Direction::Forward => stages.project,
        // Without a saved h, backward's first stage computes it again.
        Direction::Backward => stages.expand,
    };
    let (input, activation) = (first.geometry.input.local, first.geometry.activation_dtype);
    let tokens = match (x, reads_x) {
        (Some(x), true) => x.rows,
        (None, true) => return Err(Error::argument("x", "NULL", format_args!("[tokens, {input}] of {activation}"))),
        (_, false) => raw[0].output.map_or(0, |m| m.rows),
    };
    if let Some(x) = &x {
        x.expect("x", tokens, input, &[activation])?;
    }
    if let Some(dx) = &dx {
        dx.expect("dx", tokens, input, &[activation])?;
    }
    for (i, share) in raw.iter().enumerate() {
        same_group(first, share.adapter).at_index("calls", i)?;
        if let Some(earlier) = raw[..i].iter().position(|r| std::ptr::eq(r.adapter, share.adapter)) {
            return Err(Error::argument("adapter", format_args!("the one of calls[{earlier}]"), "each adapter once"))
                .at_index("calls", i);
        }
        calls.push(check_share(share, stages, direction, tokens).at_index("calls", i)?);
    }
    let pass = Pass { calls, stages, x: x.filter(|_| reads_x), tokens, workspace, stream };
    check_workspace(&pass, first)?;
    check_overlaps(&pass, dx.as_ref().filter(|_| stages.expand), direction)?;
    Ok(pass)
}

fn check_share<'a>(raw: &RawCall<'a>, stages: Stages, direction: Direction, tokens: usize) -> Result<Call<'a>> {
    let geometry = &raw.adapter.geometry;
    let params = geometry.triplets(&raw.params, "params", &[geometry.param_dtype])?;
    let grads = match &raw.grads {
        Some(grads) => Some(geometry.triplets(grads, "grads", &[geometry.param_dtype, geometry.compute_dtype()])?),
        None => None,
    };
    if let Some(output) = &raw.output {
        let name = if direction == Direction::Forward { "y" } else { "dy" };
        output.expect(name, tokens, geometry.output.local, &[geometry.activation_dtype])?;
    }
    let bytes = saved_bytes(geometry, tokens)?;
    let saved = |address: Option<Address>, name: &str, required: Option<&str>| match (address, required) {
        (Some(address), _) => address.check(name, geometry.compute_dtype().size()).map(Some),
        (None, Some(why)) if bytes > 0 => {
            Err(Error::argument(name, "NULL", format_args!("[{tokens}, {}]: {why}", geometry.rank)))
        }
        (None, _) => Ok(None),
    };
    let split = !(stages.project && stages.expand);
    let partial = geometry.input.local < geometry.input.whole;
    let needs_h = match direction {
        Direction::Forward if split => Some("one stage writes it, the other reads it"),
        Direction::Backward if split => Some("backward in two stages reads it"),
        Direction::Backward if partial => Some("a share of the input features does not suffice to compute it again"),
        _ => None,
    };
    let h = saved(raw.h, "h", needs_h)?;
    let g = match direction {
        Direction::Forward => None,
        Direction::Backward => saved(raw.g, "g", split.then_some("one stage writes it, the other reads it"))?,
    };
    let masks = match direction {
        Direction::Forward => stages.project,
        Direction::Backward => stages.expand,
    };
    let dropout = if geometry.dropout > 0.0 && masks { Some(check_dropout(raw, tokens)?) } else { None };
    let scaling = geometry.scaling_or_own(raw.scaling)?;
    let compute = geometry.compute_dtype();
    if compute == Dtype::Float32 && !(scaling as f32).is_finite() {
        return Err(Error::argument("scaling", format_args!("{scaling:e}"), format_args!("a number of {compute}")));
    }
    Ok(Call { geometry, params, grads, scaling, output: raw.output, h, g, pattern: raw.pattern, dropout })
}

fn check_dropout(raw: &RawCall, tokens: usize) -> Result<DropoutPlace> {
    let place = raw.dropout.ok_or_else(|| {
        Error::argument(
            "dropout.seed and dropout.offset",
            "NULL",
            format_args!("addresses: the adapter's dropout is {}", raw.adapter.geometry.dropout),
        )
    })?;
    place.seed.check("dropout.seed", 8)?;
    place.offset.check("dropout.offset", 8)?;
    match u64::try_from(place.token0).ok().and_then(|t| t.checked_add(tokens as u64)) {
        Some(end) if end <= MAX_TOKENS => Ok(place),
        _ => Err(Error::argument(
            "dropout.token0",
            place.token0,
            format_args!("0 or more, and at most 2^32 with the {tokens} tokens"),
        )),
    }
}

fn check_workspace(pass: &Pass, first: &Adapter) -> Result<()> {
    let geometries: ArrayVec<&Geometry, MAX_GROUP> = pass.calls.iter().map(|c| c.geometry).collect();
    let needed = first.context.backend().workspace(&geometries, pass.tokens)?;
    if pass.workspace.bytes < needed {
        return Err(Error::argument(
            "workspace",
            format_args!("{} bytes", pass.workspace.bytes),
            format_args!("at least {needed}, as adalora_adapter_sizes says"),
        ));
    }
    if needed > 0 {
        pass.workspace.data.check("workspace", ALIGNMENT)?;
    }
    Ok(())
}

/// A named place, and whether it is written.
struct Operand {
    name: &'static str,
    region: Region,
    written: bool,
}

fn operands(call: &Call, tokens: usize, stages: Stages, direction: Direction) -> ArrayVec<Operand, 12> {
    let forward = direction == Direction::Forward;
    let mut list = ArrayVec::new();
    let mut push = |name, region, written| list.push(Operand { name, region, written });
    for (name, region) in regions(&call.params) {
        push(name, region, false);
    }
    if let Some(grads) = &call.grads {
        push("grads.A", grads.a.region(), stages.expand);
        push("grads.E", grads.e.region(), stages.expand);
        push("grads.B", grads.b.region(), stages.project);
    }
    if let Some(output) = &call.output {
        push(if forward { "y" } else { "dy" }, output.region(), forward);
    }
    let saved = tokens * call.geometry.rank * call.geometry.compute_dtype().size();
    if let Some(h) = call.h {
        push("h", Region::contiguous(h, saved), forward && stages.project);
    }
    if let Some(g) = call.g {
        push("g", Region::contiguous(g, saved), stages.project);
    }
    if let Some(pattern) = call.pattern {
        push("pattern", Region::contiguous(pattern, call.geometry.rank), false);
    }
    if let Some(dropout) = &call.dropout {
        push("dropout.seed", Region::contiguous(dropout.seed, 8), false);
        push("dropout.offset", Region::contiguous(dropout.offset, 8), false);
    }
    list
}

fn check_overlaps(pass: &Pass, dx: Option<&Matrix>, direction: Direction) -> Result<()> {
    let mut common: ArrayVec<Operand, 3> = ArrayVec::new();
    let workspace = Region::contiguous(pass.workspace.data, pass.workspace.bytes);
    common.push(Operand { name: "workspace", region: workspace, written: true });
    if let Some(x) = &pass.x {
        common.push(Operand { name: "x", region: x.region(), written: false });
    }
    if let Some(dx) = dx {
        common.push(Operand { name: "dx", region: dx.region(), written: true });
    }
    let clash = |a: &Operand, b: &Operand| (a.written || b.written) && a.region.overlaps(&b.region);
    let refuse = |name: String, other: String| {
        Err(Error::new(
            Code::InvalidArgument,
            format!("{name}: found memory that overlaps {other}, expected memory of its own"),
        ))
    };
    for (i, a) in common.iter().enumerate() {
        if let Some(b) = common[i + 1..].iter().find(|b| clash(a, b)) {
            return refuse(b.name.into(), a.name.into());
        }
    }
    for (i, call) in pass.calls.iter().enumerate() {
        let own = operands(call, pass.tokens, pass.stages, direction);
        for (k, a) in own.iter().enumerate() {
            let name = || format!("calls[{i}].{}", a.name);
            if let Some(b) = common.iter().find(|b| clash(a, b)) {
                return refuse(name(), b.name.into());
            }
            if let Some(b) = own[k + 1..].iter().find(|b| clash(a, b)) {
                return refuse(format!("calls[{i}].{}", b.name), name());
            }
            for (j, other) in pass.calls.iter().enumerate().skip(i + 1) {
                let theirs = operands(other, pass.tokens, pass.stages, direction);
                if let Some(b) = theirs.iter().find(|b| clash(a, b)) {
                    return refuse(format!("calls[{j}].{}", b.name), name());
                }
            }
        }
    }
    Ok(())
}
