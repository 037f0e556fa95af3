//! A lock on an open file that ends with its process, however that ends: how the leftover of a dead writer
//! is told from the work of a living one.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// What became of an attempt to lock a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lock {
    /// It is ours until the file is closed.
    Ours,
    /// Another open file has it.
    Taken,
    /// The file system knows no locks.
    Unknown,
}

/// Tries to lock an open file; returns at once.
pub(super) fn try_lock(file: &File) -> Lock {
    // SAFETY: `flock` takes any number for a descriptor; this one is open as long as `file` is.
    let status = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    match status {
        0 => Lock::Ours,
        _ if io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock => Lock::Taken,
        _ => Lock::Unknown,
    }
}
