//! Lookup of the process or user that uses a port of this machine, for error messages.
//!
//! ```text
//! /proc/thread-self/net/udp   port ──► inode of the socket, user
//! /proc/PID/fd/*              inode of the socket ──► process
//! ```
//!
//! A program that is not root (or whose unit sets `ProtectProc=`) cannot see the processes of other
//! users, but it can see the user of each socket. A port without a process may belong to the
//! kernel.

use std::fmt;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use crate::account;

/// Transport protocol of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP. Only sockets that listen are considered.
    Tcp,
    /// UDP. All sockets are considered.
    Udp,
}

/// Owner of a port. Its `Display` form follows the words `in use by`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortOwner {
    /// The process is visible.
    Process {
        /// Name of the process, in which all characters that a terminal or a log might interpret
        /// are replaced.
        name: String,
        /// Id of the process.
        pid: u32,
    },
    /// Only the user is visible.
    User {
        /// Id of the user.
        uid: u32,
        /// Name of the user, if the machine has one.
        name: Option<String>,
    },
}

/// Longest table of sockets that is read, in bytes: about 30,000 sockets.
const TABLE_BYTES: u64 = 4 << 20;
/// Largest number of sockets of one port that are considered, per table.
const SOCKETS: usize = 64;
/// Largest number of entries of `/proc` that are read.
const PROCESSES: usize = 65_536;
/// Largest number of file descriptors that are read, of all processes together.
const DESCRIPTORS: usize = 262_144;
/// Longest name of a process, in characters. The kernel's own limit is 15.
const NAME_LENGTH: usize = 15;
/// State of a listening TCP socket in the table (`TCP_LISTEN`).
const LISTENS: &str = "0A";
/// User id of root, which is also shown for sockets of the kernel.
const ROOT: u32 = 0;

/// Returns the owner of a port in the network namespace of the calling thread. Returns `None` if
/// the port is free or the tables cannot be read.
pub fn find(transport: Transport, port: u16) -> Option<PortOwner> {
    Machine { proc: "/proc".into(), passwd: account::PASSWD.into() }.find(transport, port)
}

/// Files that the lookup reads. A test uses its own.
struct Machine {
    /// Path of the proc file system.
    proc: PathBuf,
    /// Path of the list of users.
    passwd: PathBuf,
}

/// A row of the kernel's socket table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    uid: u32,
    /// Inode of the socket in the kernel's sockfs.
    inode: u64,
}

impl Machine {
    fn find(&self, transport: Transport, port: u16) -> Option<PortOwner> {
        let tables = match transport {
            Transport::Tcp => ["tcp", "tcp6"],
            Transport::Udp => ["udp", "udp6"],
        };
        let mut rows = Vec::new();
        for table in tables {
            let text = read(&self.proc.join("thread-self/net").join(table), TABLE_BYTES);
            let found = text.lines().skip(1).filter_map(|line| parse(line, transport, port));
            rows.extend(found.take(SOCKETS));
        }
        let first = *rows.first()?;
        Some(self.process(&rows).unwrap_or_else(|| {
            let name = account::name_in(&self.passwd, first.uid).ok().flatten();
            PortOwner::User { uid: first.uid, name }
        }))
    }

    /// Returns the first process that has one of the sockets open.
    fn process(&self, rows: &[Row]) -> Option<PortOwner> {
        let links: Vec<PathBuf> =
            rows.iter().map(|row| format!("socket:[{}]", row.inode).into()).collect();
        let mut descriptors = 0;
        for entry in std::fs::read_dir(&self.proc).ok()?.flatten().take(PROCESSES) {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let Ok(open) = std::fs::read_dir(entry.path().join("fd")) else { continue };
            for descriptor in open.flatten() {
                descriptors += 1;
                if descriptors > DESCRIPTORS {
                    return None;
                }
                if std::fs::read_link(descriptor.path()).is_ok_and(|link| links.contains(&link)) {
                    let name = plain(&read(&entry.path().join("comm"), 64));
                    return Some(PortOwner::Process { name, pid });
                }
            }
        }
        None
    }
}

/// Parses a row, `sl local remote state queues timer retransmits uid timeout inode ...`, and
/// returns it if the socket has this port.
pub fn parse(line: &str, transport: Transport, port: u16) -> Option<Row> {
    let mut fields = line.split_ascii_whitespace();
    let (_, local_port) = fields.nth(1)?.rsplit_once(':')?;
    let state = fields.nth(1)?;
    let uid = fields.nth(3)?.parse().ok()?;
    let inode = fields.nth(1)?.parse().ok()?;
    let has_port = u16::from_str_radix(local_port, 16) == Ok(port);
    (has_port && (transport == Transport::Udp || state == LISTENS)).then_some(Row { uid, inode })
}

