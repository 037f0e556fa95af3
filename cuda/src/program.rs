//! The kernels as one program for one model on one kind of GPU: put together from `sources/`, compiled when they are
//! first needed, and kept on disk for the next time.

use crate::decode::{Decode, Target};
use crate::device::Gpu;
use crate::library;
use anyhow::{Context, Result, anyhow, bail};
use cudarc::driver::{CudaFunction, CudaModule};
use cudarc::nvrtc::{Ptx, result as nvrtc, sys};
use std::collections::BTreeSet;
use std::ffi::CString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use tracing::{info, warn};

const SOURCES: [&str; 8] = [
    include_str!("sources/common.cuh"),
    include_str!("sources/rows.cuh"),
    include_str!("sources/linear.cuh"),
    include_str!("sources/attend.cuh"),
    include_str!("sources/decode/step.cuh"),
    include_str!("sources/decode/weights.cuh"),
    include_str!("sources/decode/attend.cuh"),
    include_str!("sources/decode/layers.cuh"),
];

/// Tokens of a page of keys and values.
pub const PAGE_TOKENS: usize = 64;

/// What activations, norms and scales are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Element {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl Element {
    fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "Bf16",
            Self::F16 => "F16",
        }
    }
}

/// What a weight is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Format {
    /// 4 or 8: codes, low bits first in words of 32; 16: elements.
    pub bits: usize,
    /// Codes of a row that share a scale and a bias: 32, 64 or 128.
    pub group_size: usize,
}

impl Format {
    /// Elements of the activations' type.
    pub const PLAIN: Self = Self {
        bits: 16,
        group_size: 64,
    };

    /// Whether there are kernels for it.
    pub fn is_supported(self) -> bool {
        self == Self::PLAIN
            || (matches!(self.bits, 4 | 8) && matches!(self.group_size, 32 | 64 | 128))
    }

    /// Elements that are multiplied at a time: the width of a weight is a multiple.
    pub fn block(self) -> usize {
        self.group_size.min(64)
    }

    /// Shared memory of a thread block of the kernel of many rows (`Wide::BYTES` of the kernels): some blocks of 64 rows
    /// of activations, which stand 16 bytes apart, and of 128 rows of codes.
    pub(crate) fn wide_bytes(self) -> usize {
        let stages = if self == Self::PLAIN { 3 } else { 4 };
        stages * (64 * (self.block() * 2 + 16) + 128 * self.block() * self.bits / 8)
    }

    fn names(self) -> (usize, usize) {
        (self.bits, self.group_size)
    }
}

/// The heads of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Heads of queries.
    pub queries: usize,
    /// Heads of keys and of values.
    pub kv: usize,
    /// Width of a head.
    pub dim: usize,
    /// Queries and keys are normed over a head.
    pub has_norm: bool,
}

impl Heads {
    /// Query heads that share a kv head.
    pub fn group(self) -> usize {
        self.queries / self.kv
    }

    /// Whether there are kernels for them.
    pub fn is_supported(self) -> bool {
        matches!(self.dim, 64 | 128)
            && self.kv > 0
            && self.queries.is_multiple_of(self.kv)
            && self.group() <= 16
    }

    /// Shared memory of a thread block of the attention of few tokens: four pages of keys and values, or only what
    /// becomes of them.
    pub(crate) fn attend_bytes(self, is_staged: bool) -> usize {
        match is_staged {
            true => 4 * 2 * (PAGE_TOKENS * (self.dim + 8) + self.dim * (PAGE_TOKENS + 8)),
            false => 4 * 4 * 16 * (self.dim + 4),
        }
    }

    /// Width of what one token makes of queries, keys and values together.
    pub fn qkv_width(self) -> usize {
        (self.queries + 2 * self.kv) * self.dim
    }
}

