//! Whether the ranks would be faster without one of them.
//!
//! A slow host in a pipeline still gets a layer, and every host adds links to each token's way. The
//! other plan is made elsewhere; here the two are compared.

use super::predict::clearly_faster;
use super::{Plan, StageTime};

/// What leaving ranks out gains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gain {
    /// Speed of one sequence, in thousandths of what it is now; `None` where it is not known.
    pub one_stream_per_mille: Option<u64>,
    /// Speed of a full pipeline, in thousandths of what it is now.
    pub pipeline_per_mille: u64,
}

/// What `fewer`, a plan for some of `all`'s ranks, gains over `all`; `None` unless one sequence gets
/// faster by 5 % or more, or the full pipeline at all.
pub fn gain_of_fewer(all: &Plan, fewer: &Plan) -> Option<Gain> {
    let (now, then) = (all.slowest()?, fewer.slowest()?);
    let prompt_tokens = all.sample_prompt_tokens();
    let decode_ns = all
        .predictor()
        .zip(fewer.predictor())
        .map(|(all, fewer)| [&all, &fewer].map(|plan| plan.decode_ns(prompt_tokens)));
    let is_clear = decode_ns.is_some_and(|[now_ns, then_ns]| clearly_faster(then_ns, now_ns));
    (then < now || is_clear).then(|| Gain {
        one_stream_per_mille: decode_ns.map(|[now_ns, then_ns]| per_mille(now_ns, then_ns)),
        pipeline_per_mille: speed_per_mille(now, then),
    })
}

fn per_mille(numerator: u64, denominator: u64) -> u64 {
    let share = u128::from(numerator) * 1000 / u128::from(denominator.max(1));
    u64::try_from(share).unwrap_or(u64::MAX)
}

/// For printing.
fn speed_per_mille(now: StageTime, then: StageTime) -> u64 {
    (now.share_of(then) * 1000.0) as u64
}
