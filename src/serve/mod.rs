//! The server: the OpenAI API over HTTP on rank 0, as another [`Feed`](crate::pipeline::Feed) of the loop that
//! standard input feeds. The loop, the schedule and the other ranks do not know the difference.
//!
//! HTTP lives on threads of its own, which never touch MPI or arrays; the main thread never touches a socket. Between
//! them are bounded channels: jobs one way, the pieces of answers the other.
//!
//! | file | noun |
//! |---|---|
//! | `mod.rs` | [`Server`]: started before the model is loaded, ended after the last answer |
//! | `http.rs` | the routes, and what goes wrong on them |
//! | `connections.rs` | sockets: how many, how slow, how long idle |
//! | `guard.rs` | who may ask: keys, hosts, origins |
//! | `api.rs` | a request's way from its body to its answer |
//! | `answers.rs` | `Job` and its events: what passes between HTTP and the loop |
//! | `feed.rs` | [`HttpFeed`]: the loop's side of it |
//! | `openai.rs` | the shapes of answers, whole and in pieces |
//! | `tools.rs` | `ToolParser`: calls of tools in the text of an answer |
//! | `life.rs` | loading, ready, draining, failed |
//! | `status.rs` | what the pipeline is doing, for the page and `/metrics` |
//! | `metrics.rs` | counters and histograms, as Prometheus reads them |
//! | `page/` | the page at `/` |

mod answers;
mod api;
mod connections;
mod feed;
mod guard;
mod http;
mod life;
mod metrics;
mod openai;
mod status;
#[cfg(test)]
mod tests;
mod tools;

pub use feed::HttpFeed;
pub use status::{About, RankAbout};

use crate::cli::ServerOptions;
use crate::log::tell;
use crate::request::Sampling;
use crate::sequence::Rules;
use answers::Job;
use anyhow::{Context, Result};
use guard::Guard;
use life::{Life, Phase};
use metrics::Metrics;
use status::{Now, Status};
use std::net::SocketAddr;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;

/// Threads for sockets and JSON. The cores are the ranks'; these mostly sleep.
const WORKER_THREADS: usize = 2;
/// Threads that turn text into tokens, which may take long.
const TOKENIZING_THREADS: usize = 2;
/// Bytes of request bodies that may be held at a time, or one of the longest.
const BODY_BYTES: usize = 64 << 20;
/// How long clients may take to read what was said last, once the loop has ended.
const FAREWELL: Duration = Duration::from_secs(5);
/// The same after a failure: the launcher kills this process soon.
const HASTY_FAREWELL: Duration = Duration::from_millis(500);

/// A server that listens.
pub struct Server {
    shared: Arc<Shared>,
    /// `None` once ended.
    runtime: Option<Runtime>,
}

/// What all parts of the server know.
struct Shared {
    options: ServerOptions,
    addr: SocketAddr,
    guard: Guard,
    life: Life,
    status: Status,
    metrics: Metrics,
    /// Set once the ranks have loaded.
    ready: OnceLock<Ready>,
    /// One permit for every byte of request bodies that may be held at a time.
    body_bytes: Arc<Semaphore>,
    cancelled: answers::Cancelled,
    next_key: AtomicU64,
    started: Instant,
    started_s: u64,
}

/// What is known once the ranks have loaded.
struct Ready {
    rules: &'static Rules,
    defaults: Sampling,
    about: About,
    jobs: SyncSender<Job>,
    /// One permit for every sequence that may be under way or wait.
    places: Arc<Semaphore>,
    /// How many permits there are.
    place_count: usize,
}

impl Shared {
    /// What the pipeline is doing, and how many sequences are under way and wait for their turn.
    fn now(&self) -> (Now, usize, usize) {
        let taken = |ready: &Ready| ready.place_count - ready.places.available_permits();
        let taken = self.ready.get().map_or(0, taken);
        // The loop tells with every step, of caches less often; some may have ended since.
        let running = self.status.running().min(taken);
        let mut now = self.status.now(Instant::now());
        if running == 0 {
            now.kv_used_tokens = 0;
        }
        (now, running, taken - running)
    }
}

impl Server {
    /// Listens, and answers that the model is loading. `now_s`: seconds since 1970.
    ///
    /// # Errors
    /// An address that cannot be listened on, or a key file that cannot be read or has no key.
    pub fn start(options: &ServerOptions, now_s: u64) -> Result<Self> {
        let guard = Guard::new(options)?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(WORKER_THREADS)
            .max_blocking_threads(TOKENIZING_THREADS)
            .thread_name("serve")
            .enable_all()
            .build()
            .context("starting the threads of the server")?;
        let listener = {
            let _in_runtime = runtime.enter();
            connections::listen(options.addr)
        };
        let listener = listener
            .with_context(|| format!("listening on {}; choose another --addr", options.addr))?;
        let addr = listener.local_addr()?;
        if !addr.ip().is_loopback() && !guard.has_keys() {
            tell(&format!(
                "mlx-pipe: warning: {addr} can be reached from other machines and needs no key; give --api-key-file\n"
            ));
        }
        let shared = Arc::new(Shared {
            options: options.clone(),
            addr,
            guard,
            life: Life::new(),
            status: Status::default(),
            metrics: Metrics::default(),
            ready: OnceLock::new(),
            body_bytes: Arc::new(Semaphore::new(BODY_BYTES.max(options.max_body as usize))),
            cancelled: answers::Cancelled::default(),
            next_key: AtomicU64::new(0),
            started: Instant::now(),
            started_s: now_s,
        });
        runtime.spawn(connections::accept(listener, Arc::clone(&shared)));
        runtime.spawn(life::watch_signals(Arc::clone(&shared)));
        tell(&format!("mlx-pipe: listening on http://{addr}, loading\n"));
        Ok(Self {
            shared,
            runtime: Some(runtime),
        })
    }

    /// From now on requests are answered, by the loop that takes the feed.
    pub fn ready(&self, rules: Rules, defaults: Sampling, about: About) -> HttpFeed {
        let shared = &self.shared;
        let place_count = about.sequences + shared.options.max_queue as usize;
        let (sender, receiver) = mpsc::sync_channel(place_count);
        // As long as the process: the sequences on both sides refer to it.
        let rules: &'static Rules = Box::leak(Box::new(rules));
        let ready = Ready {
            rules,
            defaults,
            about,
            jobs: sender,
            places: Arc::new(Semaphore::new(place_count)),
            place_count,
        };
        let is_first = shared.ready.set(ready).is_ok();
        debug_assert!(is_first, "a server becomes ready once");
        shared.life.become_ready();
        tell(&format!("mlx-pipe: ready on http://{}\n", shared.addr));
        HttpFeed::new(receiver, Arc::clone(shared))
    }

    /// Says to whoever waits that the run has failed, and ends.
    pub fn fail(&mut self) {
        self.end(
            Phase::Failed("a rank of the pipeline has failed or was told to end; the server ends"),
            HASTY_FAREWELL,
        );
    }

    /// Ends after the loop has: what was answered is still delivered.
    pub fn finish(&mut self) {
        self.end(Phase::Ended, FAREWELL);
    }

    fn end(&mut self, phase: Phase, limit: Duration) {
        let Some(runtime) = self.runtime.take() else {
            return;
        };
        self.shared.life.end(phase);
        runtime.block_on(async {
            // Who has not read it by then will not.
            let _ = tokio::time::timeout(limit, self.shared.life.all_closed()).await;
        });
        runtime.shutdown_background();
    }
}
