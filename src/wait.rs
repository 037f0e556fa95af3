//! Waiting that burns no core. MPI's blocking calls spin at full load; on a machine that shares its
//! cores, or its power, between ranks this slows the ones that compute. So nothing here blocks inside
//! MPI: a condition is polled, at first at once, then after yielding (for longer where cores are many), then after pauses
//! that are a small part of the time waited so far, so that what is noticed late is late by little. Between ranks of one
//! host a bell ends a pause ([`crate::bell`]); where all are of one host, pauses are long.

use crate::log::tell;
use anyhow::{Result, bail};
use signal_hook::iterator::SignalsInfo;
use signal_hook::iterator::exfiltrator::WithOrigin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Polls before the first pause: about what a message between processes of one host takes.
const EAGER_POLLS: u32 = 64;
/// How long there are no pauses where cores are many: longer than a step of one token of a GPU, to which the shortest
/// sleep would add a good part.
const NO_PAUSE_WITH_CORES: Duration = Duration::from_millis(3);
/// A pause is this part of the time waited.
const PAUSE_PART: u32 = 32;
/// Shortest pause: what a system can sleep.
const SHORTEST_PAUSE: Duration = Duration::from_micros(10);
/// Longest pause while an answer is due.
const LONGEST_PAUSE: Duration = Duration::from_micros(200);
/// The pause once nothing has happened for [`IDLE_AFTER`].
const IDLE_PAUSE: Duration = Duration::from_millis(4);
/// The same where everything that is waited for rings a bell: there is nothing to see before it rings. Since one that is
/// not heard must not be waited for, and MPI wants to be called, pauses end all the same.
const POLLS_UNRUNG: u32 = 2;
const SHORTEST_PAUSE_UNRUNG: Duration = Duration::from_millis(1);
const LONGEST_PAUSE_UNRUNG: Duration = Duration::from_millis(2);
const IDLE_PAUSE_UNRUNG: Duration = Duration::from_millis(20);
/// Once it has rung, what was sent is there, or in a moment.
const POLLS_RUNG: u32 = 8;
const PAUSE_PART_WITH_BELL: u32 = 4;
/// When a wait counts as idle.
const IDLE_AFTER: Duration = Duration::from_millis(500);

/// What signals do: one of [`Signals`], as a number.
static MEANING: AtomicU8 = AtomicU8::new(Signals::End as u8);
/// Whether a signal has asked for an end in order.
static IS_DRAINING: AtomicBool = AtomicBool::new(false);
/// The signal that asked this process to end; 0 for none.
static SIGNAL: AtomicUsize = AtomicUsize::new(0);
/// Whether it was sent by the parent process, which under `mpirun` is the launcher.
static FROM_PARENT: AtomicBool = AtomicBool::new(false);

/// What SIGINT, SIGTERM and SIGUSR1 mean to this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Signals {
    /// Each of them ends every wait.
    End,
    /// SIGUSR1 means nothing: it is another rank's business.
    EndButUsr1,
    /// The first asks for an end in order ([`is_draining`]), the second ends every wait.
    Drain,
    /// The same, but SIGINT and SIGTERM of the parent process end every wait: a launcher that sends them kills
    /// soon after.
    DrainUnlessLauncher,
}

/// Says what signals mean from now on; before that, [`Signals::End`].
pub fn take_signals_as(meaning: Signals) {
    MEANING.store(meaning as u8, Ordering::SeqCst);
}

/// Whether a signal has asked for an end in order.
pub fn is_draining() -> bool {
    IS_DRAINING.load(Ordering::SeqCst)
}

/// Whether a signal does not end every wait: it is the first that asks for an end in order, or means nothing.
fn is_no_end(signal: i32, from_parent: bool) -> bool {
    let meaning = MEANING.load(Ordering::SeqCst);
    let is = |other: Signals| meaning == other as u8;
    let is_usr1 = signal == signal_hook::consts::SIGUSR1;
    match is_usr1 {
        true if is(Signals::EndButUsr1) => true,
        false if is(Signals::DrainUnlessLauncher) && from_parent => false,
        _ if is(Signals::Drain) || is(Signals::DrainUnlessLauncher) => {
            signal != signal_hook::consts::SIGHUP && !IS_DRAINING.swap(true, Ordering::SeqCst)
        }
        _ => false,
    }
}

/// This process was asked to end.
#[derive(Debug, thiserror::Error)]
#[error("ended by signal {signal}")]
pub struct Interrupted {
    /// The signal.
    pub signal: usize,
    /// The parent process sent it: under `mpirun`, the launcher, which is ending the job and says why
    /// itself.
    pub from_parent: bool,
}

/// How long a rank may go on computing after it was asked to end.
const END_WITHIN: Duration = Duration::from_secs(3);

