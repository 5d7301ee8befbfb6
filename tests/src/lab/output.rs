//! Progress output for people, on stderr: a spinner on a terminal, otherwise one line for each
//! step.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Prints progress. Create it after the lab entered its namespaces: a spinner has a thread, and a
/// process with several threads cannot enter a user namespace.
#[derive(Debug)]
pub struct ProgressOutput {
    spinner: Option<ProgressBar>,
}

impl ProgressOutput {
    /// Creates the output, with a spinner if stderr is a terminal.
    pub fn new() -> Self {
        let spinner = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner:.cyan} {msg} [{elapsed}]") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self { spinner }
    }

    /// Reports that the next step begins.
    pub fn step(&self, what: &str) {
        match &self.spinner {
            Some(bar) => {
                bar.reset_elapsed();
                bar.set_message(what.to_owned());
            }
            None => line(what),
        }
    }

    /// Reports the progress of a long step; only a terminal shows it.
    pub fn progress(&self, what: &str) {
        if let Some(bar) = &self.spinner {
            bar.set_message(what.to_owned());
        }
    }

    /// Prints a line that stays visible.
    pub fn note(&self, what: &str) {
        match &self.spinner {
            Some(bar) => bar.suspend(|| line(what)),
            None => line(what),
        }
    }
}

impl Default for ProgressOutput {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for ProgressOutput {
    fn drop(&mut self) {
        if let Some(bar) = &self.spinner {
            bar.finish_and_clear();
        }
    }
}

/// Writes a line to stderr; errors (a closed stderr) are ignored.
pub fn line(what: &str) {
    let _ = writeln!(std::io::stderr().lock(), "lab: {what}");
}
