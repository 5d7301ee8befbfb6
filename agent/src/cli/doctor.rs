//! Implements `towline doctor`: a list of checks of this node, each with a remedy.

use std::os::unix::net::UnixStream;

use anyhow::bail;
use serde::Serialize;
use towline_proto::code::Coded as _;
use towline_proto::status::SCHEMA_VERSION;
use towline_service::color::Palette;
use towline_service::output::{self, Format};

use super::local;
use crate::config::Config;
use crate::doctor::{self, Agent, Cause, Check, CheckState, Facts, host_facts};
use crate::down::DownMarker;
use crate::join;
use crate::state::StateDir;

/// Result of the checks, as `towline doctor -o json` prints it.
#[derive(Serialize)]
pub(super) struct Report<'a> {
    schema_version: u32,
    /// True if no check failed and none warns.
    healthy: bool,
    checks: &'a [Check],
}

impl<'a> Report<'a> {
    pub(super) fn of(checks: &'a [Check]) -> Self {
        let healthy = checks.iter().all(|check| check.state <= CheckState::Ok);
        Self { schema_version: SCHEMA_VERSION, healthy, checks }
    }
}

/// Prints the checks. Succeeds unless a check failed.
pub(super) fn run(config: &Config, format: Format) -> anyhow::Result<()> {
    let checks = doctor::examine(&facts(config, agent(config)));
    output::write(format, &Report::of(&checks), |wide| text(&checks, wide, Palette::of_stdout()))?;
    let failed: Vec<&str> = checks
        .iter()
        .filter(|check| check.state == CheckState::Failed)
        .map(|check| check.name)
        .collect();
    if !failed.is_empty() {
        bail!("checks failed: {}: see the remedies above", failed.join(", "));
    }
    Ok(())
}

/// Returns everything that the checks look at.
pub(super) fn facts(config: &Config, agent: Agent) -> Facts {
    let node = &config.node;
    Facts {
        link: config.link.name.clone(),
        networks_behind: node.prefixes.iter().chain(&node.forward_to).copied().collect(),
        controller: controller(config, &agent),
        host: host_facts::read(&config.link.name, &config.state_dir),
        agent,
    }
}

/// Returns the address of a controller: the one of the agent's last session, or else the first one that is
/// configured or stored.
fn controller(config: &Config, agent: &Agent) -> Option<String> {
    let of_session = match agent {
        Agent::Answered(answers) => answers.status.controller.as_ref(),
        Agent::Silent { .. } => None,
    };
    let of_session = of_session.map(|controller| controller.address.clone());
    of_session.filter(|address| !address.is_empty()).or_else(|| {
        let membership = StateDir::peek(&config.state_dir).membership().ok()??;
        let known = join::controllers(&config.controller.addresses, &membership);
        known.first().map(ToString::to_string)
    })
}

/// Asks the agent, or tells why it does not answer.
pub(super) fn agent(config: &Config) -> Agent {
    let reason = match local::ask(&config.socket) {
        Ok(answers) => return Agent::Answered(Box::new(answers)),
        Err(reason) => reason,
    };
    if let Some(down) = DownMarker::of(config).read() {
        return Agent::Silent { code: down.code(), reason: down.to_string() };
    }
    let denied = UnixStream::connect(&config.socket)
        .is_err_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied);
    let cause = if denied { Cause::AgentNotAllowed } else { Cause::AgentNotRunning };
    Agent::Silent { code: cause.code(), reason: output::error_line(reason.as_ref()) }
}

/// Width of the column with the word of the state.
const STATE_WIDTH: usize = 9;
/// Width of the column with the name of the check.
const NAME_WIDTH: usize = 26;

fn text(checks: &[Check], wide: bool, palette: Palette) -> String {
    let mut text = String::new();
    for check in checks.iter().filter(|check| wide || check.state != CheckState::Skipped) {
        let Check { name, state, finding, .. } = check;
        let state = palette.word(&format!("{state:STATE_WIDTH$}", state = state.to_string()));
        text.push_str(&format!("{state}{name:NAME_WIDTH$}{finding}\n"));
        let mut below = |line: String| {
            text.push_str(&format!("{:STATE_WIDTH$}{:NAME_WIDTH$}{line}\n", "", ""));
        };
        if let Some(remedy) = &check.remedy {
            below(remedy.clone());
        }
        if wide && !check.causes.is_empty() {
            below(format!("codes: {}", check.causes.join(", ")));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Subject;

    #[test]
    fn a_check_is_a_line_and_its_remedy_the_next_one() {
        let check = |state, remedy: Option<&str>| Check {
            subject: Subject::Disk,
            name: Subject::Disk.name(),
            state,
            finding: "what".into(),
            remedy: remedy.map(Into::into),
            causes: vec!["disk-full".into()],
        };
        let checks = [
            check(CheckState::Ok, None),
            check(CheckState::Skipped, None),
            check(CheckState::Failed, Some("run `df`")),
        ];
        let indent = " ".repeat(STATE_WIDTH + NAME_WIDTH);
        let line = |state: &str| format!("{state:9}{:26}what\n", "state directory");
        let narrow = format!("{}{}{indent}run `df`\n", line("ok"), line("failed"));
        let text = |wide| text(&checks, wide, Palette::PLAIN);
        assert_eq!(text(false), narrow);
        assert_eq!(text(true).matches("codes: disk-full").count(), 3);
    }
}
