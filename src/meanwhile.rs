//! Something done now and then while the calling thread computes: messages that need this process's help to move
//! go on moving.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Rounds without work after which the thread sleeps until it is called.
const IDLE_ROUNDS: u32 = 20;

/// A pause is at most this part of the time that the computation has taken already: what is late is late by little
/// against it, and the core that computes is left alone.
const PAUSE_PART: u32 = 16;
/// And never longer than this, since the next computation may begin during it.
const LONGEST_PAUSE: Duration = Duration::from_millis(8);

/// A thread that works while another one computes.
#[derive(Debug)]
pub struct Meanwhile {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    is_computing: AtomicBool,
    /// Computations so far.
    computations: AtomicU64,
    is_asleep: AtomicBool,
    is_ending: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Meanwhile {
    /// A thread that calls `work` after every `pause` of a computation, less often the longer it takes.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn new(pause: Duration, work: impl FnMut() + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let thread = {
            let shared = Arc::clone(&shared);
            let builder = thread::Builder::new().name("meanwhile".into());
            builder.spawn(move || shared.serve(pause, work))?
        };
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Computes. When it returns, the last call of `work` may still be under way.
    pub fn during<R>(&self, compute: impl FnOnce() -> R) -> R {
        let shared = &*self.shared;
        shared.computations.fetch_add(1, Ordering::SeqCst);
        shared.is_computing.store(true, Ordering::SeqCst);
        let _end = OnDrop(|| shared.is_computing.store(false, Ordering::SeqCst));
        if shared.is_asleep.load(Ordering::SeqCst) {
            shared.call();
        }
        compute()
    }
}

/// Calls a function when it goes, also where a computation panicked.
struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        self.0();
    }
}

impl Shared {
    fn call(&self) {
        let _lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.wake.notify_all();
    }

    fn serve(&self, pause: Duration, mut work: impl FnMut()) {
        let mut idle_rounds = 0;
        let (mut computation, mut began) = (0, Instant::now());
        while !self.is_ending.load(Ordering::SeqCst) {
            if idle_rounds > IDLE_ROUNDS {
                self.sleep();
                idle_rounds = 0;
            }
            let current = self.computations.load(Ordering::SeqCst);
            if computation != current {
                (computation, began) = (current, Instant::now());
            }
            let is_computing = || self.is_computing.load(Ordering::SeqCst);
            let longer = match is_computing() {
                true => (began.elapsed() / PAUSE_PART).min(LONGEST_PAUSE),
                false => Duration::ZERO,
            };
            thread::sleep(pause.max(longer));
            if is_computing() {
                work();
                idle_rounds = 0;
            } else {
                idle_rounds += 1;
            }
        }
    }

    /// Returns once there is a computation, or the end.
    fn sleep(&self) {
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        // Who begins to compute either sees this, or is seen below: both are sequentially consistent.
        self.is_asleep.store(true, Ordering::SeqCst);
        let is_called =
            || self.is_computing.load(Ordering::SeqCst) || self.is_ending.load(Ordering::SeqCst);
        while !is_called() {
            lock = self.wake.wait(lock).unwrap_or_else(PoisonError::into_inner);
        }
        self.is_asleep.store(false, Ordering::SeqCst);
    }
}

impl Drop for Meanwhile {
    fn drop(&mut self) {
        self.shared.is_ending.store(true, Ordering::SeqCst);
        self.shared.call();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::time::Instant;

    const PAUSE: Duration = Duration::from_micros(50);

    /// Waits until `condition` holds; the longest that a test waits is 20 s.
    fn wait_until(condition: impl Fn() -> bool) {
        let began = Instant::now();
        while !condition() {
            assert!(began.elapsed() < Duration::from_secs(20));
            thread::yield_now();
        }
    }

    #[test]
    fn work_is_done_during_computations_and_at_no_other_time() {
        let calls = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&calls);
        let meanwhile = Meanwhile::new(PAUSE, move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        let meanwhile = meanwhile.unwrap();
        for _ in 0..5 {
            let before = calls.load(Ordering::SeqCst);
            let result = meanwhile.during(|| {
                wait_until(|| calls.load(Ordering::SeqCst) >= before + 3);
                7
            });
            assert_eq!(result, 7);
            // It goes to sleep, and is woken by the next computation.
            wait_until(|| meanwhile.shared.is_asleep.load(Ordering::SeqCst));
            let asleep = calls.load(Ordering::SeqCst);
            thread::sleep(3 * PAUSE);
            assert_eq!(calls.load(Ordering::SeqCst), asleep);
        }
    }

    #[test]
    fn it_ends_while_asleep_and_while_awake() {
        let asleep = Meanwhile::new(PAUSE, || {}).unwrap();
        wait_until(|| asleep.shared.is_asleep.load(Ordering::SeqCst));
        drop(asleep);
        let awake = Meanwhile::new(PAUSE, || {}).unwrap();
        awake.during(|| ());
        drop(awake);
    }
}