/// What the kernels are to compute.
#[derive(Debug, Clone)]
pub struct Model {
    /// Activations.
    pub element: Element,
    /// Formats of the weights.
    pub formats: BTreeSet<Format>,
    /// Attention.
    pub heads: Heads,
    /// The layers, if there is to be a kernel for steps of one token.
    pub decode: Option<Decode>,
}

/// Rows of `x` for which there is a kernel of few rows, in eights.
pub(crate) const FEW: [usize; 3] = [1, 2, 4];

impl Model {
    /// For a GPU of this kind.
    fn source(&self, target: Target) -> Result<String> {
        let Heads {
            queries,
            kv,
            dim,
            has_norm,
        } = self.heads;
        let (element, group) = (self.element.name(), self.heads.group());
        let mut text = format!("constexpr int PAGE = {PAGE_TOKENS};\n");
        SOURCES.iter().for_each(|source| text.push_str(source));
        let kernel = |text: &mut String,
                      threads: &str,
                      name: &str,
                      parameters: &str,
                      body: &str| {
            writeln!(
                text,
                "extern \"C\" __global__ void __launch_bounds__({threads}) {name}({parameters}) {{ {body} }}"
            )
        };
        for format in &self.formats {
            let (bits, of_group) = format.names();
            for (suffix, out) in [("", element), ("_f32", "float")] {
                let parameters = format!("Linear<{element}, {out}> of");
                for nt in FEW {
                    let name = format!("linear_few_{bits}_{of_group}_{nt}{suffix}");
                    let body =
                        format!("linear_few<{element}, {out}, {bits}, {of_group}, {nt}>(of);");
                    kernel(&mut text, "256, 2", &name, &parameters, &body)?;
                }
                let name = format!("linear_wide_{bits}_{of_group}{suffix}");
                let body = format!("linear_wide<{element}, {out}, {bits}, {of_group}>(of);");
                kernel(&mut text, "256", &name, &parameters, &body)?;
            }
            kernel(
                &mut text,
                "256",
                &format!("look_up_{bits}_{of_group}"),
                &format!(
                    "const unsigned char* codes, const {element}* scales, const int* tokens, {element}* out, int k"
                ),
                &format!("look_up<{element}, {bits}, {of_group}>(codes, scales, tokens, out, k);"),
            )?;
        }
        kernel(
            &mut text,
            "512",
            "rms_norm",
            &format!(
                "const {element}* x, const {element}* weight, const int* rows, {element}* out, int width, float eps"
            ),
            &format!("rms_norm<{element}>(x, weight, rows, out, width, eps);"),
        )?;
        kernel(
            &mut text,
            "256",
            "rotate",
            &format!(
                "const {element}* qkv, const {element}* q_norm, const {element}* k_norm, const float* frequencies, \
                 const int* places, {element}* queries, {element}* keys, {element}* values, int rows, float eps"
            ),
            &format!(
                "rotate<{element}, {queries}, {kv}, {dim}, {has_norm}>(qkv, q_norm, k_norm, frequencies, places, \
                 queries, keys, values, rows, eps);"
            ),
        )?;
        let attended = format!(
            "const {element}* queries, const {element}* keys, const {element}* values, const int* tiles, const int* table"
        );
        for (name, is_staged) in [("attend_few", false), ("attend_few_staged", true)] {
            kernel(
                &mut text,
                "128",
                name,
                &format!("{attended}, float* partial, int* arrived, {element}* out"),
                &format!(
                    "attend_few<{element}, {kv}, {group}, {dim}, {is_staged}>(queries, keys, values, tiles, table, \
                     partial, arrived, out);"
                ),
            )?;
        }
        kernel(
            &mut text,
            "128",
            "attend_many",
            &format!("{attended}, {element}* out"),
            &format!(
                "attend_many<{element}, {kv}, {group}, {dim}>(queries, keys, values, tiles, table, out);"
            ),
        )?;
        if let Some(decode) = self.decode
            && let Some(stages) = decode.stages(self.heads, target)
        {
            let (bits, of_group) = decode.format.names();
            let layers = decode.layers;
            kernel(
                &mut text,
                "512, 1",
                "decode",
                &format!("const __grid_constant__ Decode<{element}, {layers}> of"),
                &format!(
                    "decode<{element}, {bits}, {of_group}, {queries}, {kv}, {dim}, {has_norm}, {stages}, {layers}>(of);"
                ),
            )?;
        }
        Ok(text)
    }
}

