//! Archive of what somebody needs who looks into a problem of this node, without its secrets.
//!
//! | file | owns |
//! |---|---|
//! | `mod.rs` | parts, their sizes, the archive |
//! | `redact.rs` | removal of secrets from every part |
//! | `host.rs` | parts about the host: rules, routes, addresses, links, firewall, versions, journal |
//!
//! Nothing is copied from the state directory. What the agent, the kernel and the journal say is text,
//! from which the known secrets of this machine, and what has the form of one, are removed all the
//! same. Names, addresses and public keys stay.

pub mod host;
mod redact;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde::Serialize;
use towline_proto::status::time_text;

pub use redact::Secrets;

/// Directory in the archive that contains every file.
const DIRECTORY: &str = "towline-bundle";
/// Longest text of one part, in bytes.
const PART_BYTES: usize = 1 << 20;
/// Longest text of all parts together, in bytes.
const ALL_BYTES: usize = 16 << 20;
/// Mode of the files in the archive.
const MODE: u32 = 0o600;

/// One file of the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Name of the file, with `/` between directories.
    pub name: String,
    /// Text of the file, or the reason why it is missing.
    pub text: Result<String, String>,
    /// Side that is kept if the text is too long.
    pub keep: Keep,
}

/// Side of a text that is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// The beginning is kept.
    Begin,
    /// The end is kept: the newest lines of a log.
    End,
}

impl Part {
    /// Creates a part of which the beginning is kept.
    pub fn new(name: impl Into<String>, text: Result<String, String>) -> Self {
        Self { name: name.into(), text, keep: Keep::Begin }
    }

    /// Creates a part with a value as JSON.
    pub fn json(name: impl Into<String>, value: &impl Serialize) -> Self {
        let text = serde_json::to_string_pretty(value);
        Self::new(name, text.map_err(|error| format!("cannot write it as JSON: {error}")))
    }
}

/// List of the files, which is one of them.
#[derive(Debug, Serialize)]
struct Manifest {
    version: &'static str,
    created: Option<String>,
    /// Number of bytes of each file.
    files: BTreeMap<String, usize>,
    /// Files of which a part was left out, because they are too long.
    cut: Vec<String>,
    /// Files that are missing, each with the reason.
    missing: BTreeMap<String, String>,
}

/// Returns the parts as a compressed archive (`.tar.gz`), without the secrets. `now` is the time that the
/// files get.
///
/// # Errors
///
/// If a name does not fit into the archive.
pub fn archive(parts: Vec<Part>, secrets: &Secrets, now: SystemTime) -> io::Result<Vec<u8>> {
    let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut manifest = Manifest {
        version: towline_proto::VERSION,
        created: i64::try_from(seconds).ok().and_then(time_text),
        files: BTreeMap::new(),
        cut: Vec::new(),
        missing: BTreeMap::new(),
    };
    let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::default()));
    let mut left = ALL_BYTES;
    for Part { name, text, keep } in parts {
        let text = match text {
            Ok(text) => secrets.redact(&text),
            Err(reason) => {
                manifest.missing.insert(name, secrets.redact(&reason));
                continue;
            }
        };
        // After the redaction: half of a secret would not be found.
        let shown = cut(&text, PART_BYTES.min(left), keep);
        if shown.len() < text.len() {
            manifest.cut.push(name.clone());
        }
        left -= shown.len();
        add(&mut builder, &name, shown, seconds)?;
        manifest.files.insert(name, shown.len());
    }
    let manifest = serde_json::to_string_pretty(&manifest).map_err(io::Error::other)?;
    add(&mut builder, "manifest.json", &manifest, seconds)?;
    builder.into_inner()?.finish()
}

fn add(
    builder: &mut tar::Builder<impl io::Write>,
    name: &str,
    text: &str,
    seconds: u64,
) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(text.len() as u64);
    header.set_mode(MODE);
    header.set_mtime(seconds);
    builder.append_data(&mut header, format!("{DIRECTORY}/{name}"), text.as_bytes())
}

/// Returns at most `limit` bytes of a text, from one of its sides.
fn cut(text: &str, limit: usize, keep: Keep) -> &str {
    if text.len() <= limit {
        return text;
    }
    let kept = match keep {
        Keep::Begin => text.get(..text.floor_char_boundary(limit)),
        Keep::End => text.get(text.ceil_char_boundary(text.len() - limit)..),
    };
    kept.unwrap_or_default()
}
