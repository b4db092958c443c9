//! Random sequences of calls through the C functions, as a property.
//!
//! Two callers, who differ in threads and in what lies around their operands, make the same calls. Each call is made valid; in some, one
//! argument is then spoilt, within what the library can notice. After every call:
//! - the status is the expected one, never that of a defect; a refusal names the call and the argument;
//! - no byte changed that the call may not write: none at all where it was refused, no guard zone, no gap between rows;
//! - what the allocator reports agrees with its documentation;
//! - both callers' operands hold the same bits.
//!
//! `FUZZ_SECONDS` says how long it runs; `FUZZ_SEED` which sequence comes first. Each sequence has a seed of its own, the one before plus 1.
//! A failure prints the seed and the shortest sequence found, call by call.

mod adapters;
mod allocators;
mod binding;
mod checkpoints;
mod compaction;
mod contexts;
mod memory;
mod passes;

use super::status::*;
use super::types::ParallelFn;
use memory::{Memory, Place, Writes};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use std::ffi::{CStr, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Nothing, or what is wrong.
type Outcome = Result<(), String>;

macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err(format!($($text)+));
        }
    };
}
use ensure;

/// Calls a C function.
macro_rules! call {
    ($world:expr, $expect:expr, $writes:expr, $name:ident($($argument:expr),* $(,)?)) => {{
        let (expect, writes) = ($expect, $writes);
        $world.perform(stringify!($name), expect, writes, || {
            // SAFETY: handles are live or null or of another kind, and every pointer is null or misaligned or addresses as much memory as
            // the function's documentation asks for.
            unsafe { $name($($argument),*) }
        })
    }};
}
use call;

/// Numbers from a seed (SplitMix64).
struct Choices(u64);

impl Choices {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.below(i + 1));
        }
    }
}

/// What is expected of a call: success, or one of some refusals.
#[derive(Default)]
struct Expect {
    /// Status, and what the text begins with after the call's name.
    refusals: Vec<(i32, Vec<String>)>,
}

impl Expect {
    fn refuse(&mut self, status: i32, names: impl IntoIterator<Item = impl Into<String>>) {
        self.refusals.push((status, names.into_iter().map(Into::into).collect()));
    }

    fn argument(&mut self, name: impl Into<String>) {
        self.refuse(ADALORA_ERROR_INVALID_ARGUMENT, [name]);
    }

    fn handle(&mut self, name: impl Into<String>) {
        self.refuse(ADALORA_ERROR_INVALID_HANDLE, [name]);
    }

    fn state(&mut self, name: impl Into<String>) {
        self.refuse(ADALORA_ERROR_INVALID_STATE, [name]);
    }

    fn is_success(&self) -> bool {
        self.refusals.is_empty()
    }
}

/// What a step of a sequence does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    CreateContext,
    DestroyContext,
    Prepare,
    Describe,
    GradientFactor,
    CreateAdapter,
    DestroyAdapter,
    Initialize,
    DeltaWeight,
    Merge,
    Unmerge,
    Sizes,
    Forward,
    Backward,
    CreateAllocator,
    DestroyAllocator,
    AllocatorSizes,
    Bind,
    Budget,
    Gram,
    Orthogonality,
    GradientNorm,
    Update,
    Scores,
    Select,
    Step,
    Finalize,
    Reset,
    Digest,
    ReadSync,
    SetPattern,
    SetAdamSteps,
    Compact,
    Save,
    Load,
    WriteCheckpoint,
    OpenCheckpoint,
    DestroyCheckpoint,
    ReadCheckpoint,
    ReadDamaged,
}

/// One step of a sequence.
#[derive(Clone, Copy, Debug)]
struct Op {
    kind: Kind,
    /// From which its shapes, values and objects are made.
    choices: u64,
    /// From which the spoilt argument is chosen; valid where there is none.
    spoil: Option<u64>,
}

