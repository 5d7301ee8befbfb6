//! Entries of the journal with their fields, in its native protocol
//! (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>): one datagram for each event of the log.
//!
//! `MESSAGE` is the line that a terminal would get. Each field of the event is also a field of the entry, with
//! `TOWLINE_` before its name in upper case. An event with a code has a `MESSAGE_ID` that follows from the code.

use std::fmt::{self, Write as _};
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use data_encoding::HEXLOWER;
use ring::digest::{SHA256, digest};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use super::priority;

/// Socket of the journal.
const SOCKET: &str = "/run/systemd/journal/socket";
/// First part of the names of Towline's own fields in an entry. They are no environment variables, whose names
/// begin the same way.
const OWN: &str = "TOWLINE_";
/// Field of an event whose value is its code.
const EVENT: &str = "event";
/// Longest value of a field, in bytes: an entry fits into one datagram.
const VALUE_BYTES: usize = 4096;
/// Greatest number of fields of an entry.
const FIELDS: usize = 32;
/// Longest time to wait for a journal that reads slowly; then stderr gets the line.
const SEND_LIMIT: Duration = Duration::from_secs(1);

/// Returns the `MESSAGE_ID` of the events with this code: the first 16 bytes of the SHA-256 of `towline event CODE`,
/// in hexadecimal digits.
pub fn message_id(code: &str) -> String {
    let digest = digest(&SHA256, format!("towline event {code}").as_bytes());
    let (id, _) = digest.as_ref().split_at(16);
    HEXLOWER.encode(id)
}

/// Format of an event as an entry of the journal. The inner format writes `MESSAGE`.
pub(super) struct EntryFormat<F> {
    inner: F,
    /// Name of the program, as the journal shows it before the message.
    identifier: String,
}

impl<F> EntryFormat<F> {
    pub(super) fn new(inner: F) -> Self {
        let program = std::env::args_os().next().map(PathBuf::from);
        let name = program.as_deref().and_then(Path::file_name);
        let identifier = name.map_or("towline".into(), |name| name.to_string_lossy());
        Self { inner, identifier: value(&identifier) }
    }
}

impl<S, N, F> FormatEvent<S, N> for EntryFormat<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut message = String::new();
        self.inner.format_event(context, Writer::new(&mut message), event)?;
        writeln!(writer, "PRIORITY={}", priority(event.metadata().level()))?;
        writeln!(writer, "SYSLOG_IDENTIFIER={}", self.identifier)?;
        writeln!(writer, "{OWN}TARGET={}", event.metadata().target())?;
        let mut fields = Fields::default();
        event.record(&mut fields);
        writer.write_str(&fields.text)?;
        writeln!(writer, "MESSAGE={}", value(message.trim_end()))
    }
}

/// Fields of one event as lines of an entry.
#[derive(Default)]
struct Fields {
    text: String,
    count: usize,
}

impl Fields {
    fn add(&mut self, field: &Field, text: &str) {
        // The inner format writes the message.
        if field.name() == "message" || self.count == FIELDS {
            return;
        }
        self.count += 1;
        let name: String = field.name().chars().map(name_character).collect();
        let _ = writeln!(self.text, "{OWN}{name}={}", value(text));
        if field.name() == EVENT {
            let _ = writeln!(self.text, "MESSAGE_ID={}", message_id(text));
        }
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, text: &str) {
        self.add(field, text);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field, &format!("{value:?}"));
    }
}

/// Returns a character of a field's name: the journal takes upper case letters, digits and underscores.
fn name_character(c: char) -> char {
    if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }
}

/// Returns a text as the value of a field: one line of bounded length.
fn value(text: &str) -> String {
    let end = text.floor_char_boundary(VALUE_BYTES);
    let cut = text.get(..end).unwrap_or_default();
    cut.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Writer that sends each entry to the journal. An entry that the journal does not take goes to stderr.
#[derive(Debug, Clone)]
pub(super) struct JournalWriter {
    socket: Arc<UnixDatagram>,
    path: PathBuf,
}

impl JournalWriter {
    /// Opens the writer for the journal of this machine.
    pub(super) fn open() -> io::Result<Self> {
        Self::to(Path::new(SOCKET))
    }

    fn to(path: &Path) -> io::Result<Self> {
        std::fs::metadata(path)?;
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(SEND_LIMIT))?;
        Ok(Self { socket: Arc::new(socket), path: path.into() })
    }
}

