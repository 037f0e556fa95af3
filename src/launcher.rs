//! What `mpirun` and its like say in a process's environment: whether they started it, as which rank, and where that
//! stands on its host. Good before MPI is started, and for what has to be known then.

use crate::stage::Seat;
use std::sync::OnceLock;

/// This process's rank as its launcher says it, before MPI is started; 0 without a launcher. Good enough
/// to print a usage error once.
pub fn rank() -> usize {
    rank_of_launcher().unwrap_or(0)
}

/// Whether a launcher such as `mpirun` started this process.
pub fn is_launched() -> bool {
    rank_of_launcher().is_some()
}

/// This rank's place among those on its host, as the launcher says; alone where it says nothing.
pub fn seat() -> Seat {
    let number = |names: &[&str]| {
        let mut values = names
            .iter()
            .map(|name| std::env::var(name).ok()?.parse().ok());
        values.find_map(|value| value)
    };
    Seat {
        rank: number(&[
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "MPI_LOCALRANKID",
            "SLURM_LOCALID",
        ])
        .unwrap_or(0),
        ranks: number(&["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"]).unwrap_or(1),
    }
}

/// What Open MPI, PMIx and MPICH put into a rank's environment. Looked up once, before MPI is started: that
/// without a launcher sets some of it too.
fn rank_of_launcher() -> Option<usize> {
    static RANK: OnceLock<Option<usize>> = OnceLock::new();
    *RANK.get_or_init(|| {
        ["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"]
            .into_iter()
            .find_map(|name| std::env::var(name).ok()?.parse().ok())
    })
}
