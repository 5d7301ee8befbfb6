//! The package under test.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use crate::lab::binaries::{Binaries, Profile};
use crate::lab::package;
use crate::lab::report::Forbidden;

/// A Debian package, and the disk by which machines receive it.
#[derive(Debug)]
pub struct Software {
    bytes: Vec<u8>,
}

/// Minor version of the machines' C library: Debian bookworm has glibc 2.36.
const GLIBC_MINOR: u32 = 36;
/// Sector size in bytes: the size of a disk is a multiple of it.
const SECTOR: usize = 512;

impl Software {
    /// Reads an existing package, such as one that `cargo lab package` built.
    pub fn of_file(path: &Path) -> anyhow::Result<Self> {
        let bytes = fs::read(path)
            .with_context(|| format!("cannot read the package {}", path.display()))?;
        Ok(Self { bytes })
    }

    /// Builds this checkout's programs with the profile of `cargo test`, and packs them.
    ///
    /// # Errors
    /// [`Forbidden`] if the programs need a newer C library than the machines have.
    pub fn of_checkout() -> anyhow::Result<Self> {
        let binaries = Binaries::build(Profile::Dev)?;
        let mut programs = BTreeMap::new();
        for name in package::PROGRAMS {
            let bytes = stripped(&binaries.directory().join(name))?;
            if let Some(minor) = newest_glibc(&bytes).filter(|minor| *minor > GLIBC_MINOR) {
                return Err(Forbidden {
                    what: format!(
                        "{name} needs the C library 2.{minor}, the machines have 2.{GLIBC_MINOR}"
                    ),
                    remedy:
                        "build a static package with `cargo lab package` and pass it with --package"
                            .to_owned(),
                }
                .into());
            }
            programs.insert(name.to_owned(), bytes);
        }
        Ok(Self { bytes: package::deb(&programs)? })
    }

    /// Returns the bytes of the package.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Writes the package as a disk image, and returns its path.
    pub fn medium(&self, directory: &Path) -> anyhow::Result<PathBuf> {
        let path = directory.join("package");
        let mut bytes = self.bytes.clone();
        bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
        fs::write(&path, bytes)?;
        Ok(path)
    }

    /// Returns the command that installs the package in a machine whose third disk contains it.
    pub fn install_command(&self) -> String {
        format!(
            "{} && dpkg --install /run/towline.deb && rm /run/towline.deb",
            self.fetch_command("/run/towline.deb")
        )
    }

    /// Returns the command that copies the package from the third disk to `path`.
    pub fn fetch_command(&self, path: &str) -> String {
        format!("head -c {} /dev/vdc >{path}", self.bytes.len())
    }
}

/// Reads a program without its debugging information, which is most of it. Without `strip` on the
/// host, the program stays unchanged.
fn stripped(program: &Path) -> anyhow::Result<Vec<u8>> {
    let scratch = tempfile::tempdir()?;
    let copy = scratch.path().join("program");
    let done = Command::new("strip").arg("-o").arg(&copy).arg(program).status();
    let path = if done.is_ok_and(|status| status.success()) { &copy } else { program };
    fs::read(path).with_context(|| format!("no {}", path.display()))
}

/// Returns the minor number of the newest glibc version that a program requires.
fn newest_glibc(program: &[u8]) -> Option<u32> {
    const MARK: &[u8] = b"GLIBC_2.";
    memchr::memmem::find_iter(program, MARK)
        .filter_map(|at| {
            let digits: String = program[at + MARK.len()..]
                .iter()
                .map_while(|byte| byte.is_ascii_digit().then_some(char::from(*byte)))
                .take(3)
                .collect();
            digits.parse().ok()
        })
        .max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_version_of_the_c_library_is_found() {
        assert_eq!(newest_glibc(b"..GLIBC_2.4\0..GLIBC_2.34\0GLIBC_2.2.5\0"), Some(34));
        assert_eq!(newest_glibc(b"static GLIBC_2."), None);
    }
}