/// Compiled kernels on a GPU.
#[derive(Debug)]
pub(crate) struct Program(Arc<CudaModule>);

impl Program {
    /// Compiles them, unless an earlier run has left them in `cache`.
    ///
    /// # Errors
    /// There is no compiler, or the driver does not take what it made.
    pub(crate) fn load(gpu: &Gpu, model: &Model, cache: Option<&Path>) -> Result<Self> {
        let began = Instant::now();
        let source = model.source(Target::of(gpu))?;
        let options = options(gpu.capability());
        let name = blake3::hash(format!("{options:?}{source}").as_bytes()).to_hex();
        let kept = cache.map(|cache| cache.join(format!("{name}.cubin")));
        if let Some(binary) = kept.as_deref().and_then(|kept| std::fs::read(kept).ok()) {
            match gpu.context().load_module(Ptx::from_binary(binary)) {
                Ok(module) => {
                    info!(
                        seconds = began.elapsed().as_secs_f64(),
                        "GPU kernels loaded"
                    );
                    return Ok(Self(module));
                }
                Err(error) => {
                    warn!("compiling GPU kernels anew, those kept cannot be loaded: {error}")
                }
            }
        }
        let binary = compile(&source, &options)?;
        if let Some(kept) = &kept
            && let Err(error) = keep(kept, &binary)
        {
            warn!("compiled GPU kernels cannot be kept: {error:#}");
        }
        let module = gpu.context().load_module(Ptx::from_binary(binary));
        let module = module.context("loading the compiled kernels")?;
        info!(
            seconds = began.elapsed().as_secs_f64(),
            "GPU kernels compiled"
        );
        Ok(Self(module))
    }

    pub(crate) fn function(&self, name: &str) -> Result<CudaFunction> {
        let function = self.0.load_function(name);
        function.with_context(|| format!("the compiled kernels have no {name}"))
    }
}

fn options((major, minor): (i32, i32)) -> [String; 3] {
    [
        format!("--gpu-architecture=sm_{major}{minor}"),
        "--std=c++17".to_owned(),
        // What is to be fused is written so: two kernels must not differ in it.
        "--fmad=false".to_owned(),
    ]
}

/// Writes a file that is whole whenever it is there.
fn keep(path: &Path, binary: &[u8]) -> Result<()> {
    let folder = path.parent().context("a file in a folder")?;
    std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let part = PathBuf::from(format!("{}.{}", path.display(), std::process::id()));
    std::fs::write(&part, binary).with_context(|| format!("writing {}", part.display()))?;
    std::fs::rename(&part, path).with_context(|| format!("writing {}", path.display()))
}

/// A source as code for the GPU that the options name.
fn compile(source: &str, options: &[String]) -> Result<Vec<u8>> {
    library::find_compiler();
    // SAFETY: looking for the compiler's library runs its initialisers, as every use of it does.
    if !unsafe { sys::is_culib_present() } {
        bail!("the CUDA run-time compiler (libnvrtc) is not to be found; run scripts/setup --cuda");
    }
    let source = CString::new(source)?;
    let program = nvrtc::create_program(&source, Some(c"mlx-pipe.cu"))
        .map_err(|error| anyhow!("the CUDA run-time compiler does not start: {error:?}"))?;
    // SAFETY: `program` is valid until it is destroyed at the end of this function, and not used afterwards.
    let binary = unsafe {
        nvrtc::compile_program(program, options)
            .map_err(|error| {
                let log = nvrtc::get_program_log(program).unwrap_or_default();
                let log = log
                    .iter()
                    .map(|&byte| byte as u8)
                    .take_while(|&byte| byte != 0);
                let log = String::from_utf8_lossy(&log.collect::<Vec<u8>>()).into_owned();
                anyhow!("compiling GPU kernels: {error:?}\n{log}")
            })
            .and_then(|()| cubin(program))
    };
    // SAFETY: as above.
    let _ = unsafe { nvrtc::destroy_program(program) };
    binary
}

