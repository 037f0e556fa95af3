//! Sockets: how many, how slow, how long idle, and how they end. Beyond the most connections, the one that has been without a request
//! for longest makes room, so that thousands of silent ones harm nobody.

use super::life::Phase;
use super::{Shared, http};
use axum::{Extension, Router};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::HttpService;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::AsyncWrite;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Notify, watch};
use tokio_io_timeout::TimeoutStream;
use tracing::debug;

/// Pause after the system has refused a connection, as when there are no more file descriptors.
const REFUSED_PAUSE: Duration = Duration::from_millis(50);
/// How long a connection that was told to close may take.
const CLOSING_LIMIT: Duration = Duration::from_secs(1);
/// What the system may hold of an answer that a client has not read. The system's own choice, some megabytes, would
/// take in whole answers, and a client that reads nothing would never be noticed.
const UNREAD_BYTES: u32 = 64 << 10;
/// Connections that the system may hold before they are accepted.
const BACKLOG: u32 = 1024;
/// How long a client may send nothing more of what was refused, until its connection is closed.
const LINGER_SILENCE: Duration = Duration::from_secs(2);
/// Most bytes that are read of what was refused.
const LINGER_BYTES: usize = 64 << 20;
/// Most bytes of a request's head.
const HEAD_BYTES: usize = 64 << 10;
/// Most fields of a request's head.
const HEAD_FIELDS: usize = 100;

/// Connections that have no request under way, the one idle longest first.
#[derive(Default)]
pub struct Idle {
    by_age: Mutex<Ages>,
}

#[derive(Default)]
struct Ages {
    next: u64,
    connections: BTreeMap<u64, Arc<Notify>>,
}

/// One connection's place among the idle ones.
pub struct Seat {
    idle: Arc<Idle>,
    /// Tells the connection to close.
    close: Arc<Notify>,
    /// Its place in the order of age; `None` while it has a request.
    age: Mutex<Option<u64>>,
}

/// A connection is at work; it rests when this is dropped.
pub struct AtWork(Arc<Seat>);

impl Idle {
    fn ages(&self) -> MutexGuard<'_, Ages> {
        self.by_age.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, close: &Arc<Notify>) -> u64 {
        let mut ages = self.ages();
        let age = ages.next;
        ages.next += 1;
        ages.connections.insert(age, Arc::clone(close));
        age
    }

    /// Closes the connection that has been idle longest; whether there was one.
    fn close_oldest(&self) -> bool {
        let oldest = self.ages().connections.pop_first();
        oldest.inspect(|(_, close)| close.notify_one()).is_some()
    }
}

impl Seat {
    fn new(idle: &Arc<Idle>) -> Self {
        let close = Arc::new(Notify::new());
        Self {
            age: Mutex::new(Some(idle.add(&close))),
            idle: Arc::clone(idle),
            close,
        }
    }

    fn age(&self) -> MutexGuard<'_, Option<u64>> {
        self.age.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request has arrived whole.
    pub fn work(self: &Arc<Self>) -> AtWork {
        self.leave();
        AtWork(Arc::clone(self))
    }

