//! Loading, ready, draining, and the two ends: what the server says to new requests, and to those under way.

use super::Shared;
use crate::wait;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// How often signals are looked for.
const SIGNAL_POLL: Duration = Duration::from_millis(50);

/// Where the server stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The ranks load; nothing can be answered yet.
    Loading,
    /// Requests are answered.
    Ready,
    /// Nothing new is taken; what is under way is finished.
    Draining,
    /// The run has failed, and why.
    Failed(&'static str),
    /// The loop has ended in order.
    Ended,
}

/// The phase, and the connections that must end with it.
pub struct Life {
    phase: watch::Sender<Phase>,
    /// Open connections.
    open: watch::Sender<usize>,
}

/// An open connection; closed when it is dropped.
pub struct Open(watch::Sender<usize>);

impl Life {
    /// Loading, nobody connected.
    pub fn new() -> Self {
        Self {
            phase: watch::Sender::new(Phase::Loading),
            open: watch::Sender::new(0),
        }
    }

    /// Where the server stands.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// To wait for another phase.
    pub fn watch(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// The ranks have loaded.
    pub fn become_ready(&self) {
        self.change(|phase| phase == Phase::Loading, Phase::Ready);
    }

    /// Nothing new is taken from now on.
    pub fn drain(&self) {
        self.change(|phase| phase == Phase::Ready, Phase::Draining);
    }

    /// The end; the first one told counts.
    pub fn end(&self, end: Phase) {
        self.change(|phase| !phase.is_end(), end);
    }

    fn change(&self, from: impl Fn(Phase) -> bool, to: Phase) {
        self.phase.send_if_modified(|phase| {
            let changes = from(*phase);
            if changes {
                *phase = to;
            }
            changes
        });
    }

    /// One more connection.
    pub fn open(&self) -> Open {
        self.open.send_modify(|count| *count += 1);
        Open(self.open.clone())
    }

    /// Connections now.
    pub fn open_count(&self) -> usize {
        *self.open.borrow()
    }

    /// Waits until there is no connection.
    pub async fn all_closed(&self) {
        self.fewer_open(1).await;
    }

    /// Waits until there are fewer connections than this.
    pub async fn fewer_open(&self, than: usize) {
        let mut open = self.open.subscribe();
        // It fails only if the sender is gone, which is `self`.
        let _ = open.wait_for(|count| *count < than).await;
    }
}

impl Phase {
    /// Whether nothing follows.
    pub fn is_end(self) -> bool {
        matches!(self, Self::Failed(_) | Self::Ended)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// Tells clients of a signal also while the main thread computes: a launcher kills soon after.
pub async fn watch_signals(shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(SIGNAL_POLL).await;
        if wait::check_signals().is_err() {
            let why = "the server was told to end at once: by its launcher, as where a rank has died, or by a second signal";
            return shared.life.end(Phase::Failed(why));
        }
        if wait::is_draining() {
            shared.life.drain();
        }
    }
}
