//! The files of a tokenizer, told from a rank that has them to rank 0 that has not, and kept there as files again.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::read;

/// What [`super::Tokenizer::load`] reads.
const NAMES: [&str; 4] = [
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// Those files that a checkpoint has, by name.
#[derive(Debug, Serialize, Deserialize)]
pub struct TokenizerFiles(BTreeMap<String, String>);

impl TokenizerFiles {
    /// Reads them in a checkpoint's directory.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, or is not text.
    pub fn read(directory: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        for name in NAMES {
            let path = directory.join(name);
            if let Some(bytes) = read(&path)? {
                let text = String::from_utf8(bytes)
                    .with_context(|| format!("{} is not text", path.display()))?;
                files.insert(name.to_owned(), text);
            }
        }
        Ok(Self(files))
    }

    /// Writes them to a directory of their own in `cache`, unless they are there; returns that directory.
    ///
    /// # Errors
    ///
    /// A file that no tokenizer has, or a directory that cannot be written to.
    pub fn keep(&self, cache: &Path) -> Result<PathBuf> {
        let mut hash = Sha256::new();
        for (name, text) in &self.0 {
            ensure!(NAMES.contains(&name.as_str()), "{name:?} is no tokenizer's");
            hash.update(Sha256::digest(name));
            hash.update(Sha256::digest(text));
        }
        let hash = hex::encode(hash.finalize());
        let directory = cache.join(format!("{}-tokenizer", &hash[..16]));
        let keep_all = || {
            fs::create_dir_all(&directory)?;
            self.0
                .iter()
                .try_for_each(|(name, text)| keep_file(&directory, name, text))
        };
        keep_all().with_context(|| format!("keeping the tokenizer in {}", directory.display()))?;
        Ok(directory)
    }
}

/// Whole or not at all, as another run may read it.
fn keep_file(directory: &Path, name: &str, text: &str) -> std::io::Result<()> {
    let path = directory.join(name);
    if path.is_file() && fs::read(&path)? == text.as_bytes() {
        return Ok(());
    }
    let unfinished = directory.join(format!("{name}.{}.part", std::process::id()));
    let mut file = File::create(&unfinished)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(unfinished, path)
}
