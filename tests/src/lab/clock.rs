//! Another time of day for the programs of a host. The clock of this machine is not changed: a library that
//! is loaded before the C library adds an offset.

use std::path::PathBuf;
use std::process::Command;

use super::mesh::Node;
use super::topology::Lab;

/// Source of the library.
const SOURCE: &str = include_str!("clock.c");

/// The compiled library.
#[derive(Debug)]
pub struct OtherClock(PathBuf);

impl OtherClock {
    /// Compiles the library with the C compiler, into the lab's directory.
    ///
    /// # Errors
    ///
    /// The reason why this machine cannot do it, in one line.
    pub fn compile(lab: &Lab) -> Result<Self, String> {
        let source = lab.directory().join("clock.c");
        let library = lab.directory().join("clock.so");
        std::fs::write(&source, SOURCE).map_err(|error| error.to_string())?;
        let output = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .args([&library, &source])
            .output()
            .map_err(|error| format!("cannot run the C compiler `cc`: {error}"))?;
        if !output.status.success() {
            let reason = String::from_utf8_lossy(&output.stderr);
            let line = reason.lines().next().unwrap_or_default();
            return Err(format!("the C compiler `cc` failed: {line}"));
        }
        Ok(Self(library))
    }

    /// Returns the environment variables with which a program sees this time of day, in seconds from now.
    pub fn environment(&self, offset: i64) -> Vec<(String, String)> {
        let pair = |name: &str, value: String| (name.to_owned(), value);
        vec![
            pair("LD_PRELOAD", self.0.display().to_string()),
            pair("LAB_CLOCK_OFFSET", offset.to_string()),
        ]
    }

    /// Makes the programs of a node that are started from now on see this time of day, in seconds from now.
    pub fn show(&self, node: &mut Node, offset: i64) {
        let environment = self.environment(offset).into_iter();
        let words = environment.map(|(name, value)| format!("{name}={value}"));
        node.wrap(std::iter::once("/usr/bin/env".to_owned()).chain(words).collect());
    }
}
