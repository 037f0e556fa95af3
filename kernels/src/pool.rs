//! Threads that share the units of a computation with the thread that asks for it.
//!
//! Within a step one computation follows the other after microseconds, so a worker without work looks for
//! more for a short while; then it sleeps, and an idle program takes no processor time. A worker that comes late, because its
//! core was taken, is not waited for: what there was to do, the others have done.
//!
//! A worker beyond the limit sleeps like one without work, and only a job that it may join wakes it: the limit is a
//! number that jobs and workers read, and to set it costs no more than to write it.

use std::cell::UnsafeCell;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a worker looks for more work before it sleeps.
const LOOK_FOR: Duration = Duration::from_micros(60);

/// Looks between two looks at the clock.
const LOOKS: usize = 64;

/// A function of the number of a unit.
type Work<'a> = &'a (dyn Fn(usize) + Sync);

struct Shared {
    /// Written by the leader while no worker is inside, read by workers that are.
    job: UnsafeCell<Option<*const (dyn Fn(usize) + Sync)>>,
    /// For every thread, the leader first: the units that it takes before it helps others.
    shares: Box<[Share]>,
    /// The job may be worked on.
    open: AtomicBool,
    /// Workers that look at the job.
    inside: AtomicUsize,
    /// Threads that may work on a job. The leader is number 0, and always may.
    limit: AtomicUsize,
    /// For every worker, number 1 first: it sleeps, or is about to.
    asleep: Box<[AtomicBool]>,
    ending: AtomicBool,
}

/// A range of units that nobody has taken: the first one, and in the upper half the one behind the last. Its owner takes
/// from the front, so that it goes by memory in order; others from the back.
#[derive(Default)]
#[repr(align(64))]
struct Share(AtomicU64);

impl Share {
    /// Units that a share can count to.
    const MOST: usize = u32::MAX as usize;

    fn set(&self, units: Range<usize>) {
        let packed = (units.end as u64) << 32 | units.start as u64;
        self.0.store(packed, Ordering::Relaxed);
    }

    fn units(packed: u64) -> Range<u64> {
        packed & u64::from(u32::MAX)..packed >> 32
    }

    fn is_empty(&self) -> bool {
        Self::units(self.0.load(Ordering::Relaxed)).is_empty()
    }

    fn take_first(&self) -> Option<usize> {
        let without = |packed| (!Self::units(packed).is_empty()).then(|| packed + 1);
        let before = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, without);
        Some(Self::units(before.ok()?).start as usize)
    }

    fn take_last(&self) -> Option<usize> {
        let without = |packed| (!Self::units(packed).is_empty()).then(|| packed - (1 << 32));
        let before = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, without);
        Some(Self::units(before.ok()?).end as usize - 1)
    }
}

// SAFETY: `job` is the one field that is not so by itself. It is written only while the job is closed and nobody
// is inside, and read only by who is inside and has then seen it open; see `Pool::run`.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` is used only while `Pool::run`, which borrows what it points to, waits.
unsafe impl Send for Shared {}

/// A number of threads, the one that calls [`Pool::run`] among them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One computation at a time.
    leader: Mutex<()>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} threads", self.threads())
    }
}

