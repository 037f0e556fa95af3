//! The plan for people: tables of at most 80 columns, and the layout they share.
//!
//! Own layout of some fifty lines because a table crate brings terminal detection and borders,
//! and still leaves the one hard part, fitting the host's name into what the numbers leave.

use std::fmt;

use super::strategy::ShowLayers;
use super::{Plan, Role, Stage, TimeSource};

/// Widest line in characters.
const WIDTH: usize = 80;
const GAP: usize = 2;
/// The column that is shortened when a line gets too long.
const ELASTIC: &str = "host";
/// The one of tables that name no hosts.
const ELASTIC_SPLIT: &str = "split";

/// Bytes in GB (1e9 bytes), rounded half up: three decimals, none from 1000 GB on.
pub(super) fn gigabytes(bytes: u64) -> String {
    let rounded = |unit: u64| bytes / unit + u64::from(bytes % unit >= unit / 2);
    match rounded(1_000_000) {
        megabytes if megabytes < 1_000_000 => {
            format!("{}.{:03}", megabytes / 1000, megabytes % 1000)
        }
        _ => rounded(1_000_000_000).to_string(),
    }
}

/// Bytes with the unit that suits them: `1.288 GB`, `0.4 MB` below 0.1 GB, `900 B` below 0.1 MB.
pub(super) fn size(bytes: u64) -> String {
    const TENTH_OF_MB: u64 = 100_000;
    const TENTH_OF_GB: u64 = 100_000_000;
    match bytes {
        0..TENTH_OF_MB => format!("{bytes} B"),
        TENTH_OF_MB..TENTH_OF_GB => {
            let tenths = (bytes + TENTH_OF_MB / 2) / TENTH_OF_MB;
            format!("{}.{} MB", tenths / 10, tenths % 10)
        }
        _ => format!("{} GB", gigabytes(bytes)),
    }
}

/// A number with its noun: `1 rank`, `3 ranks`, `2 full copies`.
pub(super) fn counted(count: u64, noun: &str) -> String {
    match (count, noun.strip_suffix('y')) {
        (1, _) => format!("1 {noun}"),
        (_, Some(stem)) => format!("{count} {stem}ies"),
        (_, None) => format!("{count} {noun}s"),
    }
}

/// `text` with control characters replaced: names come from files and other hosts.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

/// On which side of its column a cell stands.
#[derive(Clone, Copy)]
pub enum Align {
    /// Texts.
    Left,
    /// Numbers.
    Right,
}

