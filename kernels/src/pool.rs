//! Threads that share the units of a computation with the thread that asks for it.
//!
//! Within a step one computation follows the other after microseconds, so a worker without work looks for
//! more for a short while; then it sleeps, and an idle program takes no processor time. A worker that comes late, because its
//! core was taken, is not waited for: what there was to do, the others have done.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
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
    /// The next unit to take, and how many there are.
    next: AtomicUsize,
    units: AtomicUsize,
    /// The job may be worked on.
    open: AtomicBool,
    /// Workers that look at the job.
    inside: AtomicUsize,
    sleepers: AtomicUsize,
    ending: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
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
            next: AtomicUsize::new(0),
            units: AtomicUsize::new(0),
            open: AtomicBool::new(false),
            inside: AtomicUsize::new(0),
            sleepers: AtomicUsize::new(0),
            ending: AtomicBool::new(false),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        });
        let workers = (1..threads).map_while(|number| {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name(format!("kernels-{number}"));
            thread.spawn(move || shared.serve()).ok()
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

    /// Calls `work` once with every number below `units`, on all threads, and returns when all calls have.
    pub fn run(&self, units: usize, work: Work) {
        if units <= 1 || self.workers.is_empty() {
            return (0..units).for_each(work);
        }
        let _leading = self.leader.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: of the lifetime only; the pointer is not used after this function, see below.
        let work: *const (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(work) };
        // SAFETY: the job is closed, and was when the last call waited until nobody was inside. Who enters
        // since sees it closed and leaves without looking at it.
        unsafe { *shared.job.get() = Some(work) };
        shared.units.store(units, Ordering::Relaxed);
        shared.next.store(0, Ordering::Relaxed);
        shared.open.store(true, Ordering::SeqCst);
        let closing = Closing(shared);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _lock = shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }
        shared.work();
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
    /// Takes units until there are none. The caller leads, or is inside and has seen the job open.
    fn work(&self) {
        // SAFETY: written before the job was opened, and not again before the caller is out.
        let Some(work) = (unsafe { *self.job.get() }) else {
            return;
        };
        // SAFETY: `Pool::run` holds the function until all are out.
        let work = unsafe { &*work };
        let units = self.units.load(Ordering::Relaxed);
        loop {
            let unit = self.next.fetch_add(1, Ordering::Relaxed);
            if unit >= units {
                return;
            }
            work(unit);
        }
    }

    /// A worker's life.
    fn serve(&self) {
        while !self.ending.load(Ordering::SeqCst) {
            self.await_work();
            self.inside.fetch_add(1, Ordering::SeqCst);
            let leaving = Leaving(self);
            if self.open.load(Ordering::SeqCst) {
                self.work();
            }
            drop(leaving);
        }
    }

    /// Returns when there may be work.
    fn await_work(&self) {
        let began = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if self.has_work() {
                    return;
                }
                std::hint::spin_loop();
            }
            if began.elapsed() > LOOK_FOR {
                break;
            }
        }
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while !self.has_work() {
            lock = self.wake.wait(lock).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// The job is open and has units that nobody took, or the end has come.
    fn has_work(&self) -> bool {
        let has_units = || self.next.load(Ordering::Relaxed) < self.units.load(Ordering::Relaxed);
        self.ending.load(Ordering::SeqCst) || self.open.load(Ordering::SeqCst) && has_units()
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
        {
            let _lock = self
                .shared
                .lock
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker that panicked has said so.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_is_done_once() {
        for threads in [1, 2, 3, 5] {
            let pool = Pool::new(threads);
            for units in [0, 1, 2, 7, 100] {
                let counts: Vec<_> = (0..units).map(|_| AtomicUsize::new(0)).collect();
                pool.run(units, &|unit| {
                    counts[unit].fetch_add(1, Ordering::Relaxed);
                });
                assert!(
                    counts
                        .iter()
                        .all(|count| count.load(Ordering::Relaxed) == 1)
                );
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
}