/// Makes Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 end every wait with [`Interrupted`], unless [`take_signals_as`] says otherwise. A rank that is in the middle of a
/// long computation is ended by force after three seconds, or at the second signal; its launcher then
/// ends the others.
///
/// # Errors
/// The system refuses a handler.
pub fn end_on_signals() -> Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
    let mut signals = SignalsInfo::<WithOrigin>::new([SIGINT, SIGTERM, SIGHUP, SIGUSR1])?;
    thread::spawn(move || {
        for origin in signals.forever() {
            let sender = origin.process.map(|process| process.pid);
            // SAFETY: `getppid` has no preconditions.
            let parent = unsafe { libc::getppid() };
            let from_parent = sender == Some(parent);
            let signal = origin.signal;
            if is_no_end(signal, from_parent) {
                continue;
            }
            FROM_PARENT.store(from_parent, Ordering::SeqCst);
            if SIGNAL.swap(signal as usize, Ordering::SeqCst) != 0 {
                end_now(128 + signal);
            }
            thread::spawn(move || {
                thread::sleep(END_WITHIN);
                tell(&format!(
                    "mlx-pipe: ended by signal {signal} in the middle of a computation\n"
                ));
                end_now(128 + signal)
            });
        }
    });
    Ok(())
}

/// Whether there are so many cores that looking often takes none from who computes.
static HAS_CORES: AtomicBool = AtomicBool::new(false);

/// Lets waits begin with looking only. For hosts with cores to spare: elsewhere who looks takes time from who computes.
pub fn look_often() {
    HAS_CORES.store(true, Ordering::Relaxed);
}

/// Lets this thread, and those that it starts later, sleep as briefly as they ask to: Linux lets sleeps last 50 us longer
/// unless told otherwise.
pub fn sleep_exactly() {
    #[cfg(target_os = "linux")]
    {
        let nanoseconds: libc::c_ulong = 1_000;
        // SAFETY: sets a number of the calling thread. Where it is refused, sleeps are longer and nothing else.
        let _ = unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, nanoseconds) };
    }
}

/// Whether [`look_often`] was called.
pub fn looks_often() -> bool {
    HAS_CORES.load(Ordering::Relaxed)
}

/// Ends the process at once: no destructors, which might wait for a computation of another thread.
pub fn end_now(code: i32) -> ! {
    // SAFETY: `_exit` has no preconditions.
    unsafe { libc::_exit(code) }
}

/// An error if a signal asked this process to end.
///
/// # Errors
/// [`Interrupted`].
pub fn check_signals() -> Result<(), Interrupted> {
    match SIGNAL.load(Ordering::SeqCst) {
        0 => Ok(()),
        signal => Err(Interrupted {
            signal,
            from_parent: FROM_PARENT.load(Ordering::SeqCst),
        }),
    }
}

/// Where pauses are spent.
pub trait Rest {
    /// Sleeps for a pause, or until there may be something to see; whether there may.
    fn rest(&mut self, pause: Duration) -> bool {
        thread::sleep(pause);
        false
    }

    /// Whether everything that is waited for ends a rest.
    fn is_rung(&self) -> bool {
        false
    }
}

/// Pauses that last.
#[derive(Debug)]
pub struct Asleep;

impl Rest for Asleep {}

/// Grows the pauses of one wait.
#[derive(Debug)]
pub struct Patience {
    /// Since the wait began, or something may have been to see.
    polls: u32,
    looking_since: Instant,
    since: Instant,
    /// There may have been something to see since the wait began.
    has_rung: bool,
    /// The next pause is left out.
    looks_again: bool,
}

impl Patience {
    /// A wait that begins now.
    pub fn new() -> Self {
        let now = Instant::now();
        Self {
            polls: 0,
            looking_since: now,
            since: now,
            has_rung: false,
            looks_again: false,
        }
    }

    /// Something happened: the wait begins again.
    pub fn reset(&mut self) {
        *self = Self::new();
    }

    /// How long nothing has happened.
    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }

    /// Lets time pass after a poll that found nothing; longer where nothing has happened for long.
    ///
    /// # Errors
    /// [`Interrupted`] once a signal came.
    pub fn pause(&mut self, place: &mut impl Rest) -> Result<(), Interrupted> {
        let is_idle = self.elapsed() > IDLE_AFTER;
        // Open MPI looks among what has arrived before it takes in what has come since. So the first look after a long
        // pause sees nothing yet, and the second must not be another pause away.
        self.looks_again = is_idle && !self.looks_again;
        match (is_idle, self.looks_again) {
            (true, true) => check_signals(),
            (true, false) if place.is_rung() => self.pause_up_to(IDLE_PAUSE_UNRUNG, place),
            (true, false) => self.pause_up_to(IDLE_PAUSE, place),
            (false, _) => self.pause_for_answer(place),
        }
    }

    /// As [`Self::pause`] while an answer is known to be due: never long, however long it takes.
    ///
    /// # Errors
    /// [`Interrupted`] once a signal came.
    pub fn pause_for_answer(&mut self, place: &mut impl Rest) -> Result<(), Interrupted> {
        match place.is_rung() {
            true => self.pause_up_to(LONGEST_PAUSE_UNRUNG, place),
            false => self.pause_up_to(LONGEST_PAUSE, place),
        }
    }

    fn pause_up_to(&mut self, longest: Duration, place: &mut impl Rest) -> Result<(), Interrupted> {
        self.polls = self.polls.saturating_add(1);
        check_signals()?;
        let (eager_polls, yields, part, shortest) = match (place.is_rung(), self.has_rung) {
            (false, _) => (EAGER_POLLS, EAGER_POLLS, PAUSE_PART, SHORTEST_PAUSE),
            (true, false) => (POLLS_UNRUNG, 0, PAUSE_PART_WITH_BELL, SHORTEST_PAUSE_UNRUNG),
            (true, true) => (POLLS_RUNG, 0, PAUSE_PART_WITH_BELL, SHORTEST_PAUSE),
        };
        let looking = self.looking_since.elapsed();
        let only_looks = looks_often() && looking < NO_PAUSE_WITH_CORES;
        if self.polls < eager_polls {
            std::hint::spin_loop();
        } else if self.polls < eager_polls + yields || only_looks {
            thread::yield_now();
        } else if place.rest((looking / part).clamp(shortest, longest)) {
            (self.polls, self.looking_since) = (0, Instant::now());
            self.has_rung = true;
        }
        Ok(())
    }
}

