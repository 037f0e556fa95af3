//! A line of progress on standard error, for a person at a terminal.
//!
//! Under `mpirun` the ranks' standard error is a pipe to it even when a person is watching; so where the
//! launcher's own standard error can be looked up, that decides.

use crate::launcher;
use crate::log::tell;
use crate::pipeline::Seen;
use crate::wire::Load;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle, TermLike};
use std::fmt;
use std::io::{self, IsTerminal, Write};

/// Counts answers and tokens where somebody sees it; silent elsewhere.
pub struct Progress {
    bar: ProgressBar,
    answers: u64,
    /// What was seen before.
    seen: Seen,
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress {
    /// A progress for this process's standard error: silent where nobody would see it, and where the
    /// answers themselves appear on the terminal.
    pub fn new() -> Self {
        let target = if !reaches_terminal(Stream::Error) || reaches_terminal(Stream::Output) {
            ProgressDrawTarget::hidden()
        } else if io::stderr().is_terminal() {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::term_like_with_hz(Box::new(Forwarded), 4)
        };
        let bar = ProgressBar::with_draw_target(None, target);
        let style = ProgressStyle::with_template("{prefix} answered, {pos} tokens, {rate}{msg}");
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style.with_key("rate", write_rate));
        bar.set_prefix("0");
        Self {
            bar,
            answers: 0,
            seen: Seen::default(),
        }
    }

    /// Whether somebody sees it.
    pub fn is_shown(&self) -> bool {
        !self.bar.is_hidden()
    }

    /// Shows how busy the ranks have been since the last time.
    pub fn watch(&mut self, seen: Seen) {
        self.bar.set_message(busy_text(&self.seen, &seen));
        self.seen = seen;
    }

    /// One more token.
    pub fn token(&self) {
        self.bar.inc(1);
    }

    /// One more answer.
    pub fn answered(&mut self) {
        self.answers += 1;
        self.bar.set_prefix(self.answers.to_string());
    }

    /// A line for the user that stays, also where no progress is shown.
    pub fn warn(&self, text: &str) {
        self.bar.suspend(|| tell(&format!("mlx-pipe: {text}\n")));
    }

    /// Takes the line away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// Tokens a second.
fn write_rate(state: &ProgressState, line: &mut dyn fmt::Write) {
    // A line that cannot be written is not there to be seen.
    let _ = write!(line, "{:.1}/s", state.per_sec());
}

/// `; 16 in flight; busy 93 88 91 %, idle 9 %`: sequences, and each rank's share of the time since `before` that it
/// computed. Of many ranks only the least busy is named, for the line must not wrap.
fn busy_text(before: &Seen, now: &Seen) -> String {
    let elapsed_us = (now.active - before.active).as_micros() as f64;
    if elapsed_us == 0.0 {
        return String::new();
    }
    let nothing = Load::default();
    let share = |(rank, load): (usize, &Load)| {
        let before = before.loads.get(rank).unwrap_or(&nothing);
        let busy_us = load.busy_us.saturating_sub(before.busy_us) as f64;
        (100.0 * busy_us / elapsed_us).min(100.0)
    };
    let shares: Vec<f64> = now.loads.iter().enumerate().map(share).collect();
    let idle = 100.0 - shares.iter().sum::<f64>() / shares.len().max(1) as f64;
    let busy = match shares.len() {
        ..=6 => {
            let shares = shares.iter().map(|share| format!("{share:.0}"));
            shares.collect::<Vec<_>>().join(" ")
        }
        _ => {
            let least = shares.iter().copied().enumerate();
            let least = least.min_by(|a, b| a.1.total_cmp(&b.1));
            let (rank, share) = least.unwrap_or((0, 0.0));
            format!("at least {share:.0} (rank {rank})")
        }
    };
    format!(
        "; {} in flight; busy {busy} %, idle {idle:.0} %",
        now.sequences
    )
}

/// One of the standard streams, by its file descriptor.
#[derive(Debug, Clone, Copy)]
enum Stream {
    Output = 1,
    Error = 2,
}

/// Whether a person sees what is written there. Open MPI gives ranks a pseudo-terminal or a pipe whatever
/// its own streams are, so under `mpirun` those of the launcher count (known on Linux only).
fn reaches_terminal(stream: Stream) -> bool {
    if !launcher::is_launched() {
        return match stream {
            Stream::Output => io::stdout().is_terminal(),
            Stream::Error => io::stderr().is_terminal(),
        };
    }
    // SAFETY: `getppid` has no preconditions.
    let launcher = unsafe { libc::getppid() };
    std::fs::read_link(format!("/proc/{launcher}/fd/{}", stream as i32))
        .is_ok_and(|target| target.starts_with("/dev/pts") || target.starts_with("/dev/tty"))
}

/// Standard error as `mpirun` forwards it: bytes go through unchanged, sizes cannot be asked.
#[derive(Debug)]
struct Forwarded;

impl TermLike for Forwarded {
    fn width(&self) -> u16 {
        80
    }

    fn move_cursor_up(&self, lines: usize) -> io::Result<()> {
        self.control(lines, 'A')
    }

    fn move_cursor_down(&self, lines: usize) -> io::Result<()> {
        self.control(lines, 'B')
    }

    fn move_cursor_right(&self, columns: usize) -> io::Result<()> {
        self.control(columns, 'C')
    }

    fn move_cursor_left(&self, columns: usize) -> io::Result<()> {
        self.control(columns, 'D')
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.write_str(&format!("{text}\r\n"))
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        io::stderr().write_all(text.as_bytes())
    }

    fn clear_line(&self) -> io::Result<()> {
        self.write_str("\r\x1b[2K")
    }

    fn flush(&self) -> io::Result<()> {
        io::stderr().flush()
    }
}

impl Forwarded {
    /// An ANSI cursor movement; none for a count of 0, which terminals take for 1.
    fn control(&self, count: usize, letter: char) -> io::Result<()> {
        match count {
            0 => Ok(()),
            count => self.write_str(&format!("\x1b[{count}{letter}")),
        }
    }
}