/// # Safety
/// The program is valid and has been compiled.
unsafe fn cubin(program: sys::nvrtcProgram) -> Result<Vec<u8>> {
    let mut bytes = 0;
    // SAFETY: the program is valid; the size is written to a place of its type.
    unsafe { sys::nvrtcGetCUBINSize(program, &mut bytes) }
        .result()
        .map_err(|error| anyhow!("{error:?}"))?;
    let mut binary = vec![0u8; bytes];
    // SAFETY: there is room for as many bytes as were said to be written.
    unsafe { sys::nvrtcGetCUBIN(program, binary.as_mut_ptr().cast()) }
        .result()
        .map_err(|error| anyhow!("{error:?}"))?;
    Ok(binary)
}

/// The version of the run-time compiler, or why it cannot be used.
pub fn compiler() -> Result<String> {
    library::find_compiler();
    // SAFETY: as in `compile`.
    if !unsafe { sys::is_culib_present() } {
        bail!("libnvrtc is not to be found");
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both are written to places of their type.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }
        .result()
        .map_err(|error| anyhow!("{error:?}"))?;
    Ok(format!("{major}.{minor}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::LEAST_CAPABILITY;

    /// Needs the compiler (`scripts/setup --cuda`), no GPU.
    #[test]
    #[ignore = "needs libnvrtc: scripts/setup --cuda"]
    fn the_kernels_compile_for_every_shape_and_generation() {
        let formats = |bits: usize| [32, 64, 128].map(|group_size| Format { bits, group_size });
        let all: BTreeSet<Format> = formats(4)
            .into_iter()
            .chain(formats(8))
            .chain([Format::PLAIN])
            .collect();
        let heads = |queries, kv, dim, has_norm| Heads {
            queries,
            kv,
            dim,
            has_norm,
        };
        let format = |bits, group_size| Format { bits, group_size };
        for (element, heads, capability, shared_kib, format) in [
            (
                Element::Bf16,
                heads(16, 8, 128, true),
                (9, 0),
                226,
                format(8, 64),
            ),
            (
                Element::Bf16,
                heads(32, 8, 128, true),
                (9, 0),
                226,
                Format::PLAIN,
            ),
            (
                Element::Bf16,
                heads(32, 8, 128, true),
                (8, 0),
                162,
                format(4, 32),
            ),
            (
                Element::F16,
                heads(9, 3, 64, false),
                (8, 9),
                98,
                Format::PLAIN,
            ),
            (
                Element::F16,
                heads(14, 2, 64, false),
                (12, 0),
                98,
                format(4, 128),
            ),
        ] {
            assert!(heads.is_supported());
            let target = Target {
                capability,
                shared_bytes: shared_kib << 10,
                multiprocessors: 80,
            };
            let decode = Decode {
                format,
                layers: 28,
                widest: 4096,
            };
            let has_decode = decode.stages(heads, target).is_some();
            assert_eq!(has_decode, capability >= LEAST_CAPABILITY);
            let model = Model {
                element,
                formats: all.clone(),
                heads,
                decode: Some(decode),
            };
            let began = Instant::now();
            let source = model.source(target).unwrap();
            let binary = compile(&source, &options(capability)).unwrap();
            println!(
                "{heads:?} for {capability:?}: {} bytes, {:.1?}",
                binary.len(),
                began.elapsed()
            );
            assert!(binary.starts_with(b"\x7fELF"));
        }
    }
}
