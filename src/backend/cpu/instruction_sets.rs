//! Whole operations on every instruction set that this processor has, held against sums in float64. All other tests run
//! the best one alone.

use super::team::Team;
use super::{Cpu, Host};
use crate::adapter::{
    self, Adapter, DropoutPlace, Geometry, Layout, MAX_GROUP, RawCall, RawTriplets, Share, Stages, sizes,
};
use crate::allocator::{Allocator, BudgetUnit, Config, Factor, HyperSource, SliceSource, StepSource};
use crate::backend::cpu::simd::Isa;
use crate::context::Context;
use crate::philox::Dropout;
use crate::tensor::{Address, Buffer, Dtype, Matrix, Stream};
use Dtype::{Bfloat16, Float16, Float32, Float64};
use arrayvec::ArrayVec;
use half::{bf16, f16};
use std::sync::Arc;

const RANKS: [usize; 7] = [1, 3, 6, 12, 17, 64, 128];
/// Whole tiles of the widest vectors and a part of one, in both directions.
const INPUT: usize = 149;
const OUTPUT: usize = 70;
/// Several chunks of the backward pass, of several blocks of tokens each, the last of which are parts.
const TOKENS: usize = 141;
const STREAM: Stream = Stream(0);

fn contexts() -> impl Iterator<Item = (&'static str, Arc<Context>)> {
    Isa::ALL.iter().filter(|isa| isa.is_available()).map(|isa| {
        let host = Host { isa: *isa, team: Team::new(1, None, None) };
        (isa.name(), Context::over(Arc::new(Cpu(Arc::new(host)))))
    })
}

/// A number as float64 has it, and what it would be if nothing that it was added up from had a sign: rounding can have
/// changed no more than a share of that.
#[derive(Clone, Copy, Default)]
struct Number {
    value: f64,
    size: f64,
}

impl Number {
    fn exact(value: f64) -> Self {
        Self { value, size: value.abs() }
    }

    fn plus(self, other: Self) -> Self {
        Self { value: self.value + other.value, size: self.size + other.size }
    }

    fn times(self, other: Self) -> Self {
        Self { value: self.value * other.value, size: self.size * other.size }
    }

    fn scaled(self, factor: f64) -> Self {
        self.times(Self::exact(factor))
    }
}

#[derive(Clone)]
struct Grid {
    rows: usize,
    columns: usize,
    numbers: Vec<Number>,
}

impl Grid {
    fn new(rows: usize, columns: usize, number: impl Fn(usize, usize) -> Number) -> Self {
        let numbers = (0..rows * columns).map(|i| number(i / columns, i % columns)).collect();
        Self { rows, columns, numbers }
    }

    /// Numbers of either sign that every element type holds exactly.
    fn random(rows: usize, columns: usize, seed: u64) -> Self {
        let sixteenths = |i: usize| {
            let mixed = (seed << 32 | i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            ((mixed ^ mixed >> 31).wrapping_mul(0x94d0_49bb_1331_11eb) >> 40) % 63
        };
        Self::new(rows, columns, |i, j| Number::exact(sixteenths(i * columns + j) as f64 / 16.0 - 31.0 / 16.0))
    }

    fn at(&self, i: usize, j: usize) -> Number {
        self.numbers[i * self.columns + j]
    }

    fn transposed(&self) -> Self {
        Self::new(self.columns, self.rows, |i, j| self.at(j, i))
    }

    /// `self other^T`.
    fn times_transposed(&self, other: &Self) -> Self {
        let row = |of: &'_ Self, i: usize| i * of.columns..(i + 1) * of.columns;
        Self::new(self.rows, other.rows, |i, j| {
            let (mut value, mut size) = (0.0, 0.0);
            for (a, b) in self.numbers[row(self, i)].iter().zip(&other.numbers[row(other, j)]) {
                value += a.value * b.value;
                size += a.size * b.size;
            }
            Number { value, size }
        })
    }

    /// Each column times its element of a row.
    fn times_columns(&self, by: &Self) -> Self {
        Self::new(self.rows, self.columns, |i, j| self.at(i, j).times(by.at(0, j)))
    }

    fn scaled(&self, factor: f64) -> Self {
        Self::new(self.rows, self.columns, |i, j| self.at(i, j).scaled(factor))
    }

    fn plus(&self, other: &Self) -> Self {
        Self::new(self.rows, self.columns, |i, j| self.at(i, j).plus(other.at(i, j)))
    }
}

/// Memory of the caller's, aligned as workspace and state have to be.
struct Memory(Vec<u64>);

impl Memory {
    fn new(bytes: usize) -> Self {
        Self(vec![0; bytes / size_of::<u64>() + adapter::ALIGNMENT / size_of::<u64>()])
    }

