//! Who may ask: those with a key, where there are keys; and no web page of another origin that makes a browser ask
//! on its behalf, be it by the name of this host or by a name that it has rebound to this host's address.

use crate::bounded_file;
use crate::cli::ServerOptions;
use anyhow::{Context, Result, bail};
use axum::http::HeaderMap;
use axum::http::header::{AUTHORIZATION, HOST, ORIGIN};
use axum::http::uri::Authority;
use sha2::{Digest, Sha256};
use std::net::IpAddr;
use subtle::{Choice, ConstantTimeEq};

/// Largest key file.
const KEY_FILE_BYTES: u64 = 1 << 20;
/// Shortest key: anything less can be guessed.
const KEY_BYTES_MIN: usize = 8;

/// What is checked of every request.
pub struct Guard {
    /// SHA-256 of each key: all of one length, so that comparing them takes one time.
    keys: Vec<[u8; 32]>,
    /// In lower case.
    hosts: Vec<String>,
    origins: Vec<String>,
}

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Denial {
    /// No key, or a wrong one.
    Key,
    /// A host name that is not this server's.
    Host(String),
    /// A page of another origin.
    Origin(String),
}

impl Guard {
    /// Reads the keys.
    ///
    /// # Errors
    /// A key file that cannot be read, has no key or a short one; an origin that is none.
    pub fn new(options: &ServerOptions) -> Result<Self> {
        let keys = match &options.api_key_file {
            None => Vec::new(),
            Some(path) => {
                let text = bounded_file::read(path, KEY_FILE_BYTES)
                    .context("--api-key-file")?
                    .with_context(|| format!("--api-key-file {} does not exist", path.display()))?;
                let text = String::from_utf8(text)
                    .with_context(|| format!("--api-key-file {} is not UTF-8", path.display()))?;
                let keys = keys_of(&text);
                keys.with_context(|| format!("--api-key-file {}", path.display()))?
            }
        };
        for origin in &options.cors_origin {
            let has_host = origin.split_once("://").is_some_and(|(scheme, host)| {
                !scheme.is_empty() && host.parse::<Authority>().is_ok()
            });
            if !has_host {
                bail!(
                    "--cors-origin {origin}: expected an origin such as http://localhost:3000, without a path"
                );
            }
        }
        let own = gethostname::gethostname().to_string_lossy().to_lowercase();
        let mut hosts: Vec<String> = options
            .allow_host
            .iter()
            .map(|host| host.to_lowercase())
            .collect();
        hosts.extend(["localhost".to_owned(), format!("{own}.local"), own]);
        Ok(Self {
            keys,
            hosts,
            origins: options.cors_origin.clone(),
        })
    }

    /// Whether a key is needed.
    pub fn has_keys(&self) -> bool {
        !self.keys.is_empty()
    }

    /// Whether a page of this origin may call.
    pub fn allows_origin(&self, origin: &str) -> bool {
        self.origins.iter().any(|allowed| allowed == origin)
    }

    /// Checks where a request comes from; `authority`: of its target, if that has one.
    pub fn check_place(&self, headers: &HeaderMap, authority: Option<&str>) -> Result<(), Denial> {
        let host = headers.get(HOST).and_then(|host| host.to_str().ok());
        let host = authority.or(host).unwrap_or_default();
        // A page that has rebound its name has no key.
        if !self.has_keys() && !self.knows_host(host) {
            return Err(Denial::Host(host.to_owned()));
        }
        let Some(origin) = headers.get(ORIGIN) else {
            return Ok(());
        };
        let origin = origin.to_str().unwrap_or("null");
        let is_own = origin
            .split_once("://")
            .is_some_and(|(_, of)| of.eq_ignore_ascii_case(host));
        match is_own || self.allows_origin(origin) {
            true => Ok(()),
            false => Err(Denial::Origin(origin.to_owned())),
        }
    }

    /// Checks the key. The time that this takes does not depend on how much of a key is right.
    pub fn check_key(&self, headers: &HeaderMap) -> Result<(), Denial> {
        if !self.has_keys() {
            return Ok(());
        }
        let given = headers.get(AUTHORIZATION).map(|value| value.as_bytes());
        let given = given.and_then(|value| {
            let (scheme, key) = value.split_at_checked(7)?;
            scheme
                .eq_ignore_ascii_case(b"Bearer ")
                .then_some(key.trim_ascii())
        });
        let given = given.map(Sha256::digest).unwrap_or_default();
        let is_known = self
            .keys
            .iter()
            .fold(Choice::from(0), |known, key| known | given[..].ct_eq(key));
        match bool::from(is_known) {
            true => Ok(()),
            false => Err(Denial::Key),
        }
    }

    /// An address, which no page can rebind, or a name that is this server's.
    fn knows_host(&self, host: &str) -> bool {
        let Ok(authority) = host.parse::<Authority>() else {
            return false;
        };
        let name = authority.host();
        let address = name.trim_start_matches('[').trim_end_matches(']');
        let name = name.trim_end_matches('.').to_lowercase();
        address.parse::<IpAddr>().is_ok() || self.hosts.contains(&name)
    }
}

/// One key a line; blank lines and those that begin with `#` are none.
fn keys_of(text: &str) -> Result<Vec<[u8; 32]>> {
    let mut keys = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let key = line.trim();
        if key.is_empty() || key.starts_with('#') {
            continue;
        }
        if key.len() < KEY_BYTES_MIN {
            bail!(
                "line {}: a key of {} bytes can be guessed; expected {KEY_BYTES_MIN} or more",
                index + 1,
                key.len()
            );
        }
        keys.push(Sha256::digest(key).into());
    }
    match keys.is_empty() {
        true => bail!("there is no key in it; expected one a line"),
        false => Ok(keys),
    }
}