/// Returns the name of a process with all unusual characters replaced. Any process can choose its
/// name.
fn plain(name: &str) -> String {
    let usual = |c: char| c.is_ascii_alphanumeric() || "-_.:/+@".contains(c);
    let name = name.trim_end_matches('\n').chars().take(NAME_LENGTH);
    name.map(|c| if usual(c) { c } else { '?' }).collect()
}

/// Returns at most `bytes` bytes from the start of a file; empty if it cannot be read.
fn read(path: &Path, bytes: u64) -> String {
    let mut text = Vec::new();
    if let Ok(file) = std::fs::File::open(path) {
        let _ = file.take(bytes).read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}

impl fmt::Display for PortOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { name, pid } => write!(f, "{name} (pid {pid})"),
            Self::User { uid, name } => {
                match name {
                    Some(name) => write!(f, "a process of user {name}")?,
                    None => write!(f, "a process of uid {uid}")?,
                }
                if *uid == ROOT {
                    f.write_str(" or the kernel (such as a WireGuard link)")?;
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
    use std::os::unix::fs::symlink;

    use super::*;

    const UDP: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
 1051: 00000000:0044 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 7001 2 0000000000000000 0
 2051: 0100007F:CA76 00000000:0000 07 00000000:00000000 00:00000000 00000000  1000        0 7002 2 0000000000000000 0
";

    fn machine() -> (tempfile::TempDir, Machine) {
        let root = tempfile::tempdir().unwrap();
        let machine =
            Machine { proc: root.path().join("proc"), passwd: root.path().join("passwd") };
        std::fs::create_dir_all(machine.proc.join("thread-self/net")).unwrap();
        std::fs::write(machine.proc.join("thread-self/net/udp"), UDP).unwrap();
        std::fs::write(&machine.passwd, "root:x:0:0::/:/x\nada:x:1000:1000::/:/x\n").unwrap();
        (root, machine)
    }

    fn add_process(machine: &Machine, pid: u32, name: &str, inode: u64) {
        let process = machine.proc.join(pid.to_string());
        std::fs::create_dir_all(process.join("fd")).unwrap();
        std::fs::write(process.join("comm"), format!("{name}\n")).unwrap();
        symlink("/dev/null", process.join("fd/0")).unwrap();
        symlink(format!("socket:[{inode}]"), process.join("fd/3")).unwrap();
    }

    fn words(machine: &Machine, port: u16) -> Option<String> {
        machine.find(Transport::Udp, port).map(|owner| owner.to_string())
    }

    #[test]
    fn a_port_is_traced_to_its_process_or_else_to_its_user() {
        let (_root, machine) = machine();
        assert_eq!(words(&machine, 51_830).as_deref(), Some("a process of user ada"));
        let kernel = "a process of user root or the kernel (such as a WireGuard link)";
        assert_eq!(words(&machine, 68).as_deref(), Some(kernel));
        assert_eq!(words(&machine, 69), None);
        add_process(&machine, 70, "another", 7_003);
        add_process(&machine, 77, "wireguard-go", 7_002);
        assert_eq!(words(&machine, 51_830).as_deref(), Some("wireguard-go (pid 77)"));
        std::fs::remove_file(&machine.passwd).unwrap();
        std::fs::remove_dir_all(machine.proc.join("77")).unwrap();
        assert_eq!(words(&machine, 51_830).as_deref(), Some("a process of uid 1000"));
    }

    #[test]
    fn a_name_cannot_write_to_the_terminal_nor_another_message() {
        let (_root, machine) = machine();
        add_process(&machine, 77, "\x1b[2J: ok\nreboot", 7_002);
        assert_eq!(words(&machine, 51_830).as_deref(), Some("??2J:?ok?reboot (pid 77)"));
    }

    #[test]
    fn tables_that_make_no_sense_name_nobody() {
        for line in
            ["", "1:", "1: a:CA76", "1: :CA76 b 07 c d e f g h i j", "1: CA76 b 07 c d e 0 0 1"]
        {
            assert_eq!(parse(line, Transport::Udp, 51_830), None, "{line}");
        }
    }

    #[test]
    fn this_process_finds_itself() {
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let own = |owner| match owner {
            Some(PortOwner::Process { pid, .. }) => assert_eq!(pid, std::process::id()),
            other => panic!("{other:?}"),
        };
        own(find(Transport::Udp, udp.local_addr().unwrap().port()));
        own(find(Transport::Tcp, tcp.local_addr().unwrap().port()));
        // A connected socket does not own its local port: another socket may listen on it.
        let stream = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
        assert_eq!(find(Transport::Tcp, stream.local_addr().unwrap().port()), None);
    }
}
