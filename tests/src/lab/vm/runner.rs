//! Runs commands in a machine over a virtio-serial port. They work without a network, on a full
//! disk and on a read-only root. The other end is `guest/runner`.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use data_encoding::HEXLOWER;

use super::lines::Lines;
use crate::lab::interrupt::wait_for;

/// The lab's end of the port.
#[derive(Debug)]
pub(super) struct Runner {
    lines: Lines,
    /// Id of the last command, which its answer repeats.
    last_id: u64,
}

/// Result of a command in a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    /// Exit status; 128 plus the signal's number if a signal killed the command.
    pub status: u8,
    /// Standard output of the command.
    pub stdout: String,
    /// Standard error of the command.
    pub stderr: String,
}

impl Output {
    /// Returns whether the command ended with status 0.
    pub fn is_success(&self) -> bool {
        self.status == 0
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "status {}: {:?} {:?}", self.status, self.stdout.trim(), self.stderr.trim())
    }
}

/// Time beyond a command's own limit in which the guest must report that it killed the command.
const GRACE: Duration = Duration::from_secs(60);

impl Runner {
    pub(super) fn new(stream: UnixStream) -> anyhow::Result<Self> {
        Ok(Self { lines: Lines::new(stream)?, last_id: 0 })
    }

    /// Returns true once the guest has reported that it is ready.
    pub(super) fn is_ready(&mut self) -> anyhow::Result<bool> {
        Ok(self.lines.next_line()?.is_some())
    }

    /// Runs a bash command, which the guest kills after `limit`.
    pub(super) fn run(&mut self, command: &str, limit: Duration) -> anyhow::Result<Output> {
        self.last_id += 1;
        let id = self.last_id;
        let hex = HEXLOWER.encode(command.as_bytes());
        self.lines.send(&format!("{id} {} {hex}\n", limit.as_secs().max(1)))?;
        let what = format!("end of `{}`", command.lines().next().unwrap_or_default());
        wait_for(&what, limit + GRACE, || {
            while let Some(line) = self.lines.next_line()? {
                // Another id belongs to a command that was abandoned.
                if let Some((of, output)) = parse(&line)
                    && of == id
                {
                    return Ok(Some(output));
                }
            }
            Ok(None)
        })
    }
}

/// Parses "ID STATUS STDOUT STDERR"; an empty output is "-".
fn parse(line: &str) -> Option<(u64, Output)> {
    let mut fields = line.split(' ');
    let mut next = || fields.next();
    let (id, status) = (next()?.parse().ok()?, next()?.parse().ok()?);
    let mut text = || match fields.next()? {
        "-" => Some(String::new()),
        encoded => Some(String::from_utf8_lossy(&HEXLOWER.decode(encoded.as_bytes()).ok()?).into()),
    };
    Some((id, Output { status, stdout: text()?, stderr: text()? }))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn answers_are_parsed_and_what_is_none_is_not() {
        let output = Output { status: 3, stdout: "hello\n".into(), stderr: String::new() };
        assert_eq!(parse("7 3 68656c6c6f0a -"), Some((7, output)));
        for line in ["", "7", "7 3", "7 3 68656c6c6f0a", "x 3 - -", "7 3 ! -", "7 300 - -"] {
            assert_eq!(parse(line), None, "{line}");
        }
    }

    #[test]
    fn an_answer_to_an_earlier_command_is_skipped() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let mut runner = Runner::new(ours).unwrap();
        assert!(!runner.is_ready().unwrap());
        guest.write_all(b"0 0 - -\n0 9 - -\n1 0 6f6b -\n").unwrap();
        assert!(runner.is_ready().unwrap());
        let output = runner.run("echo ok", Duration::from_secs(1)).unwrap();
        assert_eq!((output.status, output.stdout.as_str()), (0, "ok"));
        drop(guest);
        assert!(runner.run("true", Duration::from_secs(1)).is_err());
    }
}