fn op() -> impl Strategy<Value = Op> {
    use Kind::*;
    let kinds = [
        vec![CreateContext, DestroyContext, Prepare, Describe, GradientFactor],
        vec![CreateAdapter; 3],
        vec![DestroyAdapter, Initialize, DeltaWeight, Merge, Merge, Unmerge, Sizes],
        vec![Forward; 6],
        vec![Backward; 6],
        vec![CreateAllocator, CreateAllocator, DestroyAllocator, AllocatorSizes, Budget, Gram],
        vec![Bind; 4],
        vec![Orthogonality, Orthogonality, GradientNorm, GradientNorm, Scores, Digest, ReadSync],
        vec![Update; 4],
        vec![Select; 4],
        vec![Step; 8],
        vec![Finalize, Reset, SetPattern, SetPattern, SetAdamSteps, Compact, Compact, Compact, Save, Load, Load],
        vec![
            WriteCheckpoint,
            OpenCheckpoint,
            ReadCheckpoint,
            ReadCheckpoint,
            DestroyCheckpoint,
            ReadDamaged,
            ReadDamaged,
        ],
    ]
    .concat();
    let spoil = proptest::option::weighted(0.4, any::<u64>());
    (select(kinds), any::<u64>(), spoil).prop_map(|(kind, choices, spoil)| Op { kind, choices, spoil })
}

/// Who computes for a caller.
#[derive(Clone, Copy, Debug)]
struct Threads {
    threads: i32,
    parallel: ParallelFn,
}

/// How many bodies [`parallel`] runs is part of its address: fewer, as many and more than asked for.
unsafe extern "C" fn parallel<const EXTRA: i32>(
    body: Option<unsafe extern "C" fn(data: *mut c_void)>,
    data: *mut c_void,
    threads: u32,
    _: u32,
) {
    let Some(body) = body else { return };
    let data = data.expose_provenance();
    let run = move || {
        // SAFETY: what the library asks its caller's function to run, while that function runs.
        unsafe { body(std::ptr::with_exposed_provenance_mut(data)) }
    };
    let bodies = (threads as i32 + EXTRA).max(1);
    std::thread::scope(|scope| {
        for _ in 1..bodies {
            scope.spawn(run);
        }
        run();
    });
}

const OTHER_THREADS: [Threads; 5] = [
    Threads { threads: 2, parallel: None },
    Threads { threads: 3, parallel: None },
    Threads { threads: 3, parallel: Some(parallel::<-2>) },
    Threads { threads: 2, parallel: Some(parallel::<0>) },
    Threads { threads: 2, parallel: Some(parallel::<3>) },
];

/// The text of the last error.
fn last_error() -> String {
    // SAFETY: never null, and valid until the next failing call.
    unsafe { CStr::from_ptr(adalora_last_error()) }.to_string_lossy().into_owned()
}

/// A caller: its memory, its objects, and what it knows of them.
struct World {
    memory: Memory,
    threads: Threads,
    contexts: Vec<contexts::Context>,
    adapters: Vec<adapters::Adapter>,
    allocators: Vec<allocators::Allocator>,
    /// Saved states.
    images: Vec<Vec<u8>>,
    checkpoints: Vec<checkpoints::Checkpoint>,
    folder: checkpoints::Folder,
    /// What was written there.
    files: checkpoints::Files,
    next: u64,
    trace: Vec<String>,
    statuses: Vec<i32>,
    /// Messages that contexts sent.
    messages: Box<AtomicUsize>,
}