    fn address(&mut self) -> Address {
        Address(self.0.as_mut_ptr().expose_provenance().next_multiple_of(adapter::ALIGNMENT))
    }
}

/// A matrix of the caller's, without gaps.
struct Array {
    rows: usize,
    columns: usize,
    dtype: Dtype,
    words: Vec<u64>,
}

impl Array {
    fn new(dtype: Dtype, from: &Grid) -> Self {
        let number = |n: &Number| match dtype {
            Float64 => n.value.to_bits(),
            Float32 => u64::from((n.value as f32).to_bits()),
            Bfloat16 => u64::from(bf16::from_f64(n.value).to_bits()),
            Float16 => u64::from(f16::from_f64(n.value).to_bits()),
        };
        let (each, bits) = (8 / dtype.size(), 8 * dtype.size());
        let word = |numbers: &[Number]| {
            numbers.iter().enumerate().fold(0, |word, (i, n)| word | number(n) << (i * bits % u64::BITS as usize))
        };
        Self { rows: from.rows, columns: from.columns, dtype, words: from.numbers.chunks(each).map(word).collect() }
    }

    fn zeros(dtype: Dtype, rows: usize, columns: usize) -> Self {
        Self::new(dtype, &Grid::new(rows, columns, |_, _| Number::default()))
    }

    fn matrix(&mut self) -> Matrix {
        let data = Address(self.words.as_mut_ptr().expose_provenance());
        Matrix { data, rows: self.rows, columns: self.columns, row_stride: self.columns, dtype: self.dtype }
    }

    fn address(&mut self) -> Address {
        self.matrix().data
    }

