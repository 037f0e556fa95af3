//! Where a tied table is to stand, when the user leaves it to the plan.
//!
//! Separate because it plans twice and compares predictions, which no strategy does.

use super::predict::clearly_faster;
use super::{Head, ModelShape, Plan, PlanError, PlanRequest, Predictor, plan};

/// Makes the plan, and where the request's table is tied and held once, asks whether both ends should hold
/// it: if that fits on every rank and is predicted to be faster by 5 % or more, to the first token of a
/// prompt of [`Plan::sample_prompt_tokens`] or in tokens a second of one sequence. Without known costs and links
/// once is once: memory is what it saves for certain.
///
/// # Errors
///
/// Those of [`plan`]. Where the table once does not fit, twice does not either.
pub fn plan_choosing_table(request: &PlanRequest<'_>) -> Result<Plan, PlanError> {
    let once = plan(request)?;
    if request.shape.head != Head::TiedOnce {
        return Ok(once);
    }
    let shape = ModelShape {
        head: Head::Tied,
        ..request.shape.clone()
    };
    let both = plan(&PlanRequest {
        shape: &shape,
        ..request.clone()
    });
    match both {
        Ok(both) if is_worth_it(&once, &both) => Ok(both),
        _ => Ok(once),
    }
}

fn is_worth_it(once: &Plan, both: &Plan) -> bool {
    let prompt_tokens = once.sample_prompt_tokens();
    let (Some((once, once_chunk)), Some((both, both_chunk))) = (predictor(once), predictor(both))
    else {
        return false;
    };
    let first_token_ns = [(&once, once_chunk), (&both, both_chunk)]
        .map(|(plan, chunk)| plan.first_token_ns(prompt_tokens, chunk));
    let decode_ns = [&once, &both].map(|plan| plan.decode_ns(prompt_tokens));
    [first_token_ns, decode_ns]
        .into_iter()
        .any(|[once_ns, both_ns]| clearly_faster(both_ns, once_ns))
}

/// What predicts a plan's times, and the prompt tokens a step that are best for it.
fn predictor(plan: &Plan) -> Option<(Predictor<'_>, u64)> {
    Some((plan.predictor()?, plan.best_prefill_chunk()?))
}
