//! Where the program keeps what it can make again: calibrations and received weights.

use std::path::PathBuf;

/// `$XDG_CACHE_HOME/mlx-pipe`, or `~/.cache/mlx-pipe`; `None` if neither `XDG_CACHE_HOME` nor `HOME` is set. A
/// relative `XDG_CACHE_HOME` counts as not set, as its specification asks.
pub fn dir() -> Option<PathBuf> {
    let set = |name: &str| {
        let value = std::env::var_os(name).map(PathBuf::from);
        value.filter(|path| path.is_absolute())
    };
    let base = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(base.join("mlx-pipe"))
}
