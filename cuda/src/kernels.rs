//! What a stage asks for, as launches of kernels: sizes are checked here, so that no kernel leaves its buffers.

use crate::decode::Decode;
use crate::device::{Buffer, Gpu};
use crate::launch::{Kernel, Parameter, address};
use crate::operands::{
    AttendWork, BEST_PARTS, Best, ELEMENT_BYTES, Epilogue, Input, Normed, Numbers, Pools, Rotation,
    TILE, Tiles, Weight, arrived_bytes, best_bytes, partial_bytes,
};
use crate::program::{FEW, Format, Heads, Model, Program};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Rows up to which a kernel of few rows is used.
const MOST_FEW_ROWS: usize = 64;

/// The kernels of one model on one GPU.
#[derive(Debug)]
pub struct Kernels {
    pub(crate) gpu: Arc<Gpu>,
    pub(crate) heads: Heads,
    linear: BTreeMap<Format, LinearKernels>,
    rms_norm: Kernel,
    rotate: Kernel,
    /// Through shared memory, where the GPU has enough of it; the same bits.
    attend_few: Kernel,
    attend_many: Kernel,
    best_of_parts: Kernel,
    best_of_rows: Kernel,
    /// All layers for one token, and what it is made for.
    pub(crate) decode: Option<(Kernel, Decode)>,
}

#[derive(Debug)]
struct LinearKernels {
    /// By `FEW`; to elements, and to f32.
    few: [[Kernel; 2]; FEW.len()],
    wide: [Kernel; 2],
    look_up: Kernel,
}

/// `Linear` of the kernels.
#[repr(C)]
struct Linear {
    x: u64,
    codes: u64,
    scales: u64,
    bias: u64,
    residual: u64,
    out: u64,
    m: i32,
    n: i32,
    k: i32,
    mode: i32,
}

// SAFETY: laid out as C lays out the struct of the kernels: addresses first, then numbers of 32 bits.
unsafe impl Parameter for Linear {}

const ADD_BIAS: i32 = 1;
const ADD_RESIDUAL: i32 = 2;
const GATED: i32 = 4;

impl Kernels {
    /// Compiles them, or loads what an earlier run has left in the folder `cache`.
    ///
    /// # Errors
    /// Something has no kernels, there is no compiler, or the driver fails.
    pub fn load(gpu: &Arc<Gpu>, model: &Model, cache: Option<&Path>) -> Result<Self> {
        ensure!(
            model.heads.is_supported() && model.formats.iter().all(|format| format.is_supported()),
            "{model:?} has no kernels"
        );
        let program = Program::load(gpu, model, cache)?;
        let kernel = |name: &str, threads| {
            Ok::<_, anyhow::Error>(Kernel::new(program.function(name)?, threads))
        };
        let linear = |format: &Format| {
            let of = format!("{}_{}", format.bits, format.group_size);
            let both = |name: String, shared: usize| {
                Ok::<_, anyhow::Error>([
                    kernel(&name, 256)?.with_shared(shared)?,
                    kernel(&format!("{name}_f32"), 256)?.with_shared(shared)?,
                ])
            };
            let few = |nt: usize| both(format!("linear_few_{of}_{nt}"), 0);
            let kernels = LinearKernels {
                few: [few(FEW[0])?, few(FEW[1])?, few(FEW[2])?],
                wide: both(format!("linear_wide_{of}"), format.wide_bytes())?,
                look_up: kernel(&format!("look_up_{of}"), 256)?,
            };
            Ok::<_, anyhow::Error>((*format, kernels))
        };
        let decode = |of: Decode| {
            of.shared_bytes(model.heads, gpu).map(|shared| {
                let kernel = kernel("decode", 512)?.with_shared(shared)?;
                Ok::<_, anyhow::Error>((kernel, of))
            })
        };
        Ok(Self {
            gpu: Arc::clone(gpu),
            heads: model.heads,
            decode: model.decode.and_then(decode).transpose()?,
            linear: model.formats.iter().map(linear).collect::<Result<_>>()?,
            rms_norm: kernel("rms_norm", 512)?,
            rotate: kernel("rotate", 256)?,
            attend_few: match model.heads.attend_bytes(true) {
                bytes if bytes <= gpu.shared_bytes() => {
                    kernel("attend_few_staged", 128)?.with_shared(bytes)?
                }
                _ => kernel("attend_few", 128)?.with_shared(model.heads.attend_bytes(false))?,
            },
            attend_many: kernel("attend_many", 128)?,
            best_of_parts: kernel("best_of_parts", 256)?,
            best_of_rows: kernel("best_of_rows", 32)?,
        })
    }

    /// The GPU.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Most tokens of a tile of few.
    pub fn few_tokens(&self) -> usize {
        16 / self.heads.group()
    }

    /// Most tokens of a tile of many.
    pub fn many_tokens(&self) -> usize {
        4 * self.few_tokens()
    }

