//! CUDA's libraries where `scripts/setup --cuda` puts them: beside the program rather than in the system.

use std::path::{Path, PathBuf};
use std::sync::Once;

/// Where the folder with CUDA's libraries is, if not beside the program.
pub const VARIABLE: &str = "MLX_PIPE_CUDA";

/// Makes the run-time compiler known to the dynamic loader, which then finds it by name. Where there is none beside
/// the program, the system may have one.
pub(crate) fn find_compiler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for folder in folders() {
            // The compiler opens its builtins by name.
            let builtins = in_folder(&folder, "libnvrtc-builtins.so");
            let compiler = in_folder(&folder, "libnvrtc.so");
            if compiler.is_empty() {
                continue;
            }
            for path in builtins.iter().chain(&compiler) {
                // SAFETY: loading a library runs its initialisers; these are NVIDIA's, and do nothing of note.
                if let Ok(library) = unsafe { libloading::Library::new(path) } {
                    std::mem::forget(library);
                }
            }
            return;
        }
    });
}

/// Folders that may have the libraries, the likeliest first.
fn folders() -> Vec<PathBuf> {
    let named = std::env::var_os(VARIABLE).map(PathBuf::from);
    let program = std::env::current_exe().ok();
    let beside = program.iter().flat_map(|program| {
        let above = program.ancestors().skip(1).take(3);
        above
            .map(|folder| folder.join(".mlx/cuda"))
            .collect::<Vec<_>>()
    });
    let roots = named.into_iter().chain(beside);
    roots
        .flat_map(|root| [root.join("nvidia/cu13/lib"), root.join("lib"), root])
        .collect()
}

/// Files of the folder whose names begin so.
fn in_folder(folder: &Path, beginning: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let is_one = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with(beginning))
    };
    let paths = entries.flatten().map(|entry| entry.path());
    paths.filter(is_one).collect()
}
