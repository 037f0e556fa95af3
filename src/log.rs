//! What is said on standard error: one line of log (time since the process started, level, rank and host,
//! message), and everything else through [`tell`].

use std::fmt;
use std::io::Write;
use std::time::Instant;
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Writes to standard error. That nobody can read it is no reason to fail, so errors are passed over.
pub fn tell(text: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes());
    let _ = stderr.flush();
}

/// Warnings to standard error, for a command that is no run and has no ranks.
pub fn warn_on_stderr() {
    let _ = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .without_time()
        .try_init();
}

/// Writes every event behind the place that it comes from.
#[derive(Debug)]
pub struct RankFormat {
    place: String,
    started: Instant,
}

impl RankFormat {
    /// `place`: rank and host; `started`: the beginning of its time.
    pub fn new(place: String, started: Instant) -> Self {
        Self { place, started }
    }
}

impl<S, N> FormatEvent<S, N> for RankFormat
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    N: for<'writer> FormatFields<'writer> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write!(
            writer,
            "{:9.3} s {} {}: ",
            self.started.elapsed().as_secs_f64(),
            event.metadata().level(),
            self.place
        )?;
        context.format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}
