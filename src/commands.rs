//! The commands that need no MPI: `plan` and `import`.

use crate::cli::{self, PlanOptions};
use crate::cluster::{self, ClusterFile};
use crate::hub::{self, Found};
use crate::model::ModelFiles;
use crate::plan::{self, Device, PlanRequest, WireDtype};
use crate::session;
use anyhow::{Result, bail};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Prints the plan and the memory report.
///
/// # Errors
/// No model, a bad cluster file, or nothing that fits.
pub fn plan(options: &PlanOptions) -> Result<()> {
    let cluster = options.model.cluster.as_deref();
    let file = cluster.map(ClusterFile::read).transpose()?;
    let files = ModelFiles::open(&find_model(options, file.as_ref())?)?;
    let ranks = options
        .ranks
        .map(|count| count as usize)
        .and_then(NonZeroUsize::new);
    let ranks = cluster::describe(file.as_ref(), ranks, &cluster::probe_local()?)?;
    let devices: Vec<Device> = ranks
        .iter()
        .map(|rank| rank.plan_device(options.model.memory_limit))
        .collect();
    let wire_dtype = WireDtype::F32;
    let plan = plan::plan(&PlanRequest {
        shape: &files.shape(wire_dtype),
        devices: &devices,
        strategy: options.model.strategy(),
        context_tokens: session::context_tokens(options.model.context, &files)?,
        sequences: session::SEQUENCES,
        wire_dtype,
    })?;
    print!("{}\n{}", plan::plan_table(&plan), plan::memory_table(&plan));
    Ok(())
}

/// The model's directory, without a download: a plan is a question, not an order.
fn find_model(options: &PlanOptions, file: Option<&ClusterFile>) -> Result<PathBuf> {
    let asked = options.model.model.clone();
    let named = file.and_then(|file| file.model_name.clone());
    let Some(model) = asked.or(named).or_else(cli::model_of_environment) else {
        bail!("{}", session::NO_MODEL);
    };
    match hub::find(&model)? {
        Found::Here(dir) => Ok(dir),
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
        eprintln!("mlx-pipe: {warning}");
    }
    println!(
        "{}: {} with {} layers, {} tensors, {:.3} GB",
        out_dir.display(),
        summary.architecture,
        summary.layers,
        summary.tensors,
        summary.bytes as f64 / 1e9
    );
    Ok(())
}

/// The exit status of a command; prints its error.
pub fn finish(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mlx-pipe: {error:#}");
            ExitCode::FAILURE
        }
    }
}
