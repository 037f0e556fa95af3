//! What a plan is predicted to do, for people: the block below the tables of `mlx-pipe plan`, and the
//! table of `--what-if`. At most 80 columns.

use super::table::{Align, Table, conditions, gigabytes, percent, printable, shorten, size};
use super::{Gain, ModelShape, Plan, PlanError, Prediction, RankNeed, StageTime, TimeSource};

/// Widest line in characters.
const WIDTH: usize = 80;

/// Predicted times and the room left, a line each; ends with a line break. `shape` is the model that was
/// planned for.
pub fn outlook(plan: &Plan, shape: &ModelShape, longest_context_tokens: u64) -> String {
    let prediction = prediction_lines(plan).into_iter();
    let room = room_lines(plan, shape, longest_context_tokens);
    let line = |(label, text): (&str, String)| format!("{label:<17}{text}\n");
    prediction.chain(room).map(line).collect()
}

fn prediction_lines(plan: &Plan) -> Vec<(&'static str, String)> {
    let Some(slowest_ns) = plan.slowest().and_then(StageTime::ns) else {
        return Vec::new();
    };
    let tokens = plan.sample_prompt_tokens();
    let idle = |share: f64| format!("ranks idle {}", percent(share));
    let full = |per_s: f64, idle_share: f64| {
        let text = format!("{} tokens/s, {}", rate(per_s), idle(idle_share));
        ("full pipeline", text)
    };
    match plan.predicted() {
        None => vec![
            (
                "one stream",
                "not known without the links' times (`link` in the cluster file)".to_owned(),
            ),
            full(1e9 / slowest_ns.max(1) as f64, 1.0 - plan.balance()),
        ],
        Some(Prediction {
            time_to_first_token_s,
            prefill_tokens_per_s,
            decode_tokens_per_s,
            pipeline_tokens_per_s,
            idle_share_one,
            idle_share_full,
        }) => vec![
            (
                "first token",
                format!(
                    "{} s after {tokens} prompt tokens ({} a second)",
                    seconds(time_to_first_token_s),
                    rate(prefill_tokens_per_s)
                ),
            ),
            (
                "one stream",
                format!(
                    "{} tokens/s, {}",
                    rate(decode_tokens_per_s),
                    idle(idle_share_one)
                ),
            ),
            full(pipeline_tokens_per_s, idle_share_full),
        ],
    }
}

fn room_lines(
    plan: &Plan,
    shape: &ModelShape,
    longest_context_tokens: u64,
) -> [(&'static str, String); 2] {
    let (ours, best) = (
        plan.capacity(shape, longest_context_tokens),
        plan.best_capacity(shape, longest_context_tokens),
    );
    let by_another_cut = |ours: u64, best: u64| match ours == best {
        true => String::new(),
        false => format!(" ({best} by another cut)"),
    };
    let context = format!(
        "{} at 1 sequence{}{}",
        ours.context_tokens,
        match ours.context_tokens == longest_context_tokens {
            true => ", the model's",
            false => "",
        },
        by_another_cut(ours.context_tokens, best.context_tokens)
    );
    let sequences = format!(
        "{} at context {}{}",
        ours.sequences,
        plan.context_tokens,
        by_another_cut(ours.sequences, best.sequences)
    );
    [("longest context", context), ("most sequences", sequences)]
}

/// How fast the ranks would be without one of `hosts`, whichever, and how to cut then; ends with a line break.
pub fn without_line(hosts: &[&str], gain: Gain, fewer: &Plan) -> String {
    let one = gain.one_stream_per_mille;
    let one = one.map_or_else(String::new, |per_mille| {
        format!("one stream {}, ", times(per_mille))
    });
    let head = format!(
        "without {}: {one}full pipeline {}",
        shorten(&printable(&hosts.join(" or ")), 34),
        times(gain.pipeline_per_mille)
    );
    // Ranges of many ranks are long, and are to be copied: they keep to one line of their own.
    format!("{head}\n  --layers {}\n", fewer.layer_ranges())
}

/// `1.25 x`
fn times(per_mille: u64) -> String {
    format!("{}.{:02} x", per_mille / 1000, per_mille % 1000 / 10)
}

/// The plans for the first one, two, three ranks and so on, a line each; ends with a line break. An entry
/// is the number of ranks and the plan for them, or why there is none.
pub fn what_if_table(plans: &[(usize, Result<Plan, PlanError>)]) -> String {
    use Align::{Left, Right};
    let mut table = Table::new(&[
        ("ranks", Right),
        ("split", Left),
        ("fullest", Right),
        ("stream", Right),
        ("pipeline", Right),
        ("first token", Right),
    ]);
    let first_fitting = plans.iter().find_map(|(_, plan)| plan.as_ref().ok());
    let unit = first_fitting.and_then(Plan::slowest);
    for (ranks, plan) in plans {
        let cells = match plan {
            Ok(plan) => fitting_cells(plan, unit),
            Err(error) => {
                let nothing = || "-".to_owned();
                [reason(error), nothing(), nothing(), nothing(), nothing()]
            }
        };
        table.row([ranks.to_string()].into_iter().chain(cells).collect());
    }
    let conditions = first_fitting.map_or_else(String::new, conditions);
    let relative = plans.iter().flat_map(|(_, plan)| plan);
    let is_relative = relative
        .into_iter()
        .any(|plan| plan.times == TimeSource::Relative);
    let speeds = match is_relative {
        true => "speed against that of the first that fits",
        false => "in tokens a second",
    };
    format!(
        "{conditions}with the first ranks only: fullest rank in GB, one stream and full pipeline\n({speeds})\n{table}"
    )
}

/// Split, fullest rank, one stream, full pipeline, first token.
fn fitting_cells(plan: &Plan, unit: Option<StageTime>) -> [String; 5] {
    let counts = plan
        .stages
        .iter()
        .map(|stage| stage.layers.len().to_string());
    let fullest_bytes = plan
        .stages
        .iter()
        .map(|stage| stage.footprint.total_bytes());
    let prediction = plan.predicted();
    let known = |figure: fn(&Prediction) -> String| {
        prediction.as_ref().map_or_else(|| "-".to_owned(), figure)
    };
    let pipeline = match (plan.slowest(), unit) {
        (Some(StageTime::Nanoseconds(ns)), _) => rate(1e9 / ns.max(1) as f64),
        (Some(slowest), Some(unit)) => format!("{:.2} x", unit.share_of(slowest)),
        _ => "-".to_owned(),
    };
    [
        counts.collect::<Vec<_>>().join("/"),
        gigabytes(fullest_bytes.max().unwrap_or(0)),
        known(|figures| rate(figures.decode_tokens_per_s)),
        pipeline,
        known(|figures| format!("{} s", seconds(figures.time_to_first_token_s))),
    ]
}

/// Why there is no plan, shortly.
fn reason(error: &PlanError) -> String {
    match error {
        PlanError::DoesNotFit(shortfall) => {
            let lacks = shortfall.ranks.iter().map(RankNeed::lack_bytes);
            format!("does not fit: lacks {}", size(lacks.max().unwrap_or(0)))
        }
        other => shorten(&printable(&other.to_string()), WIDTH),
    }
}

/// A number a second with about three digits.
fn rate(per_s: f64) -> String {
    match per_s {
        ..10.0 => format!("{per_s:.2}"),
        ..100.0 => format!("{per_s:.1}"),
        _ => format!("{per_s:.0}"),
    }
}

/// Seconds with about three digits.
fn seconds(s: f64) -> String {
    match s {
        ..10.0 => format!("{s:.3}"),
        _ => rate(s),
    }
}
