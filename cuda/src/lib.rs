//! The CUDA kernels of `mlx-pipe`.
//!
//! MLX's CUDA backend spends more time on building and encoding its graph than the GPU on a decoding step, reads a
//! quantised weight again for each of a few rows, and its results depend on what is computed together. These kernels
//! are launched straight through the driver, read weights once for up to 32 rows, and give a token the same bits in
//! whatever company.
//!
//! [`Gpu`] and [`Buffer`] are the device and its memory, [`Kernels`] what can be computed, for one [`Model`]. Driver and
//! run-time compiler are looked for when the program runs, so that one binary runs with and without a GPU.

#![deny(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]

mod decode;
mod device;
mod kernels;
mod launch;
mod layout;
mod library;
mod operands;
mod program;

pub use decode::{Decode, DecodeWork, LayerOperands, PROGRESS_BYTES, decode_partial_bytes};
pub use device::{Buffer, Gpu, Pinned, Recording, count};
pub use kernels::Kernels;
pub use layout::{arrange_codes, arrange_scales};
pub use library::VARIABLE;
pub use operands::{
    AttendWork, Best, ELEMENT_BYTES, Epilogue, Input, Normed, Numbers, Pools, Rotation, TILE,
    Tiles, Weight, arrived_bytes, best_bytes, partial_bytes, parts,
};
pub use program::{Element, Format, Heads, Model, PAGE_TOKENS, compiler};
