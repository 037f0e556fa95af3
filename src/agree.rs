//! Ranks agreeing while a run is set up: every rank says what it has or what went wrong with it, all
//! hear all, and all come to the same end. So a mistake that every rank sees is told once.

use crate::transport::Transport;
use anyhow::{Context, Result, anyhow};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// Why a run ended early, and who is to say so.
#[derive(Debug)]
pub struct Failure {
    /// What happened.
    pub error: anyhow::Error,
    /// Who knows of it.
    pub known_to: KnownTo,
}

/// Who knows of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KnownTo {
    /// All ranks, at the same point: rank 0 tells the user, and all leave in order. Only this file can
    /// say so, after all ranks have heard it.
    All,
    /// This rank alone: it tells the user and ends the job on all ranks.
    ThisRank,
}

impl Failure {
    fn of_all(error: anyhow::Error) -> Self {
        Self {
            error,
            known_to: KnownTo::All,
        }
    }
}

/// An error of this rank alone.
impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self {
            error,
            known_to: KnownTo::ThisRank,
        }
    }
}

/// A mistake in what the user asked for, in the command line or the cluster file; exit status 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(String);

impl Usage {
    /// The error as a mistake of the user.
    pub fn of(error: impl Into<anyhow::Error>) -> anyhow::Error {
        anyhow::Error::new(Self(format!("{:#}", error.into())))
    }
}

/// The exit status that an error asks for: 2 for a mistake of the user, else 1.
pub fn exit_status(error: &anyhow::Error) -> u8 {
    if error.is::<Usage>() { 2 } else { 1 }
}

/// What a rank says of its failure.
#[derive(Clone, Serialize, Deserialize)]
struct Told {
    error: String,
    is_usage: bool,
    host: String,
}

impl Told {
    fn of(error: &anyhow::Error) -> Self {
        Self {
            error: format!("{error:#}"),
            is_usage: error.is::<Usage>(),
            host: gethostname::gethostname().to_string_lossy().into_owned(),
        }
    }
}

/// What every rank brought, in rank order. Waits for the other ranks for as long as `limit` says.
///
/// # Errors
/// If any rank failed: the errors of all ranks, equal ones told once, known to all.
pub fn gather<T: Serialize + DeserializeOwned>(
    transport: &mut impl Transport,
    local: Result<T>,
    limit: Option<Duration>,
) -> Result<Vec<T>, Failure> {
    let told = local.map_err(|error| Told::of(&error));
    let bytes = serde_json::to_vec(&told).context("encoding what this rank brings")?;
    let gathered = transport.gather_all(&bytes, limit)?;
    let mut brought = Vec::new();
    let mut failed = BTreeMap::new();
    for (rank, bytes) in gathered.iter().enumerate() {
        let told: Result<T, Told> = serde_json::from_slice(bytes).with_context(|| {
            format!("rank {rank} said something that this version does not understand; are all ranks of the same version?")
        })?;
        match told {
            Ok(value) => brought.push(value),
            Err(told) => {
                failed.insert(rank, told);
            }
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
    gather(transport, told, None)?;
    Ok(value.context("this rank failed, and the others did not hear of it")?)
}

/// `ranks 0, 2 (mini1, mini3): error`, one line for each different error.
fn summary(failed: &BTreeMap<usize, Told>, rank_count: usize) -> anyhow::Error {
    let mut lines: Vec<String> = Vec::new();
    for told in failed.values() {
        let alike: Vec<(&usize, &Told)> = failed
            .iter()
            .filter(|(_, other)| other.error == told.error)
            .collect();
        let ranks: Vec<String> = alike.iter().map(|(rank, _)| rank.to_string()).collect();
        let mut hosts: Vec<&str> = alike.iter().map(|(_, other)| other.host.as_str()).collect();
        hosts.dedup();
        let line = match alike.len() {
            count if count == rank_count => told.error.clone(),
            1 => format!("rank {} ({}): {}", ranks[0], hosts[0], told.error),
            _ => format!(
                "ranks {} ({}): {}",
                ranks.join(", "),
                hosts.join(", "),
                told.error
            ),
        };
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    let all = anyhow!("{}", lines.join("\n"));
    match failed.values().all(|told| told.is_usage) {
        true => Usage::of(all),
        false => all,
    }
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

/// Checks that every rank was started with the same options; `all` has each rank's host and options.
///
/// # Errors
/// The first option that differs, with its value on every rank, known to all.
pub fn same_options(all: &[(&str, &[(String, String)])]) -> Result<(), Failure> {
    match differing_option(all) {
        None => Ok(()),
        Some(difference) => Err(Failure::of_all(Usage::of(anyhow!(
            "the ranks were started with different options: {difference}; give all ranks the same ones"
        )))),
    }
}

/// `rank 0 (mini1) --context 512, rank 1 (mini2) --context not given`, for the first option that differs.
pub fn differing_option(all: &[(&str, &[(String, String)])]) -> Option<String> {
    let (_, first) = all.first()?;
    let place = (0..first.len()).find(|&place| {
        all.iter()
            .any(|(_, own)| own.get(place) != first.get(place))
    })?;
    let told = all.iter().enumerate().filter_map(|(rank, (host, own))| {
        let (name, value) = own.get(place)?;
        Some(format!("rank {rank} ({host}) {name} {value}"))
    });
    Some(told.collect::<Vec<_>>().join(", "))
}

/// The beginning of a hash is enough to tell two apart.
fn short(value: &str) -> &str {
    value.get(..12).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(error: &str, host: &str, is_usage: bool) -> Told {
        Told {
            error: error.into(),
            is_usage,
            host: host.into(),
        }
    }

    #[test]
    fn equal_errors_are_told_once_and_different_ones_by_rank_and_host() {
        let failed = BTreeMap::from([
            (0, told("no model", "mini1", true)),
            (1, told("no memory", "mini2", false)),
            (2, told("no model", "mini3", true)),
        ]);
        let error = summary(&failed, 3);
        assert_eq!(
            error.to_string(),
            "ranks 0, 2 (mini1, mini3): no model\nrank 1 (mini2): no memory"
        );
        assert_eq!(exit_status(&error), 1);
    }

    #[test]
    fn a_mistake_that_all_ranks_see_is_told_without_ranks_and_is_one_of_usage() {
        let failed = BTreeMap::from([0, 1].map(|rank| (rank, told("no model", "mini", true))));
        let error = summary(&failed, 2);
        assert_eq!(error.to_string(), "no model");
        assert_eq!(exit_status(&error), 2);
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