    /// The numbers that are there now.
    fn grid(&self) -> Grid {
        let (each, bits) = (8 / self.dtype.size(), 8 * self.dtype.size());
        Grid::new(self.rows, self.columns, |i, j| {
            let n = i * self.columns + j;
            let number = self.words[n / each] >> (n % each * bits);
            Number::exact(match self.dtype {
                Float64 => f64::from_bits(number),
                Float32 => f64::from(f32::from_bits(number as u32)),
                Bfloat16 => bf16::from_bits(number as u16).to_f64(),
                Float16 => f16::from_bits(number as u16).to_f64(),
            })
        })
    }
}

/// By how much of itself a number may be off after one rounding.
fn epsilon(dtype: Dtype) -> f64 {
    match dtype {
        Float64 => f64::EPSILON / 2.0,
        Float32 => f64::from(f32::EPSILON) / 2.0,
        Bfloat16 => bf16::EPSILON.to_f64() / 2.0,
        Float16 => f16::EPSILON.to_f64() / 2.0,
    }
}

/// Below which a type has no numbers but 0.
fn least(dtype: Dtype) -> f64 {
    match dtype {
        Float64 => f64::from_bits(1),
        Float32 => f64::from(f32::from_bits(1)),
        Bfloat16 => bf16::MIN_POSITIVE_SUBNORMAL.to_f64(),
        Float16 => f16::MIN_POSITIVE_SUBNORMAL.to_f64(),
    }
}

/// Every element is what is expected, after so many roundings in the compute type and one in its own.
fn expect_close(what: &str, expected: &Grid, found: &Array, roundings: usize, compute: Dtype) {
    for (i, (want, got)) in expected.numbers.iter().zip(&found.grid().numbers).enumerate() {
        let share = roundings as f64 * epsilon(compute) * want.size + 2.0 * epsilon(found.dtype) * want.value.abs();
        let tolerance = share + least(found.dtype);
        let off = (got.value - want.value).abs();
        // What is not a number is not close either.
        assert!(
            off <= tolerance,
            "{what} at {} {}: {} instead of {}, off by {off:e} of {tolerance:e}",
            i / expected.columns,
            i % expected.columns,
            got.value,
            want.value
        );
    }
}

fn geometry((activation_dtype, param_dtype): (Dtype, Dtype), (input, output, rank): (usize, usize, usize)) -> Geometry {
    let [input, output] = [input, output].map(|n| Share { whole: n, begin: 0, local: n });
    let (ranknum, alpha, dropout, operand_terms) = (rank, 0.0, 0.0, 2);
    Geometry { input, output, rank, ranknum, alpha, dropout, param_dtype, activation_dtype, operand_terms }
}

#[derive(Clone, Copy)]
struct PassCase {
    keeps_h: bool,
    masks: bool,
    apart: bool,
    /// Of each adapter; 0: none.
    dropout: &'static [f64],
}

/// What an adapter's share in a pass is made of, and what must come out.
struct Adapted {
    rank: usize,
    seed: u64,
    params: [Grid; 3],
    grads: [Grid; 3],
    y: Grid,
    dy: Grid,
    kept: Vec<u8>,
    expected_y: Grid,
    expected_grads: [Grid; 3],
}

struct Expected {
    x: Grid,
    dx: Grid,
    expected_dx: Grid,
    adapted: Vec<Adapted>,
}

const SCALING: f64 = 0.7;
const OFFSET: u64 = 11;

fn expected(case: PassCase, ranks: &[usize]) -> Expected {
    let x = Grid::random(TOKENS, INPUT, 1);
    let dx = Grid::random(TOKENS, INPUT, 2);
    let mut expected_dx = dx.clone();
    let adapted = ranks.iter().zip(case.dropout).zip(10..).map(|((rank, dropout), seed)| {
        let rank = *rank;
        let part = |rows, columns, n: u64| Grid::random(rows, columns, 100 * seed + n);
        let (a, b) = (part(rank, INPUT, 0), part(OUTPUT, rank, 2));
        let e = Grid::new(1, rank, |_, k| if k == 4 { Number::default() } else { part(1, rank, 1).at(0, k) });
        let kept: Vec<u8> = (0..rank).map(|k| u8::from(!case.masks || k % 3 != 1)).collect();
        let grads = [part(rank, INPUT, 3), part(1, rank, 4), part(OUTPUT, rank, 5)];
        let (y, dy) = (part(TOKENS, OUTPUT, 6), part(TOKENS, OUTPUT, 7));

        let mask = Grid::new(TOKENS, INPUT, |t, c| {
            let mask = Dropout::new(seed, OFFSET, *dropout);
            let mut factor = 0.0;
            mask.for_each(t as u32, c, 1, |_, stays| factor = if stays { mask.keep_scale } else { 0.0 });
            Number::exact(factor)
        });
        let x = Grid::new(TOKENS, INPUT, |t, c| x.at(t, c).times(mask.at(t, c)));
        let live = |k: usize, n: Number| if kept[k] != 0 { n } else { Number::default() };
        let values = Grid::new(1, rank, |_, k| live(k, e.at(0, k)));
        let h = x.times_transposed(&a);
        let g = dy.times_transposed(&b.transposed()).scaled(SCALING);
        let scaled_h = h.times_columns(&values).scaled(SCALING);
        let scaled_g = g.times_columns(&values);
        let expected_y = y.plus(&scaled_h.times_transposed(&b));
        let da = scaled_g.transposed().times_transposed(&x.transposed());
        let de = Grid::new(1, rank, |_, k| {
            live(k, (0..TOKENS).fold(Number::default(), |sum, t| sum.plus(g.at(t, k).times(h.at(t, k)))))
        });
        let db = dy.transposed().times_transposed(&scaled_h.transposed());
        let share = scaled_g.times_transposed(&a.transposed());
        let share = Grid::new(TOKENS, INPUT, |t, c| share.at(t, c).times(mask.at(t, c)));
        expected_dx = expected_dx.plus(&share);
        let expected_grads = [grads[0].plus(&da), grads[1].plus(&de), grads[2].plus(&db)];
        Adapted { rank, seed, params: [a, e, b], grads, y, dy, kept, expected_y, expected_grads }
    });
    let adapted = adapted.collect();
    Expected { x, dx, expected_dx, adapted }
}

/// Memory of one adapter in a pass.
struct Operands {
    params: [Array; 3],
    grads: [Array; 3],
    y: Array,
    dy: Array,
    h: Memory,
    g: Memory,
    kept: Vec<u8>,
    place: [u64; 2],
}

fn raw([a, e, b]: &mut [Array; 3]) -> RawTriplets {
    RawTriplets { a: a.matrix(), e: e.matrix(), b: b.matrix() }
}

fn bytes_of(bytes: &mut [u8]) -> Address {
    Address(bytes.as_mut_ptr().expose_provenance())
}

fn word_of<T>(word: &mut T) -> Address {
    Address(std::ptr::from_mut(word).expose_provenance())
}

/// Forward and backward of a case in the types (activations, parameters, gradients).
fn check_pass(case: PassCase, want: &Expected, types: (Dtype, Dtype, Dtype), context: &Arc<Context>, what: &str) {
    let (activation, param, grad) = types;
    let compute = param.compute();
    let adapter = |(one, dropout): (&Adapted, &f64)| {
        let shape = geometry((activation, param), (INPUT, OUTPUT, one.rank));
        Adapter::new(Arc::clone(context), Geometry { dropout: *dropout, ..shape })
    };
    let adapters: Vec<Adapter> = want.adapted.iter().zip(case.dropout).map(adapter).collect();
    let references: Vec<&Adapter> = adapters.iter().collect();
    let (mut x, mut dx) = (Array::new(activation, &want.x), Array::new(activation, &want.dx));
    let bytes = sizes(&references, TOKENS).unwrap();
    let mut workspace = Memory::new(bytes.workspace);
    let workspace = Buffer { data: workspace.address(), bytes: bytes.workspace };
    let operands = |(one, saved): (&Adapted, &usize)| Operands {
        params: one.params.each_ref().map(|grid| Array::new(param, grid)),
        grads: one.grads.each_ref().map(|grid| Array::new(grad, grid)),
        y: Array::new(activation, &one.y),
        dy: Array::new(activation, &one.dy),
        h: Memory::new(*saved),
        g: Memory::new(*saved),
        kept: one.kept.clone(),
        place: [one.seed, OFFSET],
    };
    let mut operands: Vec<Operands> = want.adapted.iter().zip(&bytes.saved).map(operands).collect();
    let (x_matrix, dx_matrix) = (x.matrix(), dx.matrix());
    let stages = |project, expand| Stages { project, expand };
    let all = if case.apart { vec![stages(true, false), stages(false, true)] } else { vec![stages(true, true)] };
    for forward in [true, false] {
        for stages in &all {
            let calls = adapters.iter().zip(&mut operands).map(|(adapter, own)| {
                let [seed, offset] = &mut own.place;
                let output = if forward { own.y.matrix() } else { own.dy.matrix() };
                RawCall {
                    adapter,
                    params: raw(&mut own.params),
                    grads: (!forward).then(|| raw(&mut own.grads)),
                    scaling: SCALING,
                    output: Some(output).filter(|_| if forward { stages.expand } else { stages.project }),
                    h: case.keeps_h.then(|| own.h.address()),
                    g: (case.apart && !forward).then(|| own.g.address()),
                    pattern: case.masks.then(|| bytes_of(&mut own.kept)),
                    dropout: Some(DropoutPlace { seed: word_of(seed), offset: word_of(offset), token0: 0 }),
                }
            });
            let calls: ArrayVec<RawCall, MAX_GROUP> = calls.collect();
            if forward {
                let x = Some(x_matrix).filter(|_| stages.project);
                adapter::forward(&calls, *stages, x, workspace, STREAM).unwrap();
            } else {
                let (x, dx) = (Some(x_matrix), Some(dx_matrix));
                let [x, dx] = [x, dx].map(|m| m.filter(|_| stages.expand));
                adapter::backward(&calls, *stages, true, x, dx, workspace, STREAM).unwrap();
            }
        }
    }
    let roundings = TOKENS + INPUT + OUTPUT + want.adapted.iter().map(|one| one.rank).sum::<usize>() + 8;
    for (i, (one, own)) in want.adapted.iter().zip(&operands).enumerate() {
        let name = |part: &str| format!("{what}: {part} of adapter {i} of rank {}", one.rank);
        expect_close(&name("y"), &one.expected_y, &own.y, roundings, compute);
        for (part, (expected, found)) in ["dA", "dE", "dB"].iter().zip(one.expected_grads.iter().zip(&own.grads)) {
            expect_close(&name(part), expected, found, roundings, compute);
        }
    }
    expect_close(&format!("{what}: dx"), &want.expected_dx, &dx, roundings, compute);
}

/// Activations with parameters and gradients.
const TYPES: [(Dtype, Dtype, Dtype); 10] = [
    (Float64, Float64, Float64),
    (Float32, Float32, Float32),
    (Bfloat16, Float32, Float32),
    (Float16, Float32, Float32),
    (Bfloat16, Bfloat16, Bfloat16),
    (Bfloat16, Bfloat16, Float32),
    (Float16, Float16, Float16),
    (Float16, Float16, Float32),
    (Float32, Bfloat16, Bfloat16),
    (Float16, Bfloat16, Float32),
];

/// An adapter of each rank, and others beside it.
fn check_passes(case: PassCase, ranks: &[usize], others: &[usize]) {
    for rank in ranks {
        let ranks: Vec<usize> = std::iter::once(rank).chain(others).copied().collect();
        let want = expected(case, &ranks);
        for types in TYPES {
            for (isa, context) in contexts() {
                check_pass(case, &want, types, &context, &format!("{isa}, {types:?}"));
            }
        }
    }
}

#[test]
fn passes_of_one_adapter() {
    check_passes(PassCase { keeps_h: true, masks: false, apart: false, dropout: &[0.0] }, &RANKS, &[]);
}

#[test]
fn passes_of_a_group_with_dropout_and_masked_triplets() {
    check_passes(PassCase { keeps_h: false, masks: true, apart: false, dropout: &[0.0, 0.25] }, &RANKS[..6], &[5]);
}

#[test]
fn passes_in_two_stages() {
    check_passes(PassCase { keeps_h: true, masks: false, apart: true, dropout: &[0.25] }, &RANKS[..5], &[]);
}

/// Parameters with the base weight.
const WEIGHTS: [(Dtype, Dtype); 9] = [
    (Float64, Float64),
    (Float64, Float32),
    (Float64, Bfloat16),
    (Float32, Float32),
    (Float32, Float64),
    (Float32, Bfloat16),
    (Float32, Float16),
    (Bfloat16, Bfloat16),
    (Float16, Float16),
];

#[test]
fn delta_weights_and_merges() {
    // A tile of the delta weight and a part of one, in both directions and both layouts.
    let (input, output) = (261, 9);
    for (n, rank) in RANKS.into_iter().enumerate() {
        let grids = [
            Grid::random(rank, input, 1),
            Grid::random(1, rank, 2).scaled(1.0 / 8.0),
            Grid::random(output, rank, 3).scaled(1.0 / 8.0),
        ];
        let delta = grids[2].times_columns(&grids[1]).scaled(SCALING).times_transposed(&grids[0].transposed());
        for layout in [Layout::OutIn, Layout::InOut] {
            let delta = if layout == Layout::OutIn { delta.clone() } else { delta.transposed() };
            let base = Grid::random(delta.rows, delta.columns, 4);
            for (i, (param, weight)) in WEIGHTS.into_iter().enumerate() {
                for (isa, context) in contexts() {
                    let adapter = Adapter::new(Arc::clone(&context), geometry((param, param), (input, output, rank)));
                    let mut params = grids.each_ref().map(|grid| Array::new(param, grid));
                    let mut w = Array::new(weight, &base);
                    let (params, matrix) = (raw(&mut params), w.matrix());
                    let (expected, done) = match (n + i) % 3 {
                        0 => (delta.clone(), adapter.delta_weight(&params, SCALING, layout, false, &matrix, STREAM)),
                        1 => (base.plus(&delta), adapter.merge(&params, SCALING, layout, &matrix, None, None, STREAM)),
                        _ => {
                            (base.plus(&delta.scaled(-1.0)), adapter.unmerge(&params, SCALING, layout, &matrix, STREAM))
                        }
                    };
                    done.unwrap();
                    let what = format!("{isa}, {param} onto {weight}, {layout:?}, rank {rank}");
                    expect_close(&what, &expected, &w, rank + 8, param.compute());
                }
            }
        }
    }
}

/// What belongs to one matrix of one adapter.
struct Part {
    adapter: usize,
    factor: Factor,
    p: Array,
    low: Option<Array>,
    g: Array,
    m: Array,
    v: Array,
    ipt: Array,
    unc: Array,
}

#[derive(Clone, Copy)]
struct Trained {
    param: Dtype,
    grad: Dtype,
    master: bool,
}

/// As [`expect_close`], of one number that is given in float64.
fn expect_number(what: &str, expected: Number, found: f64, roundings: usize, compute: Dtype) {
    let found = Array::new(Float64, &Grid::new(1, 1, |_, _| Number::exact(found)));
    expect_close(what, &Grid::new(1, 1, |_, _| expected), &found, roundings, compute);
}

const ORTHOGONAL: f64 = 0.1;

/// The penalty of one factor, of `P P^T - I`, and its gradient.
fn penalty(p: &Grid, adapters: usize) -> (Number, Grid) {
    let share = ORTHOGONAL / (2 * adapters) as f64;
    let gram = p.times_transposed(p);
    let one = |i, j| Number { value: f64::from(u8::from(i == j)), size: f64::from(u8::from(i == j)) };
    let apart = Grid::new(p.rows, p.rows, |i, j| gram.at(i, j).plus(one(i, j).scaled(-1.0)));
    let root = |of: fn(&Number) -> f64| apart.numbers.iter().map(|n| of(n).powi(2)).sum::<f64>().sqrt();
    let (norm, size) = (root(|n| n.value), root(|n| n.size));
    // What is divided by the norm has its error, too.
    let scale = Number { value: 2.0 * share / norm, size: 2.0 * share / norm * (1.0 + size / norm) };
    let product = apart.times_transposed(&p.transposed());
    let gradient = Grid::new(p.rows, p.columns, |i, j| product.at(i, j).times(scale));
    (Number { value: norm * share, size: size * share }, gradient)
}

/// Norm, penalty, update and scores of a model whose adapters have all the ranks.
fn check_steps(types: Trained, context: &Arc<Context>, what: &str) {
    let (input, output) = (261, OUTPUT);
    let state = types.param.compute();
    let adapter = |rank| Adapter::new(Arc::clone(context), geometry((types.param, types.param), (input, output, rank)));
    let adapters: Vec<Adapter> = RANKS.into_iter().map(adapter).collect();
    let config = Config {
        target_rank: 2,
        tinit: 2,
        tfinal: 3,
        total_step: 20,
        delta_t: 1,
        beta1: 0.85,
        beta2: 0.8,
        unit: BudgetUnit::Triplets,
        sharded: false,
    };
    let allocator = Allocator::new(context, config, &adapters.iter().collect::<Vec<_>>()).unwrap();
    let mut parts: Vec<Part> = (0..3 * RANKS.len())
        .map(|i| {
            let (adapter, rank) = (i / 3, RANKS[i / 3]);
            let (factor, rows, columns) =
                [(Factor::A, rank, input), (Factor::E, 1, rank), (Factor::B, output, rank)][i % 3];
            let random = |n: u64| Grid::random(rows, columns, 10 * i as u64 + n).scaled(1.0 / 8.0);
            let positive = |n: u64| {
                let random = random(n);
                Grid::new(rows, columns, |i, j| Number::exact(random.at(i, j).value.abs() + 1.0 / 64.0))
            };
            let p = random(0);
            Part {
                adapter,
                factor,
                p: Array::new(if types.master { Float32 } else { types.param }, &p),
                low: types.master.then(|| Array::zeros(types.param, rows, columns)),
                g: Array::new(types.grad, &random(1)),
                m: Array::new(state, &random(2)),
                v: Array::new(state, &positive(3)),
                ipt: Array::new(state, &positive(4)),
                unc: Array::new(state, &positive(5)),
            }
        })
        .collect();
    let (mut lr, mut weight_decay, beta1, beta2, eps) = (0.01, 0.1, 0.9, 0.99, 1e-8);
    let hypers = [HyperSource { lr: word_of(&mut lr), weight_decay: word_of(&mut weight_decay), beta1, beta2, eps }];
    let slice = |part: &mut Part| SliceSource {
        adapter: part.adapter as i64,
        factor: part.factor,
        begin: 0,
        end: (part.p.rows * part.p.columns) as i64,
        hyper: 0,
        p_dtype: None,
        g_dtype: Some(types.grad),
        replica: false,
        p: part.p.address(),
        p_low: part.low.as_mut().map(Array::address),
        g: part.g.address(),
        m: Some(part.m.address()),
        v: Some(part.v.address()),
        exp_avg_ipt: part.ipt.address(),
        exp_avg_unc: part.unc.address(),
    };
    let slices: Vec<SliceSource> = parts.iter_mut().map(slice).collect();
    let bytes = allocator.sizes(slices.len()).unwrap();
    let (mut own_state, mut workspace) = (Memory::new(bytes.state), Memory::new(bytes.workspace));
    allocator.bind(own_state.address(), workspace.address(), &slices, &hypers, STREAM).unwrap();

    let (mut squares, mut found_inf) = (0.0, 0f32);
    allocator.gradient_norm(None, word_of(&mut squares), Some(word_of(&mut found_inf)), STREAM).unwrap();
    let numbers = parts.iter().flat_map(|part| part.g.grid().numbers);
    let sum = numbers.fold(Number::default(), |sum, g| sum.plus(g.times(g)));
    expect_number(&format!("{what}: sum of squares"), sum, squares, 1 << 17, Float64);
    assert_eq!(found_inf, 0.0);

    let mut value = 0.0;
    let before: Vec<Grid> = parts.iter().map(|part| part.g.grid()).collect();
    allocator.orthogonality(None, ORTHOGONAL, None, Some(word_of(&mut value)), STREAM).unwrap();
    let mut sum = Number::default();
    for (part, before) in parts.iter().zip(before) {
        let what = format!("{what}: penalty's gradient of {:?} of adapter {}", part.factor, part.adapter);
        let (own, gradient) = match part.factor {
            Factor::A => penalty(&part.p.grid(), RANKS.len()),
            Factor::E => (Number::default(), Grid::new(1, part.p.columns, |_, _| Number::default())),
            Factor::B => {
                let (own, gradient) = penalty(&part.p.grid().transposed(), RANKS.len());
                (own, gradient.transposed())
            }
        };
        sum = sum.plus(own);
        expect_close(&what, &before.plus(&gradient), &part.g, input + 128 + 8, state);
    }
    expect_number(&format!("{what}: penalty"), sum, value, input + 8, state);

    let (mut t, mut factor) = (1i64, 0.5);
    let step = StepSource {
        step: word_of(&mut t),
        grad_factor: Some(word_of(&mut factor)),
        found_inf: Some(word_of(&mut found_inf)),
        has_grad: None,
    };
    let arrays = |part: &Part| [&part.p, &part.m, &part.v, &part.ipt, &part.unc].map(Array::grid);
    let before: Vec<_> = parts.iter().map(arrays).collect();
    allocator.update(&step, true, STREAM).unwrap();
    for (part, [p, m, v, ipt, unc]) in parts.iter().zip(before) {
        let each = |number: &dyn Fn(usize, usize) -> Number| Grid::new(p.rows, p.columns, number);
        let expect = |name: &str, expected: &Grid, found: &Array| {
            let what = format!("{what}: {name} of {:?} of adapter {}", part.factor, part.adapter);
            expect_close(&what, expected, found, 16, state);
        };
        let g = part.g.grid().scaled(factor);
        let new_m = m.scaled(beta1).plus(&g.scaled(1.0 - beta1));
        let new_v = each(&|i, j| v.at(i, j).scaled(beta2).plus(g.at(i, j).times(g.at(i, j)).scaled(1.0 - beta2)));
        let new_p = each(&|i, j| {
            let root = new_v.at(i, j).value.sqrt() / (1.0 - beta2).sqrt() + eps;
            p.at(i, j).scaled(1.0 - lr * weight_decay).plus(new_m.at(i, j).scaled(-lr / (1.0 - beta1) / root))
        });
        expect("m", &new_m, &part.m);
        expect("v", &new_v, &part.v);
        expect("p", &new_p, &part.p);
        if let Some(low) = &part.low {
            expect_close(&format!("{what}: low"), &part.p.grid(), low, 0, state);
        }
        // Of the parameters as they are now, which were just checked.
        let now = part.p.grid();
        let sensitivity = each(&|i, j| Number::exact((now.at(i, j).value * g.at(i, j).value).abs()));
        let new_ipt = ipt.scaled(0.85).plus(&sensitivity.scaled(1.0 - 0.85));
        let apart = sensitivity.plus(&new_ipt.scaled(-1.0));
        let new_unc = each(&|i, j| {
            let Number { value, size } = apart.at(i, j);
            unc.at(i, j).scaled(0.8).plus(Number { value: value.abs(), size }.scaled(1.0 - 0.8))
        });
        expect("smoothed sensitivity", &new_ipt, &part.ipt);
        expect("its uncertainty", &new_unc, &part.unc);
    }

    let mut scores = Array::zeros(Float64, 1, RANKS.iter().sum());
    allocator.scores(scores.address(), STREAM).unwrap();
    let mut expected = Vec::new();
    for (adapter, rank) in RANKS.into_iter().enumerate() {
        let [a, e, b] = [0, 1, 2].map(|i| {
            let part = &parts[3 * adapter + i];
            let (ipt, unc) = (part.ipt.grid(), part.unc.grid());
            Grid::new(ipt.rows, ipt.columns, |i, j| ipt.at(i, j).times(unc.at(i, j)))
        });
        let sum = |n: usize, number: &dyn Fn(usize) -> Number| (0..n).map(number).fold(Number::default(), Number::plus);
        for k in 0..rank {
            let of_a = sum(input, &|i| a.at(k, i)).scaled(1.0 / input as f64);
            let of_b = sum(output, &|i| b.at(i, k)).scaled(1.0 / output as f64);
            expected.push(e.at(0, k).plus(of_a).plus(of_b));
        }
    }
    let expected = Grid::new(1, expected.len(), |_, i| expected[i]);
    expect_close(&format!("{what}: scores"), &expected, &scores, input + output, Float64);
}

#[test]
fn norms_penalties_updates_and_scores() {
    for types in [
        Trained { param: Float64, grad: Float64, master: false },
        Trained { param: Float32, grad: Float32, master: false },
        Trained { param: Bfloat16, grad: Bfloat16, master: true },
        Trained { param: Bfloat16, grad: Float32, master: false },
        Trained { param: Float16, grad: Float16, master: false },
    ] {
        for (isa, context) in contexts() {
            let Trained { param, grad, master } = types;
            check_steps(types, &context, &format!("{isa}, {param} with {grad}, master {master}"));
        }
    }
}
