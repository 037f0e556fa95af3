//! A language model as layers on the device.
//!
//! `config.json` becomes an [`Architecture`] (pure: every tensor by name, shape and kind), the
//! [`Inventory`] holds the checkpoint against it, and [`Weights`] makes arrays of exactly the tensors
//! that a rank owns. One file per `model_type` says what its family fixes; [`Layer`] is the forward
//! pass that they share.

mod architecture;
mod cache;
mod fields;
mod files;
mod filled;
mod generation;
mod inventory;
mod layer;
mod linear;
mod llama;
mod quantization;
mod qwen2;
mod qwen3;
mod rope;
mod weights;

pub use architecture::{
    Architecture, ElementKind, Family, HeadSpec, LayerSpec, LinearSpec, NormSpec, RopeScaling,
    TensorSpec,
};
pub use cache::{BLOCK_TOKENS, KvShape, LayerCache};
pub use fields::{ConfigError, Fields};
pub use files::{ModelFiles, ModelTexts, Outline};
pub use generation::end_of_sequence_ids;
pub use inventory::Inventory;
pub use layer::{Layer, Span};
pub use linear::{Linear, RmsNorm};
pub use quantization::{Affine, Quantization};
pub use rope::Rope;
pub use weights::Weights;
