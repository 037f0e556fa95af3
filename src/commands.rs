//! The commands that need no MPI: `plan` and `import`.

use crate::agree::{self, Usage};
use crate::cli::{self, PlanOptions};
use crate::cluster::{self, ClusterFile};
use crate::hub::{self, Found};
use crate::log::tell;
use crate::model::ModelFiles;
use crate::plan::{self, WireDtype};
use crate::planning;
use anyhow::{Result, bail};
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Prints the plan and the memory report.
///
/// # Errors
/// No model, a bad cluster file, or nothing that fits.
pub fn plan(options: &PlanOptions) -> Result<()> {
    let cluster = options.model.cluster.as_deref();
    let file = cluster
        .map(ClusterFile::read)
        .transpose()
        .map_err(Usage::of)?;
    let files = ModelFiles::open(&find_model(options, file.as_ref())?)?;
    let ranks = options
        .ranks
        .map(|count| count as usize)
        .and_then(NonZeroUsize::new);
    let ranks =
        cluster::describe(file.as_ref(), ranks, &cluster::probe_local()?).map_err(Usage::of)?;
    let plan = planning::make_plan(&options.model, &ranks, &files, WireDtype::F32)?;
    print(&format!(
        "{}\n{}",
        plan::plan_table(&plan),
        plan::memory_table(&plan)
    ))
}

/// The model's directory, without a download: a plan is a question, not an order.
fn find_model(options: &PlanOptions, file: Option<&ClusterFile>) -> Result<PathBuf> {
    let model = planning::choose_model(
        options.model.model.clone(),
        file.and_then(|file| file.model_name.clone()),
        cli::model_of_environment(),
    )?;
    match hub::find(&model)? {
        Found::Directory(dir) | Found::Cached(dir) => Ok(dir),
        Found::NotCached(id) => bail!(
            "the model {id} is not in the Hugging Face cache of this host; a plan needs its config.json and \
             the headers of its weights"
        ),
    }
}

/// Converts a GGUF file.
///
/// # Errors
/// A file that cannot be read or expressed, or a directory that cannot be written.
pub fn import(gguf: &Path, out_dir: &Path) -> Result<()> {
    let summary = crate::import::import(gguf, out_dir)?;
    for warning in &summary.warnings {
        tell(&format!("mlx-pipe: {warning}\n"));
    }
    print(&format!(
        "{}: {} with {} layers, {} tensors, {:.3} GB\n",
        out_dir.display(),
        summary.architecture,
        summary.layers,
        summary.tensors,
        summary.bytes as f64 / 1e9
    ))
}

/// Writes to standard output. That its reader has seen enough, as with `| head`, is no error.
fn print(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(anyhow::Error::new(error).context("writing to standard output"))
        }
        _ => Ok(()),
    }
}

/// Runs a command, on the first rank only if it was launched on several; tells its error. The exit status.
pub fn finish(command: impl FnOnce() -> Result<()>) -> ExitCode {
    if cli::launched_rank() != 0 {
        return ExitCode::SUCCESS;
    }
    match command() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell(&format!("mlx-pipe: {error:#}\n"));
            agree::exit_status(&error).into()
        }
    }
}