impl io::Write for JournalWriter {
    fn write(&mut self, entry: &[u8]) -> io::Result<usize> {
        // The path is resolved for each entry, because a journal that starts again may have another socket.
        if self.socket.send_to(entry, &self.path).is_err() {
            io::Write::write_all(&mut io::stderr(), as_line(entry).as_bytes())?;
        }
        Ok(entry.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for JournalWriter {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// Returns an entry as a line with its priority (sd-daemon(3)).
fn as_line(entry: &[u8]) -> String {
    let text = String::from_utf8_lossy(entry);
    let field = |name: &str| {
        let mut lines = text.lines();
        lines.find_map(|line| line.strip_prefix(name)?.strip_prefix('=').map(ToOwned::to_owned))
    };
    let priority = field("PRIORITY").unwrap_or_default();
    format!("<{priority}>{}\n", field("MESSAGE").unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::super::journal_text;
    use super::*;

    /// Returns the datagrams that a journal receives for what `work` logs.
    fn entries(work: impl FnOnce()) -> Vec<String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let journal = UnixDatagram::bind(&path).unwrap();
        journal.set_nonblocking(true).unwrap();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .event_format(EntryFormat { inner: journal_text(), identifier: "towline".into() })
            .with_writer(JournalWriter::to(&path).unwrap())
            .finish();
        tracing::subscriber::with_default(subscriber, work);
        let mut entries = Vec::new();
        let mut buffer = [0; 65536];
        while let Ok(length) = journal.recv(&mut buffer) {
            entries.push(String::from_utf8(buffer[..length].to_vec()).unwrap());
        }
        entries
    }

    #[test]
    fn an_entry_has_the_fields_of_the_event() {
        let entries = entries(|| {
            tracing::warn!(target: "t", event = "peer-down", peer = %"w1", port = 7, "odd");
        });
        let wanted = format!(
            "PRIORITY=4\nSYSLOG_IDENTIFIER=towline\nTOWLINE_TARGET=t\nTOWLINE_EVENT=peer-down\n\
             MESSAGE_ID={}\nTOWLINE_PEER=w1\nTOWLINE_PORT=7\n\
             MESSAGE=t: odd event=\"peer-down\" peer=w1 port=7\n",
            message_id("peer-down")
        );
        assert_eq!(entries, [wanted]);
    }

    #[test]
    fn no_value_can_add_a_field() {
        let entries = entries(|| {
            tracing::info!(target: "t", text = "a\nMESSAGE=forged", "b\nPRIORITY=0");
        });
        let [entry] = &entries[..] else { panic!("{entries:?}") };
        assert_eq!(entry.lines().filter(|line| line.starts_with("MESSAGE=")).count(), 1, "{entry}");
        assert_eq!(
            entry.lines().filter(|line| line.starts_with("PRIORITY=")).count(),
            1,
            "{entry}"
        );
    }

    #[test]
    fn an_entry_is_bounded() {
        let entries = entries(|| tracing::info!(target: "t", text = "x".repeat(1 << 20), "long"));
        assert!(entries.iter().all(|entry| entry.len() < 3 * VALUE_BYTES));
        assert_eq!(entries.len(), 1);
    }

    #[test]
    fn an_entry_that_cannot_be_sent_is_a_line_with_its_priority() {
        assert_eq!(
            as_line(b"PRIORITY=3\nTOWLINE_PORT=7\nMESSAGE=t: failed port=7\n"),
            "<3>t: failed port=7\n"
        );
        assert!(JournalWriter::to(Path::new("/nonexistent/socket")).is_err());
    }

    #[test]
    fn the_id_of_a_code_never_changes() {
        assert_eq!(message_id("agent-started"), "3e056b0ab5b1830cf148cde2645b7757");
    }
}
