//! A bell between the ranks of a host: who sends rings at the receiver's, who waits sleeps until it rings. To look again and
//! again instead notices a message late, by the pause between two looks, and each look takes time from the rank that
//! computes on the same cores.
//!
//! Every rank has a UDP socket on the loopback interface; a ring is a datagram without content. It says only that it is
//! worth to look: one that is lost costs a pause, one that is forged a look.

use nix::libc::FD_SETSIZE;
use nix::sys::select::{FdSet, select};
use nix::sys::time::TimeVal;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::thread;
use std::time::Duration;

/// Rings taken at a time: more than ranks send during a step.
const MOST_RINGS: usize = 64;

/// The bell of this rank, and what it knows of those of its neighbours.
#[derive(Debug)]
pub struct Bell {
    socket: UdpSocket,
    /// By rank; none for this one, and for those of other hosts.
    neighbours: Vec<Option<Neighbour>>,
    hears_all: bool,
}

#[derive(Debug)]
struct Neighbour {
    address: SocketAddr,
    /// It has rung here, so rings arrive.
    is_heard: bool,
}

impl Bell {
    /// A bell that nobody rings yet.
    ///
    /// # Errors
    /// The system has no loopback interface, or no socket left that `select` can wait for.
    pub fn hang() -> io::Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.set_nonblocking(true)?;
        if usize::try_from(socket.as_raw_fd()).is_ok_and(|fd| fd < FD_SETSIZE) {
            Ok(Self {
                socket,
                neighbours: Vec::new(),
                hears_all: false,
            })
        } else {
            Err(io::Error::other("too many open files for a bell"))
        }
    }

    /// The port of the bell, for the neighbours.
    ///
    /// # Errors
    /// The system does not know.
    pub fn port(&self) -> io::Result<u16> {
        Ok(self.socket.local_addr()?.port())
    }

    /// Takes up the ports of all ranks' bells (`None`: this rank, or on another host), and rings each once, so that it
    /// knows that this one can be heard.
    pub fn meet(&mut self, ports: impl IntoIterator<Item = Option<u16>>) {
        let neighbour = |port: u16| Neighbour {
            address: (Ipv4Addr::LOCALHOST, port).into(),
            is_heard: false,
        };
        self.neighbours = ports.into_iter().map(|port| port.map(neighbour)).collect();
        for rank in 0..self.neighbours.len() {
            self.ring(rank);
        }
    }

    /// Rings at a rank's, if it is a neighbour.
    pub fn ring(&self, rank: usize) {
        if let Some(Some(neighbour)) = self.neighbours.get(rank) {
            // One that is not sent is like one that is lost.
            let _ = self.socket.send_to(&[], neighbour.address);
        }
    }

    /// Whether all other ranks are neighbours whose rings arrive.
    pub fn hears_all(&self) -> bool {
        self.hears_all
    }

    /// Sleeps, until it rings at most; whether it has rung.
    pub fn sleep(&mut self, time: Duration) -> bool {
        let microseconds = i64::try_from(time.as_micros()).unwrap_or(i64::MAX);
        let (seconds, rest) = (microseconds / 1_000_000, microseconds % 1_000_000);
        let mut timeout = TimeVal::new(seconds as _, rest as _);
        let mut bells = FdSet::new();
        bells.insert(self.socket.as_fd());
        match select(None, &mut bells, None, None, &mut timeout) {
            Ok(1..) => self.take_rings(),
            Ok(_) => false,
            // A signal, mostly; who waits looks whether it is one to end by.
            Err(_) => {
                thread::sleep(time);
                false
            }
        }
    }

    fn take_rings(&mut self) -> bool {
        let mut has_rung = false;
        for _ in 0..MOST_RINGS {
            let Ok((_, from)) = self.socket.recv_from(&mut [0]) else {
                break;
            };
            has_rung = true;
            if !self.hears_all {
                self.hear(from);
            }
        }
        has_rung
    }

    fn hear(&mut self, from: SocketAddr) {
        for neighbour in self.neighbours.iter_mut().flatten() {
            neighbour.is_heard |= neighbour.address == from;
        }
        let heard = self
            .neighbours
            .iter()
            .flatten()
            .filter(|other| other.is_heard);
        self.hears_all = heard.count() + 1 == self.neighbours.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    const LONG: Duration = Duration::from_secs(20);
    const SHORT: Duration = Duration::from_millis(20);

    fn pair() -> [Bell; 2] {
        let mut bells = [Bell::hang().unwrap(), Bell::hang().unwrap()];
        let ports = [bells[0].port().unwrap(), bells[1].port().unwrap()];
        bells[0].meet([None, Some(ports[1])]);
        bells[1].meet([Some(ports[0]), None]);
        bells
    }

    #[test]
    fn who_is_rung_wakes_and_who_is_not_sleeps_on() {
        let [mut first, mut second] = pair();
        // The ring with which they met.
        assert!(first.sleep(LONG) && second.sleep(LONG));
        let began = Instant::now();
        assert!(!first.sleep(SHORT));
        assert!(began.elapsed() >= SHORT);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(SHORT);
                second.ring(0);
            });
            let began = Instant::now();
            assert!(first.sleep(LONG));
            assert!(began.elapsed() < LONG / 2);
        });
    }

    #[test]
    fn rings_before_the_sleep_are_heard_once() {
        let [mut first, second] = pair();
        (0..5).for_each(|_| second.ring(0));
        assert!(first.sleep(LONG));
        assert!(!first.sleep(SHORT));
    }

    #[test]
    fn all_are_heard_once_each_has_rung() {
        let [mut first, mut second] = pair();
        assert!(!first.hears_all());
        first.sleep(LONG);
        second.sleep(LONG);
        assert!(first.hears_all() && second.hears_all());
        // A stranger, and a rank of another host.
        let mut alone = Bell::hang().unwrap();
        let port = first.port().unwrap();
        alone.meet([Some(port), None, None]);
        first.neighbours.push(None);
        first.hears_all = false;
        assert!(first.sleep(LONG));
        second.ring(0);
        assert!(first.sleep(LONG));
        assert!(!first.hears_all());
    }
}
