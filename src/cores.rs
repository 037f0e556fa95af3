//! The processor cores that this process may compute on.

/// Threads to compute with: the cores that this process may use, hyper-threads of one core counted once, for
/// they share what kernels are short of.
pub fn usable() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    allowed.min(num_cpus::get_physical()).max(1)
}

/// Open MPI binds each rank to a core of its own when there are few, which would leave all threads of a rank one
/// core. Where nobody asked for that, the rank takes the cores of its launcher.
#[cfg(target_os = "linux")]
pub fn undo_default_binding() {
    const POLICIES: [&str; 3] = [
        "OMPI_MCA_hwloc_base_binding_policy",
        "OMPI_MCA_rmaps_base_mapping_policy",
        "PRTE_MCA_hwloc_default_binding_policy",
    ];
    let is_launched = std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some();
    if !is_launched || POLICIES.iter().any(|name| std::env::var_os(name).is_some()) {
        return;
    }
    // SAFETY: a set of cores is plain numbers, of which zeros are one; both calls read or write one of this size.
    unsafe {
        let mut cores: libc::cpu_set_t = std::mem::zeroed();
        let bytes = size_of::<libc::cpu_set_t>();
        if libc::sched_getaffinity(libc::getppid(), bytes, &mut cores) == 0 {
            // Where it is refused, the rank is as slow as before.
            libc::sched_setaffinity(0, bytes, &cores);
        }
    }
}

/// Only Linux binds.
#[cfg(not(target_os = "linux"))]
pub fn undo_default_binding() {}