impl Pool {
    /// A pool of so many threads, at least one. A thread that the system refuses is done without.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(None),
            shares: (0..threads.max(1)).map(|_| Share::default()).collect(),
            open: AtomicBool::new(false),
            inside: AtomicUsize::new(0),
            limit: AtomicUsize::new(threads.max(1)),
            asleep: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            ending: AtomicBool::new(false),
        });
        let workers = (1..threads).map_while(|number| {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name(format!("kernels-{number}"));
            thread.spawn(move || shared.serve(number)).ok()
        });
        Self {
            workers: workers.collect(),
            shared,
            leader: Mutex::new(()),
        }
    }

    /// Threads, the caller's among them.
    pub fn threads(&self) -> usize {
        1 + self.workers.len()
    }

    /// From the next [`Self::run`] on at most so many threads take part, the caller's among them: at least that one,
    /// at most all. Costs nothing to speak of, so a step may begin with it.
    pub fn limit(&self, threads: usize) {
        let limit = threads.clamp(1, self.threads());
        self.shared.limit.store(limit, Ordering::SeqCst);
    }

    /// Threads that take part, as [`Self::limit`] has it: to cut work by. All, to begin with.
    pub fn limited_threads(&self) -> usize {
        self.shared.limit.load(Ordering::SeqCst).min(self.threads())
    }

    /// Calls `work` once with every number below `units`, on the threads that may take part, and returns when all
    /// calls have.
    pub fn run(&self, units: usize, work: Work) {
        let threads = self.limited_threads();
        assert!(units <= Share::MOST);
        if units <= 1 || threads == 1 {
            return (0..units).for_each(work);
        }
        let _leading = self.leader.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: of the lifetime only; the pointer is not used after this function, see below.
        let work: *const (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(work) };
        // SAFETY: the job is closed, and was when the last call waited until nobody was inside. Who enters
        // since sees it closed and leaves without looking at it.
        unsafe { *shared.job.get() = Some(work) };
        for (number, share) in shared.shares.iter().enumerate() {
            let border = |number: usize| units * number.min(threads) / threads;
            share.set(border(number)..border(number + 1));
        }
        shared.open.store(true, Ordering::SeqCst);
        let closing = Closing(shared);
        for (worker, asleep) in self.workers[..threads - 1].iter().zip(&shared.asleep) {
            if asleep.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        shared.work(0);
        drop(closing);
    }
}

/// Closes the job and waits until nobody is inside, also where a unit panicked.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        // Either a worker that enters sees this, or its entering is seen below: both are sequentially consistent.
        self.0.open.store(false, Ordering::SeqCst);
        let mut looks = 0;
        while self.0.inside.load(Ordering::SeqCst) > 0 {
            looks += 1;
            match looks % LOOKS {
                0 => std::thread::yield_now(),
                _ => std::hint::spin_loop(),
            }
        }
    }
}

impl Shared {
    /// Takes units until there are none, as thread `number`. The caller leads, or is inside and has seen the job open.
    fn work(&self, number: usize) {
        // SAFETY: written before the job was opened, and not again before the caller is out.
        let Some(work) = (unsafe { *self.job.get() }) else {
            return;
        };
        // SAFETY: `Pool::run` holds the function until all are out.
        let work = unsafe { &*work };
        let (before, own_and_behind) = self.shares.split_at(number);
        if let Some((own, behind)) = own_and_behind.split_first() {
            std::iter::from_fn(|| own.take_first()).for_each(work);
            for other in behind.iter().chain(before) {
                std::iter::from_fn(|| other.take_last()).for_each(work);
            }
        }
    }

    /// The life of worker `number`.
    fn serve(&self, number: usize) {
        while !self.ending.load(Ordering::SeqCst) {
            self.await_work(number);
            self.inside.fetch_add(1, Ordering::SeqCst);
            let leaving = Leaving(self);
            if self.has_work_for(number) {
                self.work(number);
            }
            drop(leaving);
        }
    }

    /// Returns when there may be work, or the end has come.
    fn await_work(&self, number: usize) {
        let began = Instant::now();
        while number < self.limit.load(Ordering::SeqCst) && began.elapsed() < LOOK_FOR {
            for _ in 0..LOOKS {
                if self.is_wanted(number) {
                    return;
                }
                std::hint::spin_loop();
            }
        }
        // Either the job that is opened next sees this, or it is seen below: all three are sequentially consistent.
        let asleep = &self.asleep[number - 1];
        asleep.store(true, Ordering::SeqCst);
        while !self.is_wanted(number) {
            std::thread::park();
        }
        asleep.store(false, Ordering::SeqCst);
    }

    fn is_wanted(&self, number: usize) -> bool {
        self.ending.load(Ordering::SeqCst) || self.has_work_for(number)
    }

    /// The job is open, has units that nobody took, and this worker may join. The limit is looked at behind the job:
    /// who sees a job open sees the limit that was set before it.
    fn has_work_for(&self, number: usize) -> bool {
        self.open.load(Ordering::SeqCst)
            && number < self.limit.load(Ordering::SeqCst)
            && self.shares.iter().any(|share| !share.is_empty())
    }
}

