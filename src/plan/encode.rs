//! The plan as bytes for the fingerprint that ranks compare, and as JSON for the report.
//!
//! The bytes are spelled out here and do not go through `Hash`, `Debug` or serde, all of which may
//! change with a compiler or a crate: ranks built apart must still agree.

use serde::{Serialize, Serializer};
use sha2::{Digest, Sha256};

use super::{Footprint, Plan, Stage};

/// First bytes of the encoding. Raise the number whenever a field is added or changes meaning.
const MAGIC: &[u8] = b"mlx-pipe plan 1\0";

impl Plan {
    /// Every field of the plan as bytes: integers as little-endian u64, texts with their length
    /// before them. Equal plans give equal bytes, differing plans differing ones.
    pub fn canonical_bytes(&self) -> Vec<u8> {
        let mut out = Encoder(MAGIC.to_vec());
        out.text(self.strategy.name());
        out.text(self.chosen.name());
        out.text(self.wire_dtype.name());
        out.number(self.layer_count as u64);
        out.number(self.model_bytes);
        out.number(self.context_tokens);
        out.number(self.sequences);
        out.number(self.stages.len() as u64);
        self.stages.iter().for_each(|stage| out.stage(stage));
        out.0
    }

    /// SHA-256 of [`Plan::canonical_bytes`].
    pub fn fingerprint(&self) -> [u8; 32] {
        Sha256::digest(self.canonical_bytes()).into()
    }

    /// [`Plan::fingerprint`] in 64 hexadecimal digits.
    pub fn fingerprint_hex(&self) -> String {
        self.fingerprint()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

struct Encoder(Vec<u8>);

impl Encoder {
    fn number(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn text(&mut self, value: &str) {
        self.number(value.len() as u64);
        self.0.extend_from_slice(value.as_bytes());
    }

    fn stage(&mut self, stage: &Stage) {
        self.text(&stage.device.name);
        self.number(stage.device.memory_limit_bytes);
        self.number(stage.device.speed);
        self.number(stage.layers.start as u64);
        self.number(stage.layers.end as u64);
        self.number(stage.role.owns().len() as u64);
        stage
            .role
            .owns()
            .iter()
            .for_each(|component| self.text(component));
        self.footprint(&stage.footprint);
        self.number(stage.time.bytes);
        self.number(stage.time.speed);
    }

    fn footprint(&mut self, footprint: &Footprint) {
        // Taken apart by name, so that a new field cannot be forgotten here.
        let Footprint {
            layers_bytes,
            embedding_bytes,
            norm_bytes,
            head_bytes,
            kv_bytes,
        } = *footprint;
        let parts = [
            layers_bytes,
            embedding_bytes,
            norm_bytes,
            head_bytes,
            kv_bytes,
        ];
        parts.into_iter().for_each(|bytes| self.number(bytes));
    }
}

/// The report's `plan` object.
#[derive(Serialize)]
struct PlanJson<'a> {
    strategy: &'static str,
    chosen: &'static str,
    hash: String,
    wire_dtype: &'static str,
    layer_count: usize,
    context_tokens: u64,
    sequences: u64,
    model_bytes: u64,
    weights_bytes: u64,
    total_bytes: u64,
    memory_saved_bytes: u64,
    balance: f64,
    ranks: Vec<StageJson<'a>>,
}

/// One entry of the plan's `ranks`.
#[derive(Serialize)]
struct StageJson<'a> {
    rank: usize,
    host: &'a str,
    /// First and last layer, both included.
    layers: [usize; 2],
    owns: &'static [&'static str],
    planned_bytes: u64,
    footprint: Footprint,
    memory_limit_bytes: u64,
    share_of_step: f64,
}

impl Serialize for Plan {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let stages = self.stages.iter().enumerate();
        let json = PlanJson {
            strategy: self.strategy.name(),
            chosen: self.chosen.name(),
            hash: self.fingerprint_hex(),
            wire_dtype: self.wire_dtype.name(),
            layer_count: self.layer_count,
            context_tokens: self.context_tokens,
            sequences: self.sequences,
            model_bytes: self.model_bytes,
            weights_bytes: self.weights_bytes(),
            total_bytes: self.total_bytes(),
            memory_saved_bytes: self.memory_saved_bytes(),
            balance: self.balance(),
            ranks: stages
                .map(|(rank, stage)| self.stage_json(rank, stage))
                .collect(),
        };
        json.serialize(serializer)
    }
}

impl Plan {
    fn stage_json<'a>(&self, rank: usize, stage: &'a Stage) -> StageJson<'a> {
        StageJson {
            rank,
            host: &stage.device.name,
            layers: [stage.layers.start, stage.layers.end.saturating_sub(1)],
            owns: stage.role.owns(),
            planned_bytes: stage.footprint.weights_bytes(),
            footprint: stage.footprint,
            memory_limit_bytes: stage.device.memory_limit_bytes,
            share_of_step: self.share_of_step(stage),
        }
    }
}