/// Rows of text under headings, laid out when displayed.
pub struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table with these headings. The column headed `host` gives way where a line gets long.
    pub fn new(columns: &[(&'static str, Align)]) -> Self {
        Self {
            columns: columns.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row with one cell a column.
    pub fn row(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.columns.len());
        self.rows.push(cells);
    }

    /// The width of each column; the elastic one gives way, down to four characters.
    fn widths(&self) -> Vec<usize> {
        let width = |(column, (title, _)): (usize, &(&str, Align))| {
            let cells = self.rows.iter().map(|row| row[column].chars().count());
            cells.max().unwrap_or(0).max(title.chars().count())
        };
        let mut widths: Vec<usize> = self.columns.iter().enumerate().map(width).collect();
        let line = widths.iter().sum::<usize>() + GAP * widths.len().saturating_sub(1);
        if let Some(column) = self
            .columns
            .iter()
            .position(|(title, _)| [ELASTIC, ELASTIC_SPLIT].contains(title))
        {
            widths[column] = widths[column]
                .saturating_sub(line.saturating_sub(WIDTH))
                .max(4);
        }
        widths
    }

    fn line(&self, cells: &[&str], widths: &[usize]) -> String {
        let cell = |((text, width), (_, align)): ((&&str, &usize), &(&str, Align))| {
            let text = shorten(text, *width);
            match align {
                Align::Left => format!("{text:<width$}"),
                Align::Right => format!("{text:>width$}"),
            }
        };
        let columns = cells.iter().zip(widths).zip(&self.columns);
        let cells: Vec<String> = columns.map(cell).collect();
        cells.join(&" ".repeat(GAP)).trim_end().to_owned()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths = self.widths();
        let titles: Vec<&str> = self.columns.iter().map(|(title, _)| *title).collect();
        writeln!(f, "{}", self.line(&titles, &widths))?;
        for row in &self.rows {
            let cells: Vec<&str> = row.iter().map(String::as_str).collect();
            writeln!(f, "{}", self.line(&cells, &widths))?;
        }
        Ok(())
    }
}

/// `text` in at most `width` characters, the cut marked with `~`.
pub(super) fn shorten(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars()
        .take(width.saturating_sub(1))
        .chain(['~'])
        .collect()
}

/// The plan, a rank a line, with totals and the memory saved. At most 80 columns; ends with a
/// line break.
pub fn plan_table(plan: &Plan) -> String {
    use Align::{Left, Right};
    let mut table = Table::new(&[
        ("rank", Right),
        (ELASTIC, Left),
        ("layers", Left),
        ("", Right),
        ("owns", Left),
        ("weights", Right),
        ("KV", Right),
        ("total", Right),
        ("limit", Right),
        ("step", Right),
    ]);
    for (rank, stage) in plan.stages.iter().enumerate() {
        table.row(plan_row(plan, rank, stage));
    }
    let kv_bytes = plan.total_bytes().saturating_sub(plan.weights_bytes());
    let blank = String::new;
    table.row(vec![
        blank(),
        "all".to_owned(),
        blank(),
        plan.layer_count.to_string(),
        blank(),
        gigabytes(plan.weights_bytes()),
        gigabytes(kv_bytes),
        gigabytes(plan.total_bytes()),
        blank(),
        blank(),
    ]);
    format!("{}{table}{}", heading(plan), summary(plan))
}

fn heading(plan: &Plan) -> String {
    let strategy = match plan.chosen == plan.strategy {
        true => plan.strategy.to_string(),
        false => format!("{} (chose {})", plan.strategy, plan.chosen),
    };
    format!(
        "plan {}: {strategy}, {}sizes in GB = 1e9 bytes; step = busy share of a full pipeline's step\n",
        &plan.fingerprint_hex()[..12],
        conditions(plan),
    )
}

/// What the plan was made for, and what its times rest on: two lines.
pub(super) fn conditions(plan: &Plan) -> String {
    let times = match plan.times {
        TimeSource::Measured => "measured on these machines",
        TimeSource::Estimated => "estimated from the cluster file's bandwidths",
        TimeSource::Relative => {
            "relative, by number of cores; a run with --calibrate measures them"
        }
    };
    format!(
        "context {}, sequences {}, wire {}\ntimes: {times}\n",
        plan.context_tokens, plan.sequences, plan.wire_dtype
    )
}

fn plan_row(plan: &Plan, rank: usize, stage: &Stage) -> Vec<String> {
    let owns = match stage.role {
        Role::Only => "all",
        Role::First => "embedding",
        Role::Middle => "",
        Role::Last => "norm, head",
        Role::LastWithTable => "both ends",
    };
    vec![
        rank.to_string(),
        printable(&stage.device.name),
        ShowLayers(&stage.layers).to_string(),
        stage.layers.len().to_string(),
        owns.to_owned(),
        gigabytes(stage.footprint.weights_bytes()),
        gigabytes(stage.footprint.kv_bytes),
        gigabytes(stage.footprint.total_bytes()),
        gigabytes(stage.device.memory_limit_bytes),
        percent(plan.share_of_step(stage)),
    ]
}

fn summary(plan: &Plan) -> String {
    let full_copies_bytes = plan.full_copies_bytes();
    let saved_share = plan.memory_saved_bytes() as f64 / full_copies_bytes.max(1) as f64;
    format!(
        "balance {}; one model {} GB, {} {} GB\n\
         memory saved against a full copy on every rank: {} GB ({:.1} %)\n",
        percent(plan.balance()),
        gigabytes(plan.model_bytes),
        counted(plan.stages.len() as u64, "full copy"),
        gigabytes(full_copies_bytes),
        gigabytes(plan.memory_saved_bytes()),
        saved_share * 100.0,
    )
}

pub(super) fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// What each rank holds, by component. At most 80 columns; ends with a line break.
pub fn memory_table(plan: &Plan) -> String {
    use Align::{Left, Right};
    let mut table = Table::new(&[
        ("rank", Right),
        (ELASTIC, Left),
        ("layers", Right),
        ("embedding", Right),
        ("norm + head", Right),
        ("KV", Right),
        ("total", Right),
    ]);
    let mut sums = [0_u64; 5];
    for (rank, stage) in plan.stages.iter().enumerate() {
        let parts = components(stage);
        sums.iter_mut()
            .zip(parts)
            .for_each(|(sum, bytes)| *sum = sum.saturating_add(bytes));
        let names = vec![rank.to_string(), printable(&stage.device.name)];
        table.row(names.into_iter().chain(parts.map(gigabytes)).collect());
    }
    let names = vec![String::new(), "all".to_owned()];
    table.row(names.into_iter().chain(sums.map(gigabytes)).collect());
    format!("memory by component in GB\n{table}")
}

fn components(stage: &Stage) -> [u64; 5] {
    let held = &stage.footprint;
    let ends_bytes = held.norm_bytes.saturating_add(held.head_bytes);
    [
        held.layers_bytes,
        held.embedding_bytes,
        ends_bytes,
        held.kv_bytes,
        held.total_bytes(),
    ]
}
