//! Lines of text over a Unix socket to QEMU. Every wait for them ends at Ctrl-C.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::lab::interrupt::wait_for;

/// The lab's end of a connection.
#[derive(Debug)]
pub(super) struct Lines {
    stream: UnixStream,
    received: Vec<u8>,
}

/// Time limit in which QEMU takes what is sent.
const SEND_LIMIT: Duration = Duration::from_secs(60);

impl Lines {
    pub(super) fn new(stream: UnixStream) -> anyhow::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, received: Vec::new() })
    }

    /// Sends text, which ends in a line feed.
    pub(super) fn send(&mut self, text: &str) -> anyhow::Result<()> {
        let mut bytes = text.as_bytes();
        wait_for("room in the machine's port", SEND_LIMIT, || match self.stream.write(bytes) {
            Ok(count) => {
                bytes = &bytes[count..];
                Ok(bytes.is_empty().then_some(()))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error).context("the machine's port is closed"),
        })
    }

    /// Returns the next line without its end, or `None` if none is complete yet.
    pub(super) fn next_line(&mut self) -> anyhow::Result<Option<String>> {
        let mut chunk = [0; 65536];
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                return Ok(Some(String::from_utf8_lossy(&line).trim().to_owned()));
            }
            match self.stream.read(&mut chunk) {
                Ok(0) => bail!("the machine ended"),
                Ok(count) => self.received.extend(&chunk[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error).context("the machine's port is closed"),
            }
        }
    }
}
