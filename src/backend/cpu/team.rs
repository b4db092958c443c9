//! The threads that compute: a pool of the context's own, or the caller's. The calling thread always works too, and who
//! does which task never changes a result.

use crate::backend::panics::quietly;
use crate::context::{Level, Log, Parallel};
use crate::error::{Code, Error, Result};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// How often a thread looks for work before it sleeps: some tens of microseconds, about what waking it costs.
const SPINS: usize = 500;

/// Threads that work on one job at a time.
pub(super) struct Team {
    threads: usize,
    parallel: Option<Parallel>,
    /// The pool, made at the first job, and again in the child of a fork. Behind a bare pointer because a lock that
    /// another thread held during the fork would never open in the child.
    pool: AtomicPtr<Pool>,
    /// The process of the thread that is just starting the pool, or 0. Of the process, because the child of a fork may
    /// find the mark of a thread that it does not have.
    starting: AtomicU32,
    log: Option<Log>,
}

/// Tasks to be done, and how far they are.
struct Job<'a> {
    body: &'a (dyn Fn(usize, usize) + Sync),
    tasks: usize,
    next: AtomicUsize,
    workers: AtomicUsize,
    most_workers: usize,
    panic: Mutex<Option<String>>,
}

impl Job<'_> {
    fn join(&self) {
        let worker = self.workers.fetch_add(1, Ordering::Relaxed);
        if worker < self.most_workers {
            self.work(worker);
        }
    }

    fn work(&self, worker: usize) {
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= self.tasks {
                return;
            }
            if let Err(text) = quietly(|| (self.body)(task, worker)) {
                lock(&self.panic).get_or_insert(text);
                self.next.store(self.tasks, Ordering::Relaxed);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Team {
    pub(super) fn new(threads: usize, parallel: Option<Parallel>, log: Option<Log>) -> Self {
        let available = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if threads == 0 { available() } else { threads };
        Self { threads, parallel, pool: AtomicPtr::default(), starting: AtomicU32::new(0), log }
    }

    /// How many threads may work at once; workers are numbered below this.
    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    pub(super) fn is_callers(&self) -> bool {
        self.parallel.is_some()
    }

    pub(super) fn say(&self, level: Level, text: &str) {
        if let Some(log) = &self.log {
            log(level, text);
        }
    }

    /// Starts the pool, if there is to be one.
    pub(super) fn prepare(&self) {
        while self.threads > 1 && self.parallel.is_none() && self.pool().is_none() {
            std::thread::yield_now();
        }
    }

    /// Calls `body(task, worker)` once for each task. `outputs` names what is undefined if that fails.
    pub(super) fn run(
        &self,
        tasks: usize,
        parallel: bool,
        outputs: &str,
        body: impl Fn(usize, usize) + Sync,
    ) -> Result<()> {
        let workers = if parallel { self.threads.min(tasks) } else { 1 };
        let job = Job {
            body: &body,
            tasks,
            next: AtomicUsize::new(0),
            workers: AtomicUsize::new(0),
            most_workers: workers,
            panic: Mutex::new(None),
        };
        match &self.parallel {
            Some(parallel) if workers > 1 => {
                parallel(&|| job.join(), workers);
                // All have returned, so that number 0 is free for what fewer threads than promised may have left.
                job.work(0);
            }
            None if workers > 1 => match self.pool() {
                Some(pool) => pool.run(&job),
                None => job.work(0),
            },
            _ => job.work(0),
        }
        match lock(&job.panic).take() {
            None => Ok(()),
            Some(text) => Err(Error::new(Code::Incomplete, format!("{outputs} undefined: {text}"))),
        }
    }

    /// The pool, which the first who asks starts; None while another thread is at it, so that there are never two.
    fn pool(&self) -> Option<&Pool> {
        let process = std::process::id();
        if let Some(pool) = self.started().filter(|pool| pool.process == process) {
            return Some(pool);
        }
        let mark = self.starting.load(Ordering::Relaxed);
        let take = || self.starting.compare_exchange(mark, process, Ordering::Acquire, Ordering::Relaxed);
        if mark == process || take().is_err() {
            return None;
        }
        let mut current = self.started();
        if current.is_none_or(|pool| pool.process != process) {
            if current.is_some() {
                // Of the parent, whose threads do not exist here and whose locks may be held for ever: left where it is.
                self.say(Level::Info, "a fork: starting new threads in the child");
            }
            let fresh = Pool::start(self.threads - 1, |text| self.say(Level::Warning, text));
            self.pool.store(Box::into_raw(Box::new(fresh)), Ordering::Release);
            current = self.started();
        }
        self.starting.store(0, Ordering::Release);
        current
    }

    /// The pool of this process or of one that it was forked from.
    fn started(&self) -> Option<&Pool> {
        // SAFETY: null, or a pool that lives until the team does.
        unsafe { self.pool.load(Ordering::Acquire).as_ref() }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        let pool = *self.pool.get_mut();
        // SAFETY: null, or made by `Box::into_raw` and used by nobody any more.
        if !pool.is_null() && unsafe { (*pool).process } == std::process::id() {
            // SAFETY: as above.
            drop(unsafe { Box::from_raw(pool) });
        }
    }
}

/// Sleeping threads of our own.
struct Pool {
    process: u32,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Held while a job runs; who finds it held computes alone.
    busy: AtomicBool,
    /// Grows with every job; what spinning threads watch.
    generation: AtomicUsize,
    /// Workers on the current job; what the calling thread watches at its end.
    active: AtomicUsize,
    board: Mutex<Board>,
    wake: Condvar,
    finished: Condvar,
}

struct Board {
    job: Option<JobPointer>,
    /// Threads that have begun to serve.
    ready: usize,
    stop: bool,
}

/// A job on the stack of the thread that runs it, which waits for all workers to leave before it returns.
#[derive(Clone, Copy)]
struct JobPointer(*const Job<'static>);

// SAFETY: a job is shared between threads by design (all its fields are), and outlives its use.
unsafe impl Send for JobPointer {}

impl Pool {
    fn start(workers: usize, mut warn: impl FnMut(&str)) -> Self {
        let shared = Arc::new(Shared {
            busy: AtomicBool::new(false),
            generation: AtomicUsize::new(0),
            active: AtomicUsize::new(0),
            board: Mutex::new(Board { job: None, ready: 0, stop: false }),
            wake: Condvar::new(),
            finished: Condvar::new(),
        });
        let mut threads = Vec::with_capacity(workers);
        let signals = Signals::block();
        for i in 0..workers {
            let mine = Arc::clone(&shared);
            match std::thread::Builder::new().name(format!("adalora-{i}")).spawn(move || mine.serve()) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    warn(&format!("{} of {workers} threads started: {error}", threads.len()));
                    break;
                }
            }
        }
        drop(signals);
        // What a thread allocates at its beginning is behind us when this returns.
        let mut board = lock(&shared.board);
        while board.ready < threads.len() {
            board = shared.finished.wait(board).unwrap_or_else(PoisonError::into_inner);
        }
        drop(board);
        Self { process: std::process::id(), shared, threads }
    }

    fn run(&self, job: &Job) {
        let shared = &*self.shared;
        if shared.busy.swap(true, Ordering::Acquire) {
            return job.work(0);
        }
        // The lifetime ends before the job does: below, every worker has left.
        let pointer = JobPointer(std::ptr::from_ref(job).cast());
        // Number 0 is this thread's, which would wait for nothing if all numbers went to others.
        job.workers.store(1, Ordering::Relaxed);
        shared.post(job.most_workers - 1, |board| board.job = Some(pointer));
        job.work(0);
        lock(&shared.board).job = None;
        for _ in 0..SPINS {
            if shared.active.load(Ordering::Acquire) == 0 {
                break;
            }
            std::hint::spin_loop();
        }
        let mut board = lock(&shared.board);
        while shared.active.load(Ordering::Acquire) > 0 {
            board = shared.finished.wait(board).unwrap_or_else(PoisonError::into_inner);
        }
        drop(board);
        shared.busy.store(false, Ordering::Release);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.post(self.threads.len(), |board| board.stop = true);
        for thread in self.threads.drain(..) {
            // A worker catches every panic of a job, so that there is none to report.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// Changes the board and wakes so many of the workers that sleep. The generation grows under the lock: a worker that
    /// has just seen the old one, and is about to sleep, would miss it otherwise.
    fn post(&self, workers: usize, change: impl FnOnce(&mut Board)) {
        let mut board = lock(&self.board);
        change(&mut board);
        self.generation.fetch_add(1, Ordering::Release);
        let all = board.ready;
        drop(board);
        if workers >= all {
            self.wake.notify_all();
        } else {
            (0..workers).for_each(|_| self.wake.notify_one());
        }
    }

    fn serve(&self) {
        // The thread's own slots are made by the first use, a panic's apart.
        let _ = quietly(|| ());
        lock(&self.board).ready += 1;
        self.finished.notify_one();
        let mut seen = 0;
        loop {
            for _ in 0..SPINS {
                if self.generation.load(Ordering::Acquire) != seen {
                    break;
                }
                std::hint::spin_loop();
            }
            let mut board = lock(&self.board);
            while self.generation.load(Ordering::Acquire) == seen {
                board = self.wake.wait(board).unwrap_or_else(PoisonError::into_inner);
            }
            seen = self.generation.load(Ordering::Acquire);
            if board.stop {
                return;
            }
            let Some(job) = board.job else { continue };
            // Under the lock, so that whoever takes the job down afterwards sees this worker.
            self.active.fetch_add(1, Ordering::AcqRel);
            drop(board);
            // SAFETY: the thread that runs the job waits until `active` is 0 again.
            unsafe { (*job.0).join() };
            let board = lock(&self.board);
            if self.active.fetch_sub(1, Ordering::AcqRel) == 1 {
                self.finished.notify_one();
            }
            drop(board);
        }
    }
}

/// Keeps the host's signals away from threads that are started meanwhile: they belong to threads that the host knows.
struct Signals(libc::sigset_t);

impl Signals {
    fn block() -> Self {
        // SAFETY: both sets are ours; blocking signals for a moment disturbs nothing.
        unsafe {
            let mut all = std::mem::zeroed();
            let mut before = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            Self(before)
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: what was in force before.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn each_task_once(team: &Team, tasks: usize) {
        let seen: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        team.run(tasks, true, "nothing", |task, worker| {
            assert!(worker < team.threads());
            seen[task].fetch_add(1, Ordering::Relaxed);
        })
        .unwrap();
        assert!(seen.iter().all(|n| n.load(Ordering::Relaxed) == 1));
    }

    #[test]
    fn every_task_is_done_once() {
        for threads in [1, 2, 5] {
            let team = Team::new(threads, None, None);
            for tasks in [0, 1, 2, 7, 100] {
                each_task_once(&team, tasks);
            }
        }
    }

    #[test]
    fn a_place_is_kept_for_the_calling_thread() {
        let team = Team::new(5, None, None);
        let caller = std::thread::current().id();
        let has_place_0 = |_, worker| assert_eq!(worker == 0, std::thread::current().id() == caller);
        for tasks in [2, 3, 5, 20] {
            (0..500).for_each(|_| team.run(tasks, true, "nothing", has_place_0).unwrap());
        }
    }

    #[test]
    fn jobs_of_several_threads_run_side_by_side() {
        let team = Team::new(3, None, None);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..200).for_each(|_| each_task_once(&team, 20)));
            }
        });
    }

    #[test]
    fn who_finds_a_pool_being_started_computes_alone() {
        let team = Team::new(3, None, None);
        team.starting.store(std::process::id(), Ordering::Relaxed);
        each_task_once(&team, 20);
        assert!(team.started().is_none());
        team.starting.store(0, Ordering::Relaxed);
        each_task_once(&team, 20);
        assert_eq!(team.started().map(|pool| pool.threads.len()), Some(2));
    }

    /// The child would wait for a thread that only its parent has.
    #[test]
    fn a_start_that_a_fork_cut_off_is_made_anew() {
        let team = Team::new(3, None, None);
        team.starting.store(std::process::id() + 1, Ordering::Relaxed);
        team.prepare();
        assert_eq!(team.started().map(|pool| pool.threads.len()), Some(2));
    }

    /// A worker that misses the word to stop would sleep for ever, and so would whoever waits for its end.
    #[test]
    fn a_team_may_end_at_any_moment() {
        for i in 0..2000u32 {
            let team = Team::new(3, None, None);
            team.prepare();
            if i % 2 == 0 {
                each_task_once(&team, 5);
            }
            (0..i % 97 * 10).for_each(|_| std::hint::spin_loop());
        }
    }

    #[test]
    fn a_callers_function_may_use_fewer_or_more_threads() {
        for bodies in [0, 1, 9] {
            let parallel: Parallel = Box::new(move |body, _| {
                std::thread::scope(|scope| (0..bodies).for_each(|_| drop(scope.spawn(body))));
            });
            each_task_once(&Team::new(4, Some(parallel), None), 50);
        }
    }

    #[test]
    fn a_panic_becomes_text_and_the_team_goes_on() {
        let team = Team::new(2, None, None);
        let error = team.run(10, true, "y is", |task, _| assert!(task != 3, "task {task}")).unwrap_err();
        assert_eq!(error.code, Code::Incomplete);
        assert!(error.message.starts_with("y is undefined") && error.message.contains("task 3"), "{}", error.message);
        assert!(error.message.contains("team.rs"), "{}", error.message);
        each_task_once(&team, 10);
    }
}
