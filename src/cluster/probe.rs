//! Questions to the operating system: this host's name, memory and cores.

use super::{ClusterError, DeviceProfile};
#[cfg(all(test, target_os = "linux"))]
pub(super) use system::{limit_files, online_cores, total_bytes};

/// This host: name, the memory that this process may use (control groups heeded), CPU cores.
///
/// The core count is the host's and not the process's: MPI binds ranks to cores, and the cores are
/// divided among the host's ranks afterwards.
///
/// # Errors
///
/// [`ClusterError::Probe`] if the system does not tell its memory.
pub fn probe_local() -> Result<DeviceProfile, ClusterError> {
    let hostname = gethostname::gethostname().to_string_lossy().into_owned();
    Ok(DeviceProfile {
        device_id: hostname.clone(),
        hostname,
        memory_bytes: system::memory_bytes()?,
        cores: system::cores(),
        max_model_bytes: None,
        rates: None,
    })
}

/// Memory of this host that is free or that the system would free for a program, in bytes; `None` where
/// it does not tell.
pub fn available_bytes() -> Option<u64> {
    system::available_bytes()
}

/// What every system tells without being asked specially.
fn available_cores() -> u64 {
    std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64)
}

/// Questions to Linux: files of `/proc` and `/sys`.
#[cfg(target_os = "linux")]
mod system {
    use std::fs;
    use std::io;
    use std::path::{Path, PathBuf};

    use crate::cluster::ClusterError;

    const MEMINFO: &str = "/proc/meminfo";

    pub(super) fn memory_bytes() -> Result<u64, ClusterError> {
        let failed = |cause| ClusterError::Probe {
            asked: MEMINFO,
            cause,
        };
        let text = fs::read_to_string(MEMINFO).map_err(failed)?;
        let total_bytes = total_bytes(&text);
        let total_bytes = total_bytes.ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))?;
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        // A limit that cannot be read, or reads `max`, is no limit.
        let limits = limit_files(&groups).into_iter().filter_map(|file| {
            fs::read_to_string(file)
                .ok()?
                .trim()
                .parse::<u64>()
                .ok()
                .filter(|bytes| *bytes > 0)
        });
        Ok(limits.fold(total_bytes, u64::min))
    }

    pub(super) fn available_bytes() -> Option<u64> {
        field_bytes(&fs::read_to_string(MEMINFO).ok()?, "MemAvailable:")
    }

    pub(super) fn cores() -> u64 {
        let online = fs::read_to_string("/sys/devices/system/cpu/online").ok();
        online
            .and_then(|text| online_cores(&text))
            .unwrap_or_else(super::available_cores)
    }

    /// `MemTotal` of `/proc/meminfo`, which counts in KiB (proc_meminfo(5)).
    pub(in crate::cluster) fn total_bytes(meminfo: &str) -> Option<u64> {
        field_bytes(meminfo, "MemTotal:")
    }

    fn field_bytes(meminfo: &str, field: &str) -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(field))?;
        let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        kibibytes.checked_mul(1024).filter(|bytes| *bytes > 0)
    }

    /// The files that may limit this process's memory, from `/proc/self/cgroup` (cgroups(7)): in
    /// its own group and all those above, of which the tightest counts. Inside a container the
    /// group's path may be the host's and then leads nowhere, but the last one, the root, is there.
    pub(in crate::cluster) fn limit_files(groups: &str) -> Vec<PathBuf> {
        let mut files = Vec::new();
        for line in groups.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else {
                continue;
            };
            let (root, name) = if controllers.is_empty() {
                ("/sys/fs/cgroup", "memory.max")
            } else if controllers
                .split(',')
                .any(|controller| controller == "memory")
            {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            } else {
                continue;
            };
            let group = Path::new(group.trim_start_matches('/'));
            files.extend(
                group
                    .ancestors()
                    .map(|group| Path::new(root).join(group).join(name)),
            );
        }
        files
    }

    /// The number of CPUs in a list such as `0-3,8`.
    pub(in crate::cluster) fn online_cores(list: &str) -> Option<u64> {
        let count = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
            last.checked_sub(first)?.checked_add(1)
        };
        list.trim()
            .split(',')
            .map(count)
            .try_fold(0_u64, |sum, cores| sum.checked_add(cores?))
    }
}

/// Questions to macOS: `sysctl`.
#[cfg(target_os = "macos")]
mod system {
    use std::io;

    use crate::cluster::ClusterError;

    pub(super) fn memory_bytes() -> Result<u64, ClusterError> {
        let mut bytes = 0_u64;
        let mut size = size_of::<u64>();
        // SAFETY: the name ends with a zero byte; `bytes` and `size` are live and writable, `size`
        // is the size of `bytes`, and the last two arguments ask for nothing to be changed.
        let status = unsafe {
            libc::sysctlbyname(
                c"hw.memsize".as_ptr(),
                (&raw mut bytes).cast(),
                &raw mut size,
                std::ptr::null_mut(),
                0,
            )
        };
        if status != 0 || size != size_of::<u64>() {
            let cause = io::Error::last_os_error();
            return Err(ClusterError::Probe {
                asked: "sysctl hw.memsize",
                cause,
            });
        }
        Ok(bytes)
    }

    pub(super) fn cores() -> u64 {
        super::available_cores()
    }

    pub(super) fn available_bytes() -> Option<u64> {
        None
    }
}

/// Other systems do not tell.
#[cfg(not(any(target_os = "linux", target_os = "macos")))]
mod system {
    use crate::cluster::ClusterError;

    pub(super) fn memory_bytes() -> Result<u64, ClusterError> {
        let cause = std::io::ErrorKind::Unsupported.into();
        Err(ClusterError::Probe {
            asked: "on Linux and macOS only",
            cause,
        })
    }

    pub(super) fn cores() -> u64 {
        super::available_cores()
    }

    pub(super) fn available_bytes() -> Option<u64> {
        None
    }
}
