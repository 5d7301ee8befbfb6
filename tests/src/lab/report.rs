//! What a scenario promises, what it measured, and the exit status that follows.

use std::io::Write;
use std::process::ExitCode;

use serde::Serialize;

/// The machine does not let the lab run. Exit status 3.
#[derive(Debug, thiserror::Error)]
#[error("{what}; {remedy}")]
pub struct Forbidden {
    /// What is refused.
    pub what: String,
    /// What the operator can do about it, in a clause.
    pub remedy: String,
}

/// The promises of one run: which did not hold.
#[derive(Debug, Default)]
pub struct Promises {
    failed: Vec<String>,
}

impl Promises {
    /// None broken yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes whether a promise held. `name` says what was promised, with the figure that broke it.
    pub fn hold(&mut self, held: bool, name: impl FnOnce() -> String) {
        if !held {
            self.failed.push(name());
        }
    }

    /// Notes a promise that could not even be tried.
    pub fn fail(&mut self, name: String) {
        self.failed.push(name);
    }

    /// The broken ones, in order.
    pub fn into_failed(self) -> Vec<String> {
        self.failed
    }
}

/// One run's figures. Serialises to one JSON object that has `failed`.
pub trait Figures: Serialize {
    /// Promises that did not hold.
    fn failed(&self) -> &[String];
    /// What a person reads instead of the JSON.
    fn for_people(&self) -> String;
}

/// Prints the figures to stdout (one JSON object and nothing else with `json`) and gives the exit
/// status: 0 all promises held, 1 one did not.
pub fn finish(figures: &impl Figures, json: bool) -> anyhow::Result<ExitCode> {
    let text = if json {
        serde_json::to_string_pretty(figures)? + "\n"
    } else {
        format!("{}\n{}", figures.for_people(), verdict(figures.failed()))
    };
    print(&text)?;
    Ok(if figures.failed().is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Two digits behind the point are enough for anybody.
pub fn round(figure: f64) -> f64 {
    (figure * 100.0).round() / 100.0
}

fn verdict(failed: &[String]) -> String {
    match failed {
        [] => "every promise held\n".to_owned(),
        failed => format!("FAILED:\n  {}\n", failed.join("\n  ")),
    }
}

/// Writes to stdout; a reader that went away is no error.
pub fn print(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}
