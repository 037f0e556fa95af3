//! What a step is to every layer: whose rows are where, and at which positions they stand.

/// The rows of a step that belong to one sequence, and where they stand in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First row of the step's rows.
    pub row: usize,
    /// Rows.
    pub count: usize,
    /// Position of the first row in its sequence.
    pub start: usize,
}

/// Cosines and sines of a step's positions.
#[derive(Debug, Default)]
pub struct Rotation {
    /// Pairs of a head.
    pub(crate) pairs: usize,
    /// `[tokens, pairs]`
    pub(crate) cosines: Vec<f32>,
    /// `[tokens, pairs]`
    pub(crate) sines: Vec<f32>,
}

impl Rotation {
    /// Angle of pair `i` of a token at position `p`: `p * frequencies[i]`, in radians.
    pub fn new(frequencies: &[f64], spans: &[Span]) -> Self {
        let positions = spans
            .iter()
            .flat_map(|span| span.start..span.start + span.count);
        let angles = positions.flat_map(|position| {
            frequencies
                .iter()
                .map(move |frequency| position as f64 * frequency)
        });
        let (sines, cosines) = angles
            .map(|angle| {
                let (sine, cosine) = angle.sin_cos();
                (sine as f32, cosine as f32)
            })
            .unzip();
        Self {
            pairs: frequencies.len(),
            cosines,
            sines,
        }
    }
}

/// What a step asks of attention in every layer.
#[derive(Debug)]
pub struct Step {
    /// Each sequence's rows, in the order of the rows.
    pub spans: Vec<Span>,
    /// Of all rows.
    pub rotation: Rotation,
}
