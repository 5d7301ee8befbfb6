//! Configuration files in TOML.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Error of reading a configuration file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// The file is not TOML, or has an unknown key or a value of the wrong type.
    #[error("{path}: {why}")]
    Parse {
        /// Path of the file.
        path: PathBuf,
        /// Line of the error, and its description, in one line.
        why: String,
    },
}

/// Reads the file that was `named`, or the `default` one. Returns its path and its text. Only the
/// default file may be absent: then the result is `None`.
///
/// # Errors
///
/// If the file cannot be read.
pub fn read<'a>(
    named: Option<&'a Path>,
    default: &'a Path,
) -> Result<Option<(&'a Path, String)>, FileError> {
    let path = named.unwrap_or(default);
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some((path, text))),
        Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(FileError::Read { path: path.into(), source }),
    }
}

/// Parses the text of a file. `path` is only used in errors.
///
/// # Errors
///
/// If the text is not TOML, or does not describe a `T`.
pub fn parse<T: DeserializeOwned>(text: &str, path: &Path) -> Result<T, FileError> {
    toml::from_str(text).map_err(|error| {
        let message = error.message().replace('\n', " ");
        let why = match error.span() {
            Some(span) => {
                let line = text[..span.start.min(text.len())].matches('\n').count() + 1;
                format!("line {line}: {message}")
            }
            None => message,
        };
        FileError::Parse { path: path.into(), why }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Settings {
        #[expect(dead_code, reason = "only parsed")]
        port: u16,
    }

    #[test]
    fn an_error_names_file_and_line_in_one_line() {
        let path = Path::new("agent.toml");
        for (text, line) in
            [("# a\nport = \"x\"\n", 2), ("port = 1\n\nprot = 2", 3), ("port", 1), ("a = 'é\n", 1)]
        {
            let error = parse::<Settings>(text, path).unwrap_err().to_string();
            assert!(error.starts_with(&format!("agent.toml: line {line}: ")), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn only_the_default_file_may_be_absent() {
        let absent = Path::new("/nowhere/agent.toml");
        assert!(read(None, absent).unwrap().is_none());
        assert!(matches!(read(Some(absent), absent), Err(FileError::Read { .. })));
    }
}