impl World {
    fn new(filler: u8, threads: Threads) -> Self {
        Self {
            memory: Memory::new(filler),
            threads,
            contexts: Vec::new(),
            adapters: Vec::new(),
            allocators: Vec::new(),
            images: Vec::new(),
            checkpoints: Vec::new(),
            folder: checkpoints::Folder::new(),
            files: checkpoints::Files::default(),
            next: 0,
            trace: Vec::new(),
            statuses: Vec::new(),
            messages: Box::new(AtomicUsize::new(0)),
        }
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Makes a call, and checks what holds for every call; returns whether it succeeded.
    fn perform(
        &mut self,
        name: &'static str,
        expect: Expect,
        writes: Writes,
        call: impl FnOnce() -> i32,
    ) -> Result<bool, String> {
        let text_before = last_error();
        self.memory.take_snapshot();
        let status = call();
        let text = last_error();
        self.statuses.push(status);
        let said = if status == ADALORA_SUCCESS { name } else { &text };
        self.trace.push(format!("{status} {said}"));
        ensure!(
            ![ADALORA_ERROR_INTERNAL, ADALORA_ERROR_INCOMPLETE].contains(&status),
            "status {status} is a defect's: {text}"
        );
        if expect.is_success() {
            ensure!(status == ADALORA_SUCCESS, "a valid call was refused with status {status}: {text}");
            ensure!(text == text_before, "{name} succeeded and changed the last error to {text:?}");
        } else {
            let expected = &expect.refusals;
            ensure!(status != ADALORA_SUCCESS, "{name} succeeded, expected one of {expected:?}");
            let rest = text.strip_prefix(name).and_then(|t| t.strip_prefix(": "));
            let rest = rest.ok_or_else(|| format!("{text:?} does not begin with {name}"))?;
            let named = |prefix: &String| {
                let after = rest.strip_prefix(prefix.as_str());
                after.is_some_and(|a| !a.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
            };
            let fits = expected.iter().any(|(s, names)| *s == status && names.iter().any(named));
            ensure!(fits, "status {status}, {text:?}: expected one of {expected:?}");
        }
        let refused = status != ADALORA_SUCCESS;
        self.memory.check_writes(&writes, refused).map_err(|e| {
            let how = if refused { "was refused" } else { "succeeded" };
            format!("{name} {how}, and {e}")
        })?;
        Ok(!refused)
    }

    /// A place for a handle that a function makes.
    fn slot(&mut self, c: &mut Choices) -> Place {
        self.memory.private(8, 8, c)
    }

    fn handle_at<T>(&self, slot: Place) -> *mut T {
        // SAFETY: a slot of eight bytes, just written by the function that made the handle.
        unsafe { self.memory.pointer::<*mut T>(slot).read() }
    }

    fn apply(&mut self, op: &Op) -> Outcome {
        self.memory.begin_call(op.spoil.is_some());
        let c = &mut Choices(op.choices);
        let mut spoil = op.spoil.map(Choices);
        let w = spoil.as_mut();
        match op.kind {
            Kind::CreateContext => self.create_context(c, w),
            Kind::DestroyContext => self.destroy_context(c, w),
            Kind::Prepare => self.prepare(c, w),
            Kind::Describe => self.describe(c, w),
            Kind::GradientFactor => self.gradient_factor(c, w),
            Kind::CreateAdapter => self.create_adapter(c, w),
            Kind::DestroyAdapter => self.destroy_adapter(c, w),
            Kind::Initialize => self.initialize(c, w),
            Kind::DeltaWeight => self.delta_weight(c, w),
            Kind::Merge => self.merge(c, w),
            Kind::Unmerge => self.unmerge(c, w),
            Kind::Sizes => self.pass_sizes(c, w),
            Kind::Forward => self.pass(false, c, w),
            Kind::Backward => self.pass(true, c, w),
            Kind::CreateAllocator => self.create_allocator(c, w),
            Kind::DestroyAllocator => self.destroy_allocator(c, w),
            Kind::AllocatorSizes => self.allocator_sizes(c, w),
            Kind::Bind => self.bind(c, w),
            Kind::Budget => self.budget(c, w),
            Kind::Gram => self.gram(c, w),
            Kind::Orthogonality => self.orthogonality(c, w),
            Kind::GradientNorm => self.gradient_norm(c, w),
            Kind::Update => self.update(c, w),
            Kind::Scores => self.scores(c, w),
            Kind::Select => self.select(c, w),
            Kind::Step => self.step(c, w),
            Kind::Finalize => self.finalize(c, w),
            Kind::Reset => self.reset(c, w),
            Kind::Digest => self.digest(c, w),
            Kind::ReadSync => self.read_sync(c, w),
            Kind::SetPattern => self.set_pattern(c, w),
            Kind::SetAdamSteps => self.set_adam_steps(c, w),
            Kind::Compact => self.compact(c, w),
            Kind::Save => self.save(c, w),
            Kind::Load => self.load(c, w),
            Kind::WriteCheckpoint => self.write_checkpoint(c, w),
            Kind::OpenCheckpoint => self.open_checkpoint(c, w),
            Kind::DestroyCheckpoint => self.destroy_checkpoint(c, w.is_some()),
            Kind::ReadCheckpoint => self.read_checkpoint(c, w),
            Kind::ReadDamaged => self.read_damaged(c),
        }
    }

    /// Destroys everything that is left, in any order.
    fn end(&mut self, c: &mut Choices) -> Outcome {
        self.memory.begin_call(false);
        let mut kinds = [0, 1, 2, 3];
        c.shuffle(&mut kinds);
        for kind in kinds {
            match kind {
                0 => (0..self.contexts.len()).try_for_each(|_| self.destroy_context(c, None))?,
                3 => (0..self.checkpoints.len()).try_for_each(|_| self.destroy_checkpoint(c, false))?,
                1 => (0..self.adapters.len()).try_for_each(|_| self.destroy_adapter(c, None))?,
                _ => (0..self.allocators.len()).try_for_each(|_| self.destroy_allocator(c, None))?,
            }
        }
        Ok(())
    }
}

fn run(ops: &[Op], threads: Threads) -> Outcome {
    let mut worlds = [World::new(0xa5, Threads { threads: 1, parallel: None }), World::new(!0xa5, threads)];
    for op in ops {
        for world in &mut worlds {
            if let Err(text) = world.apply(op) {
                return Err(report(&text, world, op));
            }
        }
        let [a, b] = &worlds;
        if let Err(text) = a.memory.check_same(&b.memory) {
            return Err(report(&text, a, op));
        }
        if a.statuses != b.statuses {
            return Err(report(&format!("statuses {:?} and {:?}", a.statuses, b.statuses), a, op));
        }
    }
    worlds.iter_mut().try_for_each(|world| {
        let ended = world.end(&mut Choices(ops.len() as u64));
        ended.map_err(|text| format!("at the end, {text}; calls:\n  {}", world.trace.join("\n  ")))
    })
}

fn report(text: &str, world: &World, op: &Op) -> String {
    format!("{text}\nin {op:?} with {:?}; calls:\n  {}", world.threads, world.trace.join("\n  "))
}

fn environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is {text:?}, not a number")))
}

#[test]
fn sequences_of_calls_keep_the_interfaces_promises() {
    use std::io::Write;
    let until = Instant::now() + Duration::from_secs(environment("FUZZ_SECONDS").unwrap_or(5));
    let time = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let first = environment("FUZZ_SEED").unwrap_or_else(|| time().as_nanos() as u64 % 1_000_000_000_000);
    // Past the test harness's capture: a crash would take a captured line with it.
    let _ = writeln!(std::io::stderr(), "sequences begin with FUZZ_SEED={first}");
    let (mut seed, mut calls) = (first, AtomicUsize::new(0));
    let mut refused = AtomicUsize::new(0);
    while Instant::now() < until {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let config = Config {
            cases: 1,
            failure_persistence: None,
            max_shrink_iters: 4000,
            max_shrink_time: 30_000,
            ..Config::default()
        };
        let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
        let sequence = (vec(op(), 1..60), select(&OTHER_THREADS[..]));
        let outcome = runner.run(&sequence, |(ops, threads)| {
            calls.fetch_add(ops.len(), Ordering::Relaxed);
            refused.fetch_add(ops.iter().filter(|op| op.spoil.is_some()).count(), Ordering::Relaxed);
            run(&ops, threads).map_err(TestCaseError::fail)
        });
        match outcome {
            Ok(()) => seed += 1,
            Err(TestError::Fail(reason, (ops, threads))) => {
                let list: Vec<String> = ops.iter().map(|op| format!("  {op:?}")).collect();
                panic!("FUZZ_SEED={seed} fails with {threads:?}: {reason}\nthe sequence:\n{}", list.join("\n"));
            }
            Err(error) => panic!("FUZZ_SEED={seed}: {error}"),
        }
    }
    let (calls, spoilt) = (*calls.get_mut(), *refused.get_mut());
    println!("{} sequences, {calls} steps, {spoilt} of them with a spoilt argument", seed - first);
}