    /// `x`: `[rows, inputs]` -> `out`: `[rows, outputs]` (half as wide if gated), elements, or f32 where `to_f32`. The
    /// bits of a row do not depend on the others.
    ///
    /// # Errors
    /// Buffers that are too small, or the driver fails.
    pub fn linear(
        &self,
        weight: &Weight,
        x: Input,
        rows: usize,
        epilogue: Epilogue,
        out: &Buffer,
        to_f32: bool,
    ) -> Result<()> {
        weight.check()?;
        let kernels = self
            .linear
            .get(&weight.format)
            .context("a format without kernels")?;
        let width = match epilogue {
            Epilogue::Gated => weight.outputs / 2,
            _ => weight.outputs,
        };
        let out_bytes = if to_f32 { 4 } else { ELEMENT_BYTES };
        ensure!(rows > 0 && rows < 1 << 24, "{rows} rows");
        ensure!(
            out.bytes() >= rows * width * out_bytes,
            "the output is too short"
        );
        let residual = match epilogue {
            Epilogue::Add(residual) => Some(residual),
            _ => None,
        };
        if let Some(residual) = residual {
            ensure!(
                residual.bytes() >= rows * width * ELEMENT_BYTES,
                "what is added is too short"
            );
        }
        let mode = weight.bias.as_ref().map_or(0, |_| ADD_BIAS)
            | residual.map_or(0, |_| ADD_RESIDUAL)
            | match epilogue {
                Epilogue::Gated => GATED,
                _ => 0,
            };
        ensure!(
            mode & GATED == 0 || mode == GATED,
            "a gated layer with a bias has no kernel"
        );
        let mut of = Linear {
            x: 0,
            codes: weight.codes.address(),
            scales: address(weight.scales.as_ref()),
            bias: address(weight.bias.as_ref()),
            residual: address(residual),
            out: out.address(),
            m: rows as i32,
            n: weight.outputs as i32,
            k: weight.inputs as i32,
            mode,
        };
        match x {
            Input::Plain(x) => {
                ensure!(
                    x.bytes() >= rows * weight.inputs * ELEMENT_BYTES,
                    "x is too short"
                );
                of.x = x.address();
            }
            Input::Normed(norm) => {
                self.rms_norm(norm, rows, weight.inputs)?;
                of.x = norm.into.address();
            }
        }
        let (kernel, grid) = if rows <= MOST_FEW_ROWS {
            let few = match rows {
                ..=8 => 0,
                9..=16 => 1,
                _ => 2,
            };
            let grid = [weight.outputs / 16, rows.div_ceil(8 * FEW[few]), 1];
            (&kernels.few[few], grid)
        } else {
            let grid = [weight.outputs.div_ceil(128), rows.div_ceil(64), 1];
            (&kernels.wide, grid)
        };
        // SAFETY: sizes were checked above; the kernels stay within rows, outputs and inputs.
        unsafe { kernel[to_f32 as usize].launch(&self.gpu, grid, &[&of]) }
    }

    /// Rows of a weight: `out[i] = weight[tokens[i]]`, `[tokens, inputs]`.
    ///
    /// # Errors
    /// As [`Self::linear`]. That the tokens are rows of the weight is the caller's to see to.
    pub fn look_up(&self, weight: &Weight, tokens: Numbers, out: &Buffer) -> Result<()> {
        weight.check()?;
        ensure!(
            out.bytes() >= tokens.count * weight.inputs * ELEMENT_BYTES,
            "the output is too short"
        );
        let kernels = self
            .linear
            .get(&weight.format)
            .context("a format without kernels")?;
        // SAFETY: sizes were checked above.
        unsafe {
            kernels.look_up.launch(
                &self.gpu,
                [tokens.count, 1, 1],
                &[
                    &weight.codes.address(),
                    &address(weight.scales.as_ref()),
                    &tokens.address(tokens.count)?,
                    &out.address(),
                    &(weight.inputs as i32),
                ],
            )
        }
    }

    /// Of `count` rows of `width` elements.
    fn rms_norm(&self, norm: Normed, count: usize, width: usize) -> Result<()> {
        norm.check(count, width)?;
        ensure!(
            norm.into.bytes() >= count * width * ELEMENT_BYTES,
            "there is no room for what is normed"
        );
        // SAFETY: sizes were checked above.
        unsafe {
            self.rms_norm.launch(
                &self.gpu,
                [count, 1, 1],
                &[
                    &norm.x.address(),
                    &norm.weight.address(),
                    &norm.row_numbers(count)?,
                    &norm.into.address(),
                    &(width as i32),
                    &norm.eps,
                ],
            )
        }
    }

