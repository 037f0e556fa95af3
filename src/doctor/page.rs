//! What rank 0 makes of all that it has heard: tables, and a problem with its remedy for everything that stands
//! in the way. Separate from the asking, so that it can be shown hosts that are not there.

use super::{Examined, Facts, Measured, NoModel, NoPlan};
use crate::agree;
use crate::plan::{Align, Plan, Table, printable};
use crate::report::PEAK_ALLOWANCE_BYTES;
use std::collections::BTreeMap;
use std::fmt::Write;

/// A link above this is no wired network of today.
const SLOW_LATENCY_NS: u64 = 2_000_000;
/// A link below this, in bytes a second, is slower than 500 Mbit/s.
const SLOW_BYTES_PER_S: u64 = 62_500_000;

/// Something that stands in the way, and what to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Problem {
    what: String,
    remedy: String,
}

/// All that rank 0 has heard.
pub(super) struct Page<'a> {
    pub(super) all: &'a [Facts],
    pub(super) links: &'a [Examined],
    pub(super) plan: Option<&'a Result<Plan, NoPlan>>,
    /// The rank that gives its weights to those that have none.
    pub(super) weights_from: Option<usize>,
}

impl Page<'_> {
    /// The whole page.
    pub(super) fn print(&self, problems: &[Problem]) -> String {
        let mut page = String::new();
        let first = &self.all[0];
        let _ = writeln!(page, "mlx-pipe {} on rank 0", first.version);
        let _ = writeln!(
            page,
            "{}, threads {}",
            printable(&first.mpi),
            first.threading
        );
        let _ = write!(page, "\n{}", self.hosts());
        if !self.links.is_empty() {
            let _ = write!(page, "\n{}", self.link_table());
        }
        match self.plan {
            Some(Ok(plan)) => {
                let _ = write!(page, "\n{}", self.memory(plan));
            }
            Some(Err(_)) => {}
            None if self.is_asked() => {
                page += "\nwithout a model on rank 0 there is no plan to hold memory against\n";
            }
            None => {}
        }
        for (number, Problem { what, remedy }) in problems.iter().enumerate() {
            let _ = write!(page, "\nproblem {}: {what}\n  -> {remedy}\n", number + 1);
        }
        page += match (problems.is_empty(), self.is_asked()) {
            (false, _) => "",
            (true, true) => "\nnothing stands in the way of a run\n",
            (true, false) => {
                "\nhosts and links are in order; with --model they are held against a model too\n"
            }
        };
        page
    }

    fn hosts(&self) -> Table {
        let mut table = Table::new(&[
            ("rank", Align::Right),
            ("host", Align::Left),
            ("device", Align::Left),
            ("cores", Align::Right),
            ("GB", Align::Right),
            ("free", Align::Right),
            ("model", Align::Left),
            ("addresses", Align::Left),
        ]);
        for (rank, facts) in self.all.iter().enumerate() {
            let profile = facts.profile.as_ref().ok();
            let unknown = || "?".to_owned();
            let addresses = facts.interfaces.iter().filter(|(_, ip)| ip.is_ipv4());
            let addresses: Vec<String> = addresses
                .map(|(name, ip)| format!("{name} {ip}"))
                .take(2)
                .collect();
            table.row(vec![
                rank.to_string(),
                printable(&facts.host),
                facts.device.clone().unwrap_or_else(|_| unknown()),
                format!(
                    "{}/{}",
                    facts.usable_cores,
                    profile.map_or_else(unknown, |profile| profile.cores.to_string())
                ),
                profile.map_or_else(unknown, |profile| tenths_of_gb(profile.memory_bytes)),
                facts.available_bytes.map_or_else(unknown, tenths_of_gb),
                match &facts.model {
                    Ok(model) => model.tensor_hash[..8].to_owned(),
                    Err(_) => "none".to_owned(),
                },
                printable(&addresses.join(", ")),
            ]);
        }
        table
    }

    fn link_table(&self) -> Table {
        let mut table = Table::new(&[
            ("link", Align::Left),
            ("host", Align::Left),
            ("over", Align::Left),
            ("one way", Align::Right),
            ("asleep", Align::Right),
            ("MB/s", Align::Right),
        ]);
        for (from, to, measured) in self.links {
            let hosts = format!("{} > {}", self.all[*from].host, self.all[*to].host);
            let mut row = vec![format!("{from} > {to}"), printable(&hosts)];
            row.extend(match measured {
                Ok(Measured { link, over }) => [
                    printable(over.as_deref().unwrap_or("?")),
                    format!("{} us", link.eager_latency_ns / 1000),
                    format!("{} us", link.latency_ns / 1000),
                    (link.bytes_per_s / 1_000_000).to_string(),
                ],
                Err(_) => ["failed", "", "", ""].map(str::to_owned),
            });
            table.row(row);
        }
        table
    }

    /// What each rank would hold, beside what its host has free.
    fn memory(&self, plan: &Plan) -> Table {
        let mut table = Table::new(&[
            ("rank", Align::Right),
            ("host", Align::Left),
            ("layers", Align::Left),
            ("plan", Align::Right),
            ("limit", Align::Right),
            ("free", Align::Right),
        ]);
        for (rank, (facts, stage)) in self.all.iter().zip(&plan.stages).enumerate() {
            table.row(vec![
                rank.to_string(),
                printable(&facts.host),
                format!("{}-{}", stage.layers.start, stage.layers.end - 1),
                tenths_of_gb(stage.footprint.total_bytes()),
                tenths_of_gb(stage.device.memory_limit_bytes),
                facts
                    .available_bytes
                    .map_or_else(|| "?".to_owned(), tenths_of_gb),
            ]);
        }
        table
    }

    /// Whether a model was named.
    fn is_asked(&self) -> bool {
        let not_asked = |facts: &Facts| facts.model == Err(NoModel::NotAsked);
        !self.all.iter().all(not_asked)
    }

    /// All that stands in the way.
    pub(super) fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        self.differences(&mut problems);
        self.host_problems(&mut problems);
        self.model_problems(&mut problems);
        self.link_problems(&mut problems);
        self.plan_problems(&mut problems);
        problems
    }

    /// What must be the same everywhere and is not.
    fn differences(&self, problems: &mut Vec<Problem>) {
        let mut compare = |what: &str, value: fn(&Facts) -> String, remedy: &str| {
            let first = value(&self.all[0]);
            for (rank, facts) in self.all.iter().enumerate() {
                let own = value(facts);
                if own != first {
                    problems.push(Problem {
                        what: format!(
                            "rank {rank} ({}) has {what} {own}, rank 0 ({}) has {first}",
                            facts.host, self.all[0].host
                        ),
                        remedy: remedy.to_owned(),
                    });
                }
            }
        };
        compare(
            "mlx-pipe",
            |facts| facts.version.clone(),
            "build the same commit on every host",
        );
        compare(
            "MPI",
            |facts| facts.mpi.clone(),
            "install the same release of Open MPI on every host, and build mlx-pipe against it",
        );
        let options = self
            .all
            .iter()
            .map(|facts| (facts.host.as_str(), &facts.options[..]));
        if let Some(difference) = agree::differing_option(&options.collect::<Vec<_>>()) {
            problems.push(Problem {
                what: format!("the ranks were started with different options: {difference}"),
                remedy: "give all ranks the same ones".to_owned(),
            });
        }
    }

    fn host_problems(&self, problems: &mut Vec<Problem>) {
        for (rank, facts) in self.all.iter().enumerate() {
            let of_rank = format!("rank {rank} ({})", facts.host);
            if let Err(error) = &facts.device {
                problems.push(Problem {
                    what: format!("{of_rank}: {error}"),
                    remedy: "use --device auto or cpu, or install what MLX needs for the GPU"
                        .into(),
                });
            }
            if let Err(error) = &facts.profile {
                problems.push(Problem {
                    what: format!("{of_rank}: {error}"),
                    remedy: "state memory_gb for this host in the cluster file".into(),
                });
            }
            let cores = facts.profile.as_ref().map_or(1, |profile| profile.cores);
            if facts.usable_cores < cores {
                problems.push(Problem {
                    what: format!(
                        "{of_rank} may use {} of the host's {cores} cores: it is bound to them, or its \
                         container has no more",
                        facts.usable_cores
                    ),
                    remedy: "start with mpirun --bind-to none".into(),
                });
            }
        }
    }

    fn model_problems(&self, problems: &mut Vec<Problem>) {
        if !self.is_asked() {
            return;
        }
        let known = self.all.iter().enumerate().find_map(|(rank, facts)| {
            let model = facts.model.as_ref().ok()?;
            Some((rank, model))
        });
        // Ranks with the same trouble are told together.
        let mut lacking: BTreeMap<(&str, bool), Vec<usize>> = BTreeMap::new();
        for (rank, facts) in self.all.iter().enumerate() {
            match (&facts.model, known) {
                (Err(NoModel::Missing(why)), _) => {
                    lacking.entry((why, false)).or_default().push(rank);
                }
                (Err(NoModel::Unusable(why)), _) => {
                    lacking.entry((why, true)).or_default().push(rank);
                }
                (Ok(own), Some((holder, model)))
                    if (&own.config_hash, &own.tensor_hash)
                        != (&model.config_hash, &model.tensor_hash) =>
                {
                    problems.push(Problem {
                        what: format!(
                            "rank {rank} ({}) has another model under that name than rank {holder} ({}): {} \
                             and {}",
                            facts.host,
                            self.all[holder].host,
                            &own.tensor_hash[..8],
                            &model.tensor_hash[..8]
                        ),
                        remedy: "copy the same model directory to every host; for an id, the same revision"
                            .into(),
                    });
                }
                _ => {}
            }
        }
        let holder = known.map(|(rank, _)| rank);
        let is_helped = holder.is_some() && holder == self.weights_from;
        for ((why, is_unusable), ranks) in lacking {
            if is_helped && !is_unusable {
                continue;
            }
            problems.push(Problem {
                what: format!("{}: {why}", self.named(&ranks)),
                remedy: match (is_unusable, holder) {
                    (true, _) => "download or convert the model again, or take one that this version runs"
                        .to_owned(),
                    (false, None) => {
                        "no host has the model: name it with --model, and download it or copy it to a host"
                            .to_owned()
                    }
                    (false, Some(holder)) => format!(
                        "copy the model directory of rank {holder} ({}) there, or run with --weights-from \
                         {holder}",
                        self.all[holder].host
                    ),
                },
            });
        }
    }

    /// `rank 1 (mini2)`, `ranks 1, 2 (mini2, mini3)`.
    fn named(&self, ranks: &[usize]) -> String {
        let numbers: Vec<String> = ranks.iter().map(ToString::to_string).collect();
        let mut hosts: Vec<&str> = ranks
            .iter()
            .map(|&rank| self.all[rank].host.as_str())
            .collect();
        hosts.dedup();
        let noun = if ranks.len() == 1 { "rank" } else { "ranks" };
        format!("{noun} {} ({})", numbers.join(", "), hosts.join(", "))
    }

    fn link_problems(&self, problems: &mut Vec<Problem>) {
        for (from, to, measured) in self.links {
            let (a, b) = (&self.all[*from], &self.all[*to]);
            let between = format!("from rank {from} ({}) to rank {to} ({})", a.host, b.host);
            let remedy = "a wired network between the hosts, named with --mca btl_tcp_if_include; \
                          ranks at both ends of a slow link are better one rank";
            match measured {
                Err(error) => problems.push(Problem {
                    what: format!("{between}: {error}"),
                    remedy: "let the firewalls of both hosts pass what comes from the other, and name the \
                             interface that connects them with --mca btl_tcp_if_include"
                        .into(),
                }),
                Ok(Measured { link, over }) if a.host != b.host => {
                    let over = over.as_deref().unwrap_or("an unknown interface");
                    if link.eager_latency_ns > SLOW_LATENCY_NS {
                        problems.push(Problem {
                            what: format!(
                                "{between}: a message over {over} takes {:.1} ms; every token waits for it",
                                link.eager_latency_ns as f64 / 1e6
                            ),
                            remedy: remedy.into(),
                        });
                    }
                    if link.bytes_per_s < SLOW_BYTES_PER_S {
                        problems.push(Problem {
                            what: format!(
                                "{between}: {over} carries {} MB/s; prompts wait for it",
                                link.bytes_per_s / 1_000_000
                            ),
                            remedy: remedy.into(),
                        });
                    }
                }
                Ok(_) => {}
            }
        }
    }

    /// What does not fit: by the limits, which is an error of the plan, or beside what else runs there.
    fn plan_problems(&self, problems: &mut Vec<Problem>) {
        let plan = match self.plan {
            None => return,
            Some(Err(NoPlan { why, does_not_fit })) => {
                problems.push(Problem {
                    what: why.clone(),
                    remedy: match does_not_fit {
                        true => "take what would fit, a smaller model, or hosts with more memory",
                        false => "correct the option, the cluster file or the number of ranks that this names",
                    }
                    .into(),
                });
                return;
            }
            Some(Ok(plan)) => plan,
        };
        let mut needed: BTreeMap<&str, (u64, Option<u64>)> = BTreeMap::new();
        for (facts, stage) in self.all.iter().zip(&plan.stages) {
            let host = needed
                .entry(&facts.host)
                .or_insert((0, facts.available_bytes));
            host.0 = host
                .0
                .saturating_add(stage.footprint.total_bytes())
                .saturating_add(PEAK_ALLOWANCE_BYTES);
        }
        for (host, (needed_bytes, available_bytes)) in needed {
            if available_bytes.is_some_and(|available| available < needed_bytes) {
                problems.push(Problem {
                    what: format!(
                        "{host}: its ranks will need up to {} GB, and {} GB are free",
                        tenths_of_gb(needed_bytes),
                        available_bytes.map_or_else(String::new, tenths_of_gb)
                    ),
                    remedy: "end other programs there, or lower --context, or set --memory-limit so that \
                             other hosts take more"
                        .into(),
                });
            }
        }
    }
}

fn tenths_of_gb(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e9)
}

#[cfg(test)]
mod tests;
