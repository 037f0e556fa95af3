//! The plan as bytes, for the fingerprint that ranks compare.
//!
//! The bytes are spelled out here and do not go through `Hash`, `Debug` or serde, all of which may
//! change with a compiler or a crate: ranks built apart must still agree.

use sha2::{Digest, Sha256};

use super::{Footprint, Plan, Stage};

/// First bytes of the encoding. Raise the number whenever a field is added or changes meaning.
const MAGIC: &[u8] = b"mlx-pipe plan 2\0";

impl Plan {
    /// Every field of the plan as bytes: integers as little-endian u64, texts with their length
    /// before them. Equal plans give equal bytes, differing plans differing ones.
    pub fn canonical_bytes(&self) -> Vec<u8> {
        let mut out = Encoder(MAGIC.to_vec());
        out.text(self.strategy.name());
        out.text(self.chosen.name());
        out.text(self.wire_dtype.name());
        out.text(self.lookup.name());
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
        hex::encode(self.fingerprint())
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