    /// Norms and rotates the queries and keys of `qkv` (`[rows, (queries + 2 kv) * head_dim]`) -> `queries`
    /// (`[rows, heads, head_dim]`); keys and values go to their places in the pools.
    ///
    /// # Errors
    /// Buffers that are too small, or the driver fails. That places are in the pools is the caller's to see to.
    pub fn rotate(
        &self,
        qkv: &Buffer,
        rotation: Rotation,
        queries: &Buffer,
        pools: &Pools,
        rows: usize,
    ) -> Result<()> {
        let heads = self.heads;
        ensure!(
            qkv.bytes() >= rows * heads.qkv_width() * ELEMENT_BYTES,
            "qkv is too short"
        );
        ensure!(
            queries.bytes() >= rows * heads.queries * heads.dim * ELEMENT_BYTES,
            "there is no room for the queries"
        );
        ensure!(
            rotation.frequencies.bytes() >= heads.dim / 2 * 4,
            "too few frequencies"
        );
        ensure!(
            rotation.norms.is_some() == heads.has_norm,
            "norms of queries and keys"
        );
        let (q_norm, k_norm) = rotation.norms.unzip();
        for norm in [q_norm, k_norm].into_iter().flatten() {
            ensure!(
                norm.bytes() >= heads.dim * ELEMENT_BYTES,
                "a norm that is too short"
            );
        }
        let warps = rows * (heads.queries + 2 * heads.kv);
        // SAFETY: sizes were checked above.
        unsafe {
            self.rotate.launch(
                &self.gpu,
                [warps.div_ceil(8), 1, 1],
                &[
                    &qkv.address(),
                    &address(q_norm),
                    &address(k_norm),
                    &rotation.frequencies.address(),
                    &rotation.places.address(2 * rows)?,
                    &queries.address(),
                    &pools.keys.address(),
                    &pools.values.address(),
                    &(rows as i32),
                    &rotation.eps,
                ],
            )
        }
    }

    /// Causal attention: `queries`, `out`: `[rows, heads, head_dim]`. The bits of a token do not depend on how it is tiled.
    ///
    /// # Errors
    /// Buffers that are too small, or the driver fails. That tiles and tables are right is the caller's to see to.
    pub fn attend(
        &self,
        queries: &Buffer,
        pools: &Pools,
        tiles: Tiles,
        work: AttendWork,
        out: &Buffer,
        rows: usize,
    ) -> Result<()> {
        let heads = self.heads;
        let bytes = rows * heads.queries * heads.dim * ELEMENT_BYTES;
        ensure!(
            queries.bytes() >= bytes && out.bytes() >= bytes,
            "a buffer is too short"
        );
        let table = tiles.table.address(tiles.table.count)?;
        let many = tiles.many.count / TILE;
        if many > 0 {
            // SAFETY: sizes were checked above.
            unsafe {
                self.attend_many.launch(
                    &self.gpu,
                    [many, heads.kv, 1],
                    &[
                        &queries.address(),
                        &pools.keys.address(),
                        &pools.values.address(),
                        &tiles.many.address(TILE * many)?,
                        &table,
                        &out.address(),
                    ],
                )?;
            }
        }
        let few = tiles.few.count / TILE;
        if few > 0 {
            ensure!(
                work.partial.bytes() >= partial_bytes(heads, tiles.few_tokens, tiles.parts)
                    && work.arrived.bytes() >= arrived_bytes(heads, few),
                "there is no room for partial results"
            );
            let at = tiles.few.address(TILE * few)?;
            // SAFETY: sizes were checked above.
            unsafe {
                self.attend_few.launch(
                    &self.gpu,
                    [few, heads.kv, tiles.parts],
                    &[
                        &queries.address(),
                        &pools.keys.address(),
                        &pools.values.address(),
                        &at,
                        &table,
                        &work.partial.address(),
                        &work.arrived.address(),
                        &out.address(),
                    ],
                )?;
            }
        }
        Ok(())
    }

    /// The best of the first `width` of each row of `logits` (`[rows, stride]`, f32) -> `out`: `[rows]`, each as
    /// [`Best::from_bytes`] reads it. `work`: [`best_bytes`] of memory.
    ///
    /// # Errors
    /// Buffers that are too small, or the driver fails.
    pub fn best(
        &self,
        logits: &Buffer,
        rows: usize,
        [width, stride]: [usize; 2],
        work: &Buffer,
        out: &Buffer,
    ) -> Result<()> {
        ensure!(
            width <= stride
                && logits.bytes() >= rows * stride * 4
                && work.bytes() >= best_bytes(rows)
                && out.bytes() >= rows * Best::BYTES,
            "a buffer is too short"
        );
        // SAFETY: sizes were checked above.
        unsafe {
            self.best_of_parts.launch(
                &self.gpu,
                [BEST_PARTS, rows, 1],
                &[
                    &logits.address(),
                    &(width as i32),
                    &(stride as i32),
                    &work.address(),
                ],
            )?;
            self.best_of_rows.launch(
                &self.gpu,
                [rows, 1, 1],
                &[&work.address(), &(BEST_PARTS as i32), &out.address()],
            )
        }
    }
}
