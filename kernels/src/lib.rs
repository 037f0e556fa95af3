//! The CPU kernels of `mlx-pipe`.
//!
//! MLX's own CPU backend has no vector instructions on x86 and one thread; these kernels read a quantised
//! weight about as fast as memory gives it. They are used where the device is a CPU, and nowhere else.
//!
//! [`Quantized`] and [`Plain`] are weights, repacked as they are loaded; [`Rows`] the activations made ready
//! for them; [`multiply`] and its kin the linear layers; [`KvCache`] and [`attend`] attention; [`Layer`] puts
//! them together. `arch` is what they ask of a processor, [`Isa`] chooses, [`Pool`] has the threads;
//! `primitive` makes an MLX array of a computation.
//!
//! Two things hold for all of them. A token's result is the same to the bit, whatever tokens are computed with it,
//! in whatever chunks, on however many threads. And all instruction sets give the same bits.

#![deny(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]

mod ahead;
mod arch;
mod attention;
mod block;
mod isa;
mod kv_cache;
mod layer;
mod linear;
mod math;
mod memory;
mod plain;
mod pool;
#[cfg(feature = "primitive")]
pub mod primitive;
mod quantized;
mod rows;
mod step;
mod unpack;

#[cfg(test)]
mod tests;

pub use attention::{Attention, attend};
pub use isa::{Isa, VARIABLE};
pub use kv_cache::{BLOCK_TOKENS, HeadShape, Kept, KvCache};
pub use layer::{Layer, Scratch};
pub use linear::{Linear, Weight, multiply, multiply_gated, wanted};
pub use plain::{Plain, PlainShape};
pub use pool::Pool;
pub use quantized::{FloatType, PackedRows, Quantized, QuantizedShape};
pub use rows::{Norm, Rows, Wanted};
pub use step::{Rotation, Span, Step};