impl Default for Patience {
    fn default() -> Self {
        Self::new()
    }
}

/// Polls until there is something, for at most `limit` (`None`: for as long as it takes).
///
/// # Errors
/// What the poll fails with, a signal, or the limit; `what` names the thing waited for.
pub fn until<T>(
    what: &str,
    limit: Option<Duration>,
    mut poll: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let mut patience = Patience::new();
    loop {
        if let Some(found) = poll()? {
            return Ok(found);
        }
        if limit.is_some_and(|limit| patience.elapsed() > limit) {
            bail!(
                "waited {:.0} s for {what}",
                patience.elapsed().as_secs_f64()
            );
        }
        patience.pause(&mut Asleep)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_with_what_the_poll_finds() {
        let mut polls = 0;
        let found = until("a thing", None, || {
            polls += 1;
            Ok((polls == 200).then_some(polls))
        });
        assert_eq!(found.unwrap(), 200);
    }

    #[test]
    fn a_wait_over_its_limit_names_what_it_waited_for() {
        let waited = until::<()>("the moon", Some(Duration::from_millis(1)), || Ok(None));
        assert!(waited.unwrap_err().to_string().contains("the moon"));
    }

    /// Notes the pauses, and rings when it is told to.
    struct Noted {
        pauses: Vec<Option<Duration>>,
        is_rung: bool,
        rings_after: usize,
    }

    impl Rest for Noted {
        fn rest(&mut self, pause: Duration) -> bool {
            *self.pauses.last_mut().unwrap() = Some(pause);
            self.pauses.iter().flatten().count() == self.rings_after
        }

        fn is_rung(&self) -> bool {
            self.is_rung
        }
    }

    /// The pauses of somebody who has waited for so long already; `None` where there is none.
    fn pauses(waited: Duration, is_rung: bool, rings_after: usize) -> Vec<Option<Duration>> {
        let since = Instant::now().checked_sub(waited).unwrap();
        let mut patience = Patience {
            polls: 1000,
            looking_since: since,
            since,
            has_rung: false,
            looks_again: false,
        };
        let mut noted = Noted {
            pauses: Vec::new(),
            is_rung,
            rings_after,
        };
        for _ in 0..16 {
            noted.pauses.push(None);
            patience.pause(&mut noted).unwrap();
        }
        noted.pauses
    }

    #[test]
    fn who_is_idle_looks_twice_between_pauses() {
        let idle = 2 * IDLE_AFTER;
        assert_eq!(pauses(idle, false, 0), [None, Some(IDLE_PAUSE)].repeat(8));
        assert_eq!(
            pauses(idle, true, 0),
            [None, Some(IDLE_PAUSE_UNRUNG)].repeat(8)
        );
    }

    #[test]
    fn pauses_grow_to_their_bound_and_no_further() {
        let first = |waited, is_rung| pauses(waited, is_rung, 0)[0].unwrap();
        let waited = Duration::from_micros(3200);
        assert_eq!(first(Duration::ZERO, false), SHORTEST_PAUSE);
        assert!((waited / PAUSE_PART..LONGEST_PAUSE).contains(&first(waited, false)));
        assert!(
            (waited / PAUSE_PART_WITH_BELL..LONGEST_PAUSE_UNRUNG).contains(&first(waited, true))
        );
        assert_eq!(first(IDLE_AFTER / 2, false), LONGEST_PAUSE);
        assert_eq!(first(IDLE_AFTER / 2, true), LONGEST_PAUSE_UNRUNG);
    }

    #[test]
    fn who_is_rung_looks_at_once_and_rests_briefly_again() {
        let pauses = pauses(IDLE_AFTER / 2, true, 2);
        let long = Some(LONGEST_PAUSE_UNRUNG);
        assert_eq!(pauses[..2], [long, long]);
        let looks = pauses[2..].iter().take_while(|pause| pause.is_none());
        let looks = looks.count();
        assert!(looks >= 2, "{pauses:?}");
        assert!(pauses[2 + looks].unwrap() < LONGEST_PAUSE_UNRUNG / 2);
    }
}