    /// It is none of the idle ones any more.
    fn leave(&self) {
        if let Some(age) = self.age().take() {
            self.idle.ages().connections.remove(&age);
        }
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        let seat = &self.0;
        *seat.age() = Some(seat.idle.add(&seat.close));
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Listens. Needs a runtime.
///
/// # Errors
/// What the system says.
pub fn listen(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = match addr {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // A server that ended a moment ago does not keep the port.
    socket.set_reuseaddr(true)?;
    // Connections take it over from here.
    socket.set_send_buffer_size(UNREAD_BYTES)?;
    socket.bind(addr)?;
    socket.listen(BACKLOG)
}

/// Accepts connections until the server ends.
pub async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let idle = Arc::new(Idle::default());
    let router = http::router(Arc::clone(&shared));
    let mut phase = shared.life.watch();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = phase.wait_for(|phase| phase.is_end()) => return,
        };
        match accepted {
            Err(error) => {
                debug!("a connection was refused by the system: {error}");
                // Where files are used up, an idle connection gives one back.
                idle.close_oldest();
                tokio::time::sleep(REFUSED_PAUSE).await;
            }
            Ok((stream, _)) => {
                let most = shared.options.max_connections as usize;
                if shared.life.open_count() >= most {
                    let closing = idle.close_oldest();
                    let closed = tokio::time::timeout(CLOSING_LIMIT, shared.life.fewer_open(most));
                    if !closing || closed.await.is_err() {
                        // All are at work. This one is closed by dropping it.
                        continue;
                    }
                }
                let seat = Arc::new(Seat::new(&idle));
                let open = shared.life.open();
                let connection = serve(stream, seat, router.clone(), Arc::clone(&shared));
                tokio::spawn(async move {
                    connection.await;
                    drop(open);
                });
            }
        }
    }
}

/// Answers the requests of one connection.
async fn serve(stream: TcpStream, seat: Arc<Seat>, router: Router, shared: Arc<Shared>) {
    // Tokens are small and wanted at once. A system that cannot do that is slower, no more.
    let _ = stream.set_nodelay(true);
    let mut stream = std::pin::pin!(TimeoutStream::new(stream));
    let write_limit = Duration::from_secs(shared.options.write_s);
    stream.as_mut().set_write_timeout_pinned(Some(write_limit));
    let service = TowerToHyperService::new(router.layer(Extension(Arc::clone(&seat))));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        // It begins with the connection, and again after each answer.
        .header_read_timeout(Duration::from_secs(shared.options.idle_s))
        .max_buf_size(HEAD_BYTES)
        .max_headers(HEAD_FIELDS)
        .serve_connection(TokioIo::new(stream.as_mut()), service);
    let mut phase = shared.life.watch();
    if !answer_all(connection, &seat, &mut phase).await {
        return;
    }
    let lingering = linger(stream.as_mut());
    let limit = Duration::from_secs(shared.options.body_s);
    tokio::select! {
        _ = tokio::time::timeout(limit, lingering) => {}
        () = seat.close.notified() => {}
        _ = phase.wait_for(|phase| phase.is_end()) => {}
    }
}

/// Answers until the connection ends; whether the client may still be sending what nobody reads any more.
async fn answer_all<I, S>(
    connection: http1::Connection<I, S>,
    seat: &Seat,
    phase: &mut watch::Receiver<Phase>,
) -> bool
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin,
    S: HttpService<Incoming, ResBody = axum::body::Body>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut connection = std::pin::pin!(connection);
    let mut is_closing = false;
    loop {
        tokio::select! {
            // A client that breaks off is its own concern; one that keeps to no rule was told so.
            ended = connection.as_mut() => return match ended {
                Ok(()) => !is_closing,
                Err(error) => error.is_parse(),
            },
            () = seat.close.notified() => return false,
            _ = phase.wait_for(|phase| phase.is_end()), if !is_closing => {
                is_closing = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

/// Says that nothing more comes, and throws away what the client still sends. To close a connection with bytes unread
/// resets it, and a client that is in the middle of a body would see that in place of the answer.
async fn linger(mut stream: Pin<&mut TimeoutStream<TcpStream>>) {
    let ended = std::future::poll_fn(|context| stream.as_mut().poll_shutdown(context));
    if ended.await.is_err() {
        return;
    }
    let mut thrown_away = 0;
    let mut bytes = vec![0; 16 << 10];
    while thrown_away < LINGER_BYTES {
        let socket = stream.get_ref();
        if !matches!(
            tokio::time::timeout(LINGER_SILENCE, socket.readable()).await,
            Ok(Ok(()))
        ) {
            return;
        }
        match socket.try_read(&mut bytes) {
            Ok(0) => return,
            Ok(count) => thrown_away += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}
