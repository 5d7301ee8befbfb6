//! Promises of a scenario, its figures, and the resulting exit status.

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

use serde::Serialize;

/// Error of a lab that this machine does not allow to run. Exit status 3.
#[derive(Debug, thiserror::Error)]
#[error("{what}; {remedy}")]
pub struct Forbidden {
    /// What the machine refuses.
    pub what: String,
    /// What the operator can do about it, as a clause.
    pub remedy: String,
}

/// Error of a command line that names something that does not exist. Exit status 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct WrongUsage(pub String);

/// Records which promises of one run did not hold.
#[derive(Debug, Default)]
pub struct Promises {
    failed: Vec<String>,
}

impl Promises {
    /// Creates a record without broken promises.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the promises that a run broke. A run that ends with an error broke one.
    pub fn broken_by(run: impl FnOnce(&mut Self) -> anyhow::Result<()>) -> Vec<String> {
        let mut promises = Self::new();
        if let Err(error) = run(&mut promises) {
            promises.fail(format!("{error:#}"));
        }
        promises.into_failed()
    }

    /// Records whether a promise held. `name` returns what was promised, with the figure that broke
    /// it.
    pub fn hold(&mut self, held: bool, name: impl FnOnce() -> String) {
        if !held {
            self.failed.push(name());
        }
    }

    /// Records a promise that could not be tested.
    pub fn fail(&mut self, name: String) {
        self.failed.push(name);
    }

    /// Returns the broken promises, in order.
    pub fn into_failed(self) -> Vec<String> {
        self.failed
    }
}

/// The figures of one run. They serialise to one JSON object that has `failed`.
pub trait Figures: Serialize {
    /// Promises that did not hold.
    fn failed(&self) -> &[String];
    /// Returns the figures as text for people.
    fn for_people(&self) -> String;
}

/// Prints the figures to stdout (with `json`: one JSON object and nothing else) and returns the
/// exit status: 0 if all promises held, 1 if one did not.
pub fn finish(figures: &impl Figures, json: bool) -> anyhow::Result<ExitCode> {
    let text = if json {
        serde_json::to_string_pretty(figures)? + "\n"
    } else {
        format!("{}\n{}", figures.for_people(), verdict(figures.failed()))
    };
    print(&text)?;
    Ok(if figures.failed().is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// A part of a scenario that could not run. It is no failure, but never silent.
#[derive(Debug, Clone, Serialize)]
pub struct Skipped {
    /// Name of the part: a case, a check, a subject, or two of them separated by a slash.
    pub name: String,
    /// Reason, in one line.
    pub why: String,
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "without {}: {}", self.name, self.why)
    }
}

/// Rounds a figure to two decimal places.
pub fn round(figure: f64) -> f64 {
    (figure * 100.0).round() / 100.0
}

fn verdict(failed: &[String]) -> String {
    match failed {
        [] => "every promise held\n".to_owned(),
        failed => format!("FAILED:\n  {}\n", failed.join("\n  ")),
    }
}

/// Writes to stdout. A reader that has closed the pipe is not an error.
pub fn print(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}
