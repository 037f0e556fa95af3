//! Ranks agreeing while a run is set up: every rank says what it has or what went wrong with it, all
//! hear all, and all come to the same end. So a mistake that every rank sees is told once.

use crate::transport::Transport;
use anyhow::{Context, Result, anyhow};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;

/// Why a run ended early, and who is to say so.
#[derive(Debug)]
pub struct Failure {
    /// What happened.
    pub error: anyhow::Error,
    /// Who knows of it.
    pub known_to: KnownTo,
    /// Exit status of the program.
    pub status: u8,
}

/// Who knows of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KnownTo {
    /// All ranks, at the same point: rank 0 tells the user, and all leave in order.
    All,
    /// This rank alone: it tells the user and ends the job on all ranks.
    ThisRank,
}

impl Failure {
    /// A failure that all ranks came to from the same facts.
    pub fn of_all(error: impl Into<anyhow::Error>) -> Self {
        Self {
            error: error.into(),
            known_to: KnownTo::All,
            status: 1,
        }
    }

    /// The same failure as a mistake of the caller (exit status 2).
    pub fn as_usage(self) -> Self {
        Self { status: 2, ..self }
    }
}

/// An error of this rank alone.
impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self {
            error,
            known_to: KnownTo::ThisRank,
            status: 1,
        }
    }
}

/// What every rank brought, in rank order.
///
/// # Errors
/// If any rank failed: the errors of all ranks, equal ones told once, known to all.
pub fn gather<T: Serialize + DeserializeOwned>(
    transport: &mut impl Transport,
    local: Result<T>,
) -> Result<Vec<T>, Failure> {
    let told = local.map_err(|error| format!("{error:#}"));
    let bytes = serde_json::to_vec(&told).context("encoding what this rank brings")?;
    let gathered = transport.gather_all(&bytes)?;
    let mut brought = Vec::new();
    let mut failed: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (rank, bytes) in gathered.iter().enumerate() {
        let told: Result<T, String> = serde_json::from_slice(bytes).with_context(|| {
            format!("rank {rank} said something that this version does not understand; are all ranks of the same version?")
        })?;
        match told {
            Ok(value) => brought.push(value),
            Err(error) => failed.entry(error).or_default().push(rank),
        }
    }
    match failed.is_empty() {
        true => Ok(brought),
        false => Err(Failure::of_all(summary(&failed, transport.size()))),
    }
}

/// This rank's value, once all ranks have succeeded.
///
/// # Errors
/// If any rank failed: the errors of all ranks, known to all.
pub fn all_succeeded<T>(transport: &mut impl Transport, local: Result<T>) -> Result<T, Failure> {
    let (value, told) = match local {
        Ok(value) => (Some(value), Ok(())),
        Err(error) => (None, Err(error)),
    };
    gather(transport, told)?;
    Ok(value.context("this rank failed, and the others did not hear of it")?)
}

/// `ranks 0, 2: error`, one line for each different error.
fn summary(failed: &BTreeMap<String, Vec<usize>>, rank_count: usize) -> anyhow::Error {
    let mut by_rank: Vec<_> = failed.iter().collect();
    by_rank.sort_by_key(|(_, ranks)| ranks.first());
    let lines: Vec<String> = by_rank
        .into_iter()
        .map(|(error, ranks)| match ranks.len() {
            count if count == rank_count => error.clone(),
            1 => format!("rank {}: {error}", ranks[0]),
            _ => {
                let numbers: Vec<String> = ranks.iter().map(usize::to_string).collect();
                format!("ranks {}: {error}", numbers.join(", "))
            }
        })
        .collect();
    anyhow!("{}", lines.join("\n"))
}

/// Checks that a value is the same on all ranks; `what` names it, `remedy` says what to do.
///
/// # Errors
/// The ranks that differ from rank 0, known to all.
pub fn same_on_all<'a>(
    what: &str,
    values: impl IntoIterator<Item = (&'a str, &'a str)>,
    remedy: &str,
) -> Result<(), Failure> {
    let values: Vec<_> = values.into_iter().collect();
    let Some(&(first_host, first)) = values.first() else {
        return Ok(());
    };
    let differing: Vec<String> = values
        .iter()
        .enumerate()
        .filter(|(_, (_, value))| *value != first)
        .map(|(rank, (host, value))| format!("rank {rank} ({host}) {}", short(value)))
        .collect();
    if differing.is_empty() {
        return Ok(());
    }
    Err(Failure::of_all(anyhow!(
        "the ranks do not have the same {what}: rank 0 ({first_host}) has {}, but {}; {remedy}",
        short(first),
        differing.join(", ")
    )))
}

/// The beginning of a hash is enough to tell two apart.
fn short(value: &str) -> &str {
    value.get(..12).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_errors_are_told_once_and_different_ones_by_rank() {
        let failed = BTreeMap::from([
            ("no model".to_owned(), vec![0, 2]),
            ("no memory".to_owned(), vec![1]),
        ]);
        assert_eq!(
            summary(&failed, 3).to_string(),
            "ranks 0, 2: no model\nrank 1: no memory"
        );
        let all = BTreeMap::from([("no model".to_owned(), vec![0, 1, 2])]);
        assert_eq!(summary(&all, 3).to_string(), "no model");
    }

    #[test]
    fn ranks_that_differ_are_named_with_their_hosts() {
        let values = [("mini1", "aaaa"), ("mini2", "aaaa"), ("mini3", "bbbb")];
        let error = same_on_all("config.json", values, "copy it again").unwrap_err();
        assert_eq!(
            error.error.to_string(),
            "the ranks do not have the same config.json: rank 0 (mini1) has aaaa, but rank 2 (mini3) bbbb; \
             copy it again"
        );
        assert!(same_on_all("config.json", values[..2].iter().copied(), "").is_ok());
    }
}
