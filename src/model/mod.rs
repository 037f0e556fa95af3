//! A language model as layers on the device.
//!
//! `config.json` becomes an [`Architecture`] (pure: every tensor by name, shape and kind), the
//! [`Inventory`] holds the checkpoint against it, and [`Weights`] makes arrays of exactly the tensors
//! that a rank owns. One file per `model_type` says what its family fixes; the forward pass they share is
//! that of an [`Engine`], of which there are three: MLX's kernels (`mlx`, `layer`, `linear`, `rope`, `cache`), and
//! those of this program for CPUs (`own`) and for CUDA (`cuda`).

mod architecture;
mod cache;
mod cuda;
mod engine;
mod fields;
mod files;
mod filled;
mod generation;
mod inventory;
mod layer;
mod linear;
mod llama;
mod mlx;
mod own;
mod quantization;
mod qwen2;
mod qwen3;
mod rope;
mod weights;

pub use architecture::{
    Architecture, ElementKind, Family, HeadSpec, KvNumber, LayerSpec, LinearSpec, NormSpec,
    RopeScaling, TensorSpec,
};
pub use cuda::{Cuda, compiler as cuda_compiler, devices as cuda_devices};
pub use engine::{Engine, Entering, Kernels, Leaving, Left, Part, Parts, Wanted};
pub use fields::{ConfigError, Fields};
pub use files::{ModelFiles, ModelTexts, Outline};
pub use generation::end_of_sequence_ids;
pub use inventory::{Caches, Inventory};
pub use mlx_pipe_kernels::{BLOCK_TOKENS as OWN_CACHE_BLOCK_TOKENS, Span};
pub use own::Machine;
pub use quantization::{Affine, Quantization};
pub use weights::Weights;

/// Tokens by which a cache of MLX's kernels grows.
pub const MLX_CACHE_GROWTH_TOKENS: usize = cache::BLOCK_TOKENS as usize;
