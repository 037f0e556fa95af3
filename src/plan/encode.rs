//! The plan as bytes, for the fingerprint that ranks compare.
//!
//! The bytes are spelled out here and do not go through `Hash`, `Debug` or serde, all of which may
//! change with a compiler or a crate: ranks built apart must still agree.

use sha2::{Digest, Sha256};

use super::{DeviceCost, Footprint, LinkCost, LinkCosts, Plan, Stage, StageTime};

/// First bytes of the encoding. Raise the number whenever a field is added or changes meaning.
const MAGIC: &[u8] = b"mlx-pipe plan 3\0";

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
        out.number(self.hidden_row_bytes);
        out.text(self.times.name());
        out.option(self.links.as_ref(), Encoder::links);
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

    /// Whether it is there, and then what it is.
    fn option<T>(&mut self, value: Option<&T>, encode: impl FnOnce(&mut Self, &T)) {
        self.number(value.is_some().into());
        if let Some(value) = value {
            encode(self, value);
        }
    }

    fn stage(&mut self, stage: &Stage) {
        self.text(&stage.device.name);
        self.number(stage.device.memory_limit_bytes);
        self.number(stage.device.speed);
        self.option(stage.device.cost.as_ref(), Self::cost);
        self.number(stage.layers.start as u64);
        self.number(stage.layers.end as u64);
        self.number(stage.role.owns().len() as u64);
        stage
            .role
            .owns()
            .iter()
            .for_each(|component| self.text(component));
        self.footprint(&stage.footprint);
        self.time(stage.time);
    }

    fn time(&mut self, time: StageTime) {
        let (kind, first, second) = match time {
            StageTime::Nanoseconds(ns) => (0, ns, 1),
            StageTime::Relative { bytes, speed } => (1, bytes, speed),
        };
        [kind, first, second]
            .into_iter()
            .for_each(|number| self.number(number));
    }

    fn cost(&mut self, cost: &DeviceCost) {
        let DeviceCost {
            layer,
            layer_bytes,
            context_ns,
            head_ns,
            step_ns,
            crowding_per_mille,
        } = cost;
        self.number(layer.len() as u64);
        for point in layer {
            self.number(point.tokens);
            self.number(point.ns);
        }
        let numbers = [
            layer_bytes,
            context_ns,
            head_ns,
            step_ns,
            crowding_per_mille,
        ];
        numbers.into_iter().for_each(|number| self.number(*number));
    }

    fn links(&mut self, links: &LinkCosts) {
        self.number(links.forward.len() as u64);
        links.forward.iter().for_each(|link| self.link(link));
        self.link(&links.back);
    }

    fn link(&mut self, link: &LinkCost) {
        self.number(link.latency_ns);
        self.number(link.bytes_per_s);
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