/// A worker goes out, also where a unit panicked.
struct Leaving<'a>(&'a Shared);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker that panicked has said so.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Longest that a test waits for what other threads do.
    const PATIENCE: Duration = Duration::from_secs(60);

    #[track_caller]
    fn wait_until(is_so: impl Fn() -> bool) {
        let began = Instant::now();
        while !is_so() {
            assert!(began.elapsed() < PATIENCE, "this does not come about");
            std::thread::yield_now();
        }
    }

    fn assert_all_units_are_done_once(pool: &Pool, units: usize) {
        let counts: Vec<_> = (0..units).map(|_| AtomicUsize::new(0)).collect();
        pool.run(units, &|unit| {
            counts[unit].fetch_add(1, Ordering::Relaxed);
        });
        let counts = counts.into_iter().map(AtomicUsize::into_inner);
        assert_eq!(counts.collect::<Vec<_>>(), vec![1; units]);
    }

    /// The workers that take part in a job of units that take a while; the leader is not named.
    fn workers_of_a_job(pool: &Pool) -> BTreeSet<String> {
        let names = Mutex::new(BTreeSet::new());
        pool.run(50, &|_| {
            let began = Instant::now();
            while began.elapsed() < Duration::from_micros(20) {
                std::hint::spin_loop();
            }
            let thread = std::thread::current();
            let name = thread.name().unwrap_or_default().to_owned();
            names.lock().unwrap().insert(name);
        });
        let mut names = names.into_inner().unwrap();
        names.retain(|name| name.starts_with("kernels-"));
        names
    }

    fn sleepers(pool: &Pool) -> Vec<bool> {
        let asleep = pool.shared.asleep.iter();
        asleep.map(|asleep| asleep.load(Ordering::SeqCst)).collect()
    }

    #[test]
    fn every_unit_is_done_once() {
        for threads in [1, 2, 3, 5] {
            let pool = Pool::new(threads);
            for units in [0, 1, 2, 7, 100] {
                assert_all_units_are_done_once(&pool, units);
            }
        }
    }

    #[test]
    fn sleeping_workers_wake_up() {
        let pool = Pool::new(3);
        for _ in 0..20 {
            std::thread::sleep(2 * LOOK_FOR);
            let done = AtomicUsize::new(0);
            pool.run(50, &|_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 50);
        }
    }

    #[test]
    fn thousands_of_small_jobs_follow_one_another() {
        let pool = Pool::new(4);
        for round in 0..20_000 {
            let sum = AtomicUsize::new(0);
            pool.run(3, &|unit| {
                sum.fetch_add(unit + round, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 3 + 3 * round);
        }
    }

    #[test]
    fn every_unit_is_done_once_under_limits_that_change() {
        let pool = Pool::new(4);
        for round in 0..5_000 {
            // 0 and 5 are no numbers of threads that it has.
            let limit = (7 * round) % 6;
            pool.limit(limit);
            assert_eq!(pool.limited_threads(), limit.clamp(1, 4));
            assert_all_units_are_done_once(&pool, round % 20);
        }
    }

    #[test]
    fn workers_beyond_the_limit_take_no_unit_and_the_others_do() {
        let pool = Pool::new(4);
        for limit in [4, 1, 3, 2, 4, 2, 1] {
            pool.limit(limit);
            let allowed: BTreeSet<_> = (1..limit)
                .map(|number| format!("kernels-{number}"))
                .collect();
            let seen = Mutex::new(BTreeSet::new());
            wait_until(|| {
                let mut seen = seen.lock().unwrap();
                seen.append(&mut workers_of_a_job(&pool));
                assert!(
                    seen.is_subset(&allowed),
                    "{seen:?} under a limit of {limit}"
                );
                *seen == allowed
            });
            assert!(workers_of_a_job(&pool).is_subset(&allowed));
        }
    }

    #[test]
    fn workers_beyond_the_limit_sleep_while_others_work() {
        let pool = Pool::new(4);
        pool.limit(2);
        wait_until(|| sleepers(&pool)[1..] == [true, true]);
        for units in 0..1_000 {
            pool.run(units % 10, &|_| {});
            assert_eq!(sleepers(&pool)[1..], [true, true]);
        }
        pool.limit(4);
        wait_until(|| workers_of_a_job(&pool).contains("kernels-3"));
    }
}
