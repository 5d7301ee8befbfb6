//! Runs a scenario as a `cargo test` test: rootless, in short form, for its promises. Only the
//! scenario itself checks timings, because a test also runs on a busy machine.

#![expect(clippy::print_stdout, reason = "the output of a test")]

use std::process::Command;

use anyhow::Context;
use serde_json::Value;

/// Runs the lab, `program`, with these arguments, and returns the scenario's figures. Prints them,
/// and the progress before, for the report of a failed test.
///
/// Returns `None` with a printed reason if this machine forbids the scenario.
pub fn figures(program: &str, arguments: &[&str]) -> anyhow::Result<Option<Value>> {
    let flags = ["--rootless", "--json"];
    let output = Command::new(program).args(arguments).args(flags).output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(3) {
        println!("skipped: {}", stderr.trim_end());
        return Ok(None);
    }
    println!("{stderr}");
    let figures: Value =
        serde_json::from_slice(&output.stdout).context("stdout is not one JSON object")?;
    println!("{figures:#}");
    anyhow::ensure!(figures["rootless"] == true, "the scenario used root");
    Ok(Some(figures))
}
