//! QEMU's monitor: stops and continues a machine's processor, and writes its running state to a
//! file. It speaks QMP, JSON objects in lines.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use super::lines::Lines;
use crate::lab::interrupt::wait_for;

/// A connection to the monitor of a QEMU process.
#[derive(Debug)]
pub(super) struct Monitor {
    lines: Lines,
}

/// Time limit of a command that only changes or shows a state.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// Time limit of writing a state: 200 MB.
const SAVE_LIMIT: Duration = Duration::from_secs(180);
/// Limit of the speed at which a state is written: none. The default is meant for a network.
const BYTES_PER_SECOND: u64 = 1 << 40;

/// What the processor of a machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RunState {
    /// QEMU reads a saved state.
    Loading,
    /// The processor is stopped.
    Stopped,
    /// The processor runs, or the machine is in a state that the lab does not use.
    Other,
}

impl Monitor {
    /// Connects to the monitor, or returns `None` if QEMU has not created its socket yet.
    pub(super) fn connect(socket: &Path) -> anyhow::Result<Option<Self>> {
        let Ok(stream) = UnixStream::connect(socket) else { return Ok(None) };
        let mut monitor = Self { lines: Lines::new(stream)? };
        // The greeting is no answer, so it is skipped.
        monitor.execute("qmp_capabilities", None)?;
        Ok(Some(monitor))
    }

    /// Stops the processor. The machine's clocks, but the one with its battery, stop too.
    pub(super) fn stop(&mut self) -> anyhow::Result<()> {
        self.execute("stop", None).map(drop)
    }

    /// Lets the processor continue.
    pub(super) fn proceed(&mut self) -> anyhow::Result<()> {
        self.execute("cont", None).map(drop)
    }

    /// Returns what the processor does.
    pub(super) fn run_state(&mut self) -> anyhow::Result<RunState> {
        let answer = self.execute("query-status", None)?;
        Ok(match answer["status"].as_str() {
            Some("inmigrate") => RunState::Loading,
            Some("paused") => RunState::Stopped,
            _ => RunState::Other,
        })
    }

    /// Writes the state of a machine that is stopped to the standard input of a shell command.
    pub(super) fn save(&mut self, command: &str) -> anyhow::Result<()> {
        let speed = json!({ "max-bandwidth": BYTES_PER_SECOND });
        self.execute("migrate-set-parameters", Some(speed))?;
        self.execute("migrate", Some(json!({ "uri": format!("exec:{command}") })))?;
        wait_for("saved state", SAVE_LIMIT, || {
            let answer = self.execute("query-migrate", None)?;
            match answer["status"].as_str() {
                Some("completed") => Ok(Some(())),
                Some("failed" | "cancelled") => {
                    bail!("QEMU cannot save the state: {}", answer["error-desc"])
                }
                _ => Ok(None),
            }
        })
    }

    /// Ends QEMU, which writes what it holds of the disk's files.
    pub(super) fn quit(&mut self) -> anyhow::Result<()> {
        self.execute("quit", None).map(drop)
    }

    fn execute(&mut self, command: &str, arguments: Option<Value>) -> anyhow::Result<Value> {
        let mut request = json!({ "execute": command });
        if let Some(arguments) = arguments {
            request["arguments"] = arguments;
        }
        self.lines.send(&format!("{request}\n"))?;
        let what = format!("answer of QEMU to `{command}`");
        wait_for(&what, COMMAND_LIMIT, || {
            while let Some(line) = self.lines.next_line()? {
                if let Some(answer) =
                    answer(&line).with_context(|| format!("QEMU's `{command}`"))?
                {
                    return Ok(Some(answer));
                }
            }
            Ok(None)
        })
    }
}

/// Returns what a command answered, or `None` for the greeting and for events.
fn answer(line: &str) -> anyhow::Result<Option<Value>> {
    let mut message: Value = serde_json::from_str(line).context("QEMU sent no JSON")?;
    if let Some(error) = message.get("error") {
        bail!("{}", error["desc"].as_str().unwrap_or("failed"));
    }
    Ok(message.get_mut("return").map(Value::take))
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn answers_are_told_from_events_and_errors() {
        assert_eq!(
            answer(r#"{"return": {"status": "paused"}}"#).unwrap().unwrap()["status"],
            "paused"
        );
        assert_eq!(answer(r#"{"event": "STOP"}"#).unwrap(), None);
        assert_eq!(answer(r#"{"QMP": {}}"#).unwrap(), None);
        let refused = answer(r#"{"error": {"class": "GenericError", "desc": "no such thing"}}"#);
        assert_eq!(refused.unwrap_err().to_string(), "no such thing");
        answer("not JSON").unwrap_err();
    }

    #[test]
    fn a_state_is_saved_once_qemu_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("monitor");
        assert!(Monitor::connect(&socket).unwrap().is_none());
        let listener = UnixListener::bind(&socket).unwrap();
        let qemu = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut requests = BufReader::new(stream.try_clone().unwrap()).lines();
            writeln!(stream, r#"{{"QMP": {{"version": {{}}}}}}"#).unwrap();
            let answers = [
                r#"{"return": {}}"#,
                r#"{"return": {}}"#,
                r#"{"return": {}}"#,
                r#"{"return": {"status": "active"}}"#,
                "{\"event\": \"STOP\"}\n{\"return\": {\"status\": \"completed\"}}",
            ];
            let mut commands = Vec::new();
            for answer in answers {
                let request: Value =
                    serde_json::from_str(&requests.next().unwrap().unwrap()).unwrap();
                commands.push(request["execute"].as_str().unwrap().to_owned());
                writeln!(stream, "{answer}").unwrap();
            }
            commands
        });
        let mut monitor = Monitor::connect(&socket).unwrap().unwrap();
        monitor.save("cat >state").unwrap();
        assert_eq!(
            qemu.join().unwrap(),
            [
                "qmp_capabilities",
                "migrate-set-parameters",
                "migrate",
                "query-migrate",
                "query-migrate"
            ]
        );
    }
}
