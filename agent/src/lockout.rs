//! Detects whether a mesh would cut off the operator who brings it up on this machine.
//!
//! The operator's SSH session is found in the environment, in the processes above this one (`sudo`
//! drops the environment), and, if a terminal multiplexer or a missing parent hides it, in the
//! established connections of the SSH server's ports.
//!
//! ```text
//!  sshd (listens) ─► sshd (session, holds the socket) ─► shell ─► sudo ─► towline
//!                                                        SSH_CONNECTION    none
//! ```

use std::collections::BTreeSet;
use std::fmt;
use std::io::{BufRead as _, BufReader, IsTerminal as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use ipnet::IpNet;

/// Default port of SSH servers.
const SSH: u16 = 22;
/// Maximum number of parent processes that are read. A process tree is rarely deeper than ten.
const ANCESTORS: usize = 64;
/// Prefixes of the process names of SSH servers.
const SERVERS: [&str; 2] = ["sshd", "dropbear"];
/// Prefixes of the names of programs that outlive the session that started them. The environment of
/// their children may be from an earlier session.
const MULTIPLEXERS: [&str; 7] =
    ["tmux", "screen", "SCREEN", "zellij", "dtach", "abduco", "mosh-server"];

/// SSH session, as seen from this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SshSession {
    /// Address of the operator's machine.
    pub peer: IpAddr,
    /// Port of the SSH server.
    pub port: u16,
}

/// Session that a mesh would cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CutOff {
    /// Session that would be cut off.
    pub session: SshSession,
    /// Network of the mesh that contains the operator's address.
    pub range: IpNet,
}

impl fmt::Display for CutOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { session: SshSession { peer, port }, range } = self;
        write!(
            f,
            "the mesh's network {range} contains {peer}, the address of an SSH session to this \
             machine, and would cut it off: add port {port} to [routing] plain_ports, connect from \
             an address outside of {range}, or repeat the command with --force"
        )
    }
}

/// Returns the sessions that guarding `ranges` would cut off. Sessions to a port in `plain_ports`
/// are not affected.
pub fn cut_off(sessions: &[SshSession], ranges: &[IpNet], plain_ports: &[u16]) -> Vec<CutOff> {
    let at_risk = sessions.iter().filter(|session| !plain_ports.contains(&session.port));
    at_risk
        .filter_map(|session| {
            let range = ranges.iter().find(|range| range.contains(&session.peer))?;
            Some(CutOff { session: *session, range: *range })
        })
        .collect()
}

/// Returns the operator's SSH sessions on this machine. `own` contains the machine's own addresses.
pub fn sessions(own: &[IpAddr]) -> Vec<SshSession> {
    let environment = ["SSH_CONNECTION", "SSH_CLIENT"]
        .map(|name| std::env::var(name).ok().map(|value| format!("{name}={value}")));
    let found = Host {
        proc: PathBuf::from("/proc"),
        process: std::process::id(),
        environment: environment.into_iter().flatten().collect(),
        interactive: std::io::stdin().is_terminal() || std::io::stderr().is_terminal(),
    }
    .sessions();
    let elsewhere = |session: &SshSession| {
        !session.peer.is_loopback()
            && !session.peer.is_unspecified()
            && !own.contains(&session.peer)
    };
    found.into_iter().filter(elsewhere).collect()
}

/// Sources in which sessions are searched.
struct Host {
    /// Path of the proc file system.
    proc: PathBuf,
    /// Id of the process whose operator's sessions are searched.
    process: u32,
    /// `SSH_*` variables of the process, as `NAME=value`.
    environment: Vec<String>,
    /// True if the process has a terminal.
    interactive: bool,
}

/// Established TCP connection, or listening socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Connection {
    pub(crate) local: SocketAddr,
    pub(crate) remote: SocketAddr,
    inode: u64,
    listening: bool,
}

impl Host {
    /// Returns all SSH sessions that may be the operator's.
    fn sessions(&self) -> BTreeSet<SshSession> {
        let connections = self.connections();
        let mut named: BTreeSet<(SocketAddr, u16)> =
            self.environment.iter().filter_map(|variable| parse(variable)).collect();
        let mut servers = Vec::new();
        let mut multiplexed = false;
        for process in self.ancestors() {
            let name = self.name(process);
            multiplexed |= MULTIPLEXERS.iter().any(|begin| name.starts_with(begin));
            if SERVERS.iter().any(|begin| name.starts_with(begin)) {
                servers.push(process);
            }
            // The environment of another process may be from another network namespace.
            let inherited = self.environment_of(process);
            named.extend(inherited.into_iter().filter(|(peer, port)| {
                connections.iter().any(|c| c.remote == *peer && c.local.port() == *port)
            }));
        }
        let is_current = |(peer, port): &(SocketAddr, u16)| {
            !multiplexed || connections.iter().any(|c| c.remote == *peer && c.local.port() == *port)
        };
        let mut sessions: BTreeSet<SshSession> = named
            .iter()
            .filter(|named| is_current(named))
            .map(|(peer, port)| SshSession { peer: peer.ip(), port: *port })
            .collect();
        let inodes: BTreeSet<u64> =
            servers.iter().flat_map(|server| self.sockets(*server)).collect();
        let mut ports: BTreeSet<u16> = named.iter().map(|(_, port)| *port).collect();
        ports.insert(SSH);
        for connection in connections.iter().filter(|c| inodes.contains(&c.inode)) {
            if connection.listening {
                ports.insert(connection.local.port());
            } else {
                sessions.insert(SshSession::of(connection));
            }
        }
        // The operator's session cannot be identified, so all sessions are returned.
        if multiplexed || (self.interactive && sessions.is_empty()) {
            let to_server = connections.iter().filter(|c| !c.listening);
            let to_server = to_server.filter(|c| ports.contains(&c.local.port()));
            sessions.extend(to_server.map(SshSession::of));
        }
        sessions
    }

    /// Returns the processes above this one, nearest first.
    fn ancestors(&self) -> Vec<u32> {
        let mut found = Vec::new();
        let mut process = self.process;
        while let Some(parent) = self.parent(process).filter(|parent| *parent > 0) {
            found.push(parent);
            process = parent;
            if found.len() >= ANCESTORS {
                break;
            }
        }
        found
    }

    fn of(&self, process: u32, file: &str) -> PathBuf {
        self.proc.join(process.to_string()).join(file)
    }

    fn parent(&self, process: u32) -> Option<u32> {
        let status = std::fs::read_to_string(self.of(process, "status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
        line.trim().parse().ok()
    }

    fn name(&self, process: u32) -> String {
        std::fs::read_to_string(self.of(process, "comm")).unwrap_or_default().trim().to_owned()
    }

    /// Returns the SSH sessions in the environment of a process.
    fn environment_of(&self, process: u32) -> Vec<(SocketAddr, u16)> {
        let bytes = std::fs::read(self.of(process, "environ")).unwrap_or_default();
        let variables = bytes.split(|byte| *byte == 0);
        variables.filter_map(|variable| parse(std::str::from_utf8(variable).ok()?)).collect()
    }

    /// Returns the inodes of the sockets that a process holds.
    fn sockets(&self, process: u32) -> Vec<u64> {
        let Ok(entries) = std::fs::read_dir(self.of(process, "fd")) else { return Vec::new() };
        let links = entries.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok());
        links
            .filter_map(|link| {
                let link = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned();
                link.parse().ok()
            })
            .collect()
    }

    fn connections(&self) -> Vec<Connection> {
        let tables = ["net/tcp", "net/tcp6"].map(|table| self.of(self.process, table));
        tables.iter().flat_map(|table| connections(table)).collect()
    }
}

impl SshSession {
    fn of(connection: &Connection) -> Self {
        Self { peer: connection.remote.ip(), port: connection.local.port() }
    }
}

/// Parses `SSH_CONNECTION=peer port server port` or `SSH_CLIENT=peer port port`. Returns the peer
/// and the port of the server.
pub fn parse(variable: &str) -> Option<(SocketAddr, u16)> {
    let (name, value) = variable.split_once('=')?;
    let fields: Vec<&str> = value.split_whitespace().collect();
    let (peer, port, server) = match (name, fields.as_slice()) {
        ("SSH_CONNECTION", [peer, port, _, server]) => (peer, port, server),
        ("SSH_CLIENT", [peer, port, server]) => (peer, port, server),
        _ => return None,
    };
    // A link-local address has its link as a suffix.
    let peer: IpAddr = peer.split('%').next()?.parse().ok()?;
    Some((SocketAddr::new(peer.to_canonical(), port.parse().ok()?), server.parse().ok()?))
}

/// Returns the established and the listening sockets in `/proc/net/tcp` or `tcp6`.
fn connections(table: &Path) -> Vec<Connection> {
    let Ok(file) = std::fs::File::open(table) else { return Vec::new() };
    BufReader::new(file)
        .lines()
        .map_while(Result::ok)
        .filter_map(|line| connection(&line))
        .collect()
}

/// Parses one line of `/proc/net/tcp` or `tcp6`.
pub(crate) fn connection(line: &str) -> Option<Connection> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let listening = match *fields.get(3)? {
        "01" => false,
        "0A" => true,
        _ => return None,
    };
    Some(Connection {
        local: address(fields.get(1)?)?,
        remote: address(fields.get(2)?)?,
        inode: fields.get(9)?.parse().ok()?,
        listening,
    })
}

/// Parses an address in the kernel's format: words of network byte order, printed in host byte
/// order.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    if !ip.is_ascii() {
        return None;
    }
    let word = |at: usize| -> Option<[u8; 4]> {
        Some(u32::from_str_radix(ip.get(at * 8..at * 8 + 8)?, 16).ok()?.to_ne_bytes())
    };
    let ip = match ip.len() {
        8 => IpAddr::from(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut bytes = [0; 16];
            for (at, chunk) in bytes.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(at)?);
            }
            IpAddr::from(Ipv6Addr::from(bytes)).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// Proc file system for a test. Each process is the child of the previous one.
    struct Tree {
        directory: tempfile::TempDir,
        last: u32,
    }

    impl Tree {
        fn new(tcp: &str, tcp6: &str) -> Self {
            let tree = Self { directory: tempfile::tempdir().unwrap(), last: 0 };
            std::fs::create_dir(tree.directory.path().join("net")).unwrap();
            let header = "  sl  local_address rem_address   st tx_queue ...\n";
            for (name, lines) in [("tcp", tcp), ("tcp6", tcp6)] {
                let path = tree.directory.path().join("net").join(name);
                std::fs::write(path, format!("{header}{lines}")).unwrap();
            }
            tree
        }

        fn process(mut self, name: &str, environment: &str, sockets: &[u64]) -> Self {
            let parent = self.last;
            self.last += 1;
            let path = self.directory.path().join(self.last.to_string());
            std::fs::create_dir_all(path.join("fd")).unwrap();
            symlink("../net", path.join("net")).unwrap();
            std::fs::write(path.join("comm"), format!("{name}\n")).unwrap();
            std::fs::write(path.join("status"), format!("Name:\tx\nPPid:\t{parent}\n")).unwrap();
            std::fs::write(path.join("environ"), environment.replace(' ', "\0")).unwrap();
            for socket in sockets {
                symlink(format!("socket:[{socket}]"), path.join("fd").join(socket.to_string()))
                    .unwrap();
            }
            self
        }

        fn environ(self, environment: &[u8]) -> Self {
            let path = self.directory.path().join(self.last.to_string()).join("environ");
            std::fs::write(path, environment).unwrap();
            self
        }

        fn sessions(&self, environment: &[&str], interactive: bool) -> Vec<String> {
            let host = Host {
                proc: self.directory.path().into(),
                process: self.last,
                environment: environment.iter().map(ToString::to_string).collect(),
                interactive,
            };
            let shown = |session: SshSession| format!("{} {}", session.peer, session.port);
            host.sessions().into_iter().map(shown).collect()
        }
    }

    fn line(local: &str, remote: &str, state: &str, inode: u64) -> String {
        format!(
            "   0: {local} {remote} {state} 00000000:00000000 00:00000000 00000000 0 0 {inode} 1\n"
        )
    }

    /// Formats an address as a kernel with this machine's byte order does.
    fn v4(ip: [u8; 4], port: u16) -> String {
        format!("{:08X}:{port:04X}", u32::from_ne_bytes(ip))
    }

    fn tcp() -> String {
        line(&v4([0; 4], 2222), &v4([0; 4], 0), "0A", 10)
            + &line(&v4([192, 0, 2, 1], 2222), &v4([10, 1, 2, 3], 50_000), "01", 11)
            + &line(&v4([192, 0, 2, 1], 2222), &v4([10, 9, 9, 9], 50_001), "01", 12)
            + &line(&v4([192, 0, 2, 1], 22), &v4([10, 7, 7, 7], 50_002), "01", 13)
            + &line(&v4([192, 0, 2, 1], 443), &v4([10, 8, 8, 8], 50_003), "01", 14)
            + &line(&v4([192, 0, 2, 1], 22), &v4([10, 6, 6, 6], 50_004), "06", 0)
    }

    #[test]
    fn the_environment_names_the_session() {
        let tree = Tree::new("", "").process("bash", "", &[]).process("towline", "", &[]);
        for (variable, session) in [
            ("SSH_CONNECTION=10.1.2.3 5 192.0.2.1 22", "10.1.2.3 22"),
            ("SSH_CLIENT=10.1.2.3 5 2222", "10.1.2.3 2222"),
            ("SSH_CONNECTION=::ffff:10.1.2.3 5 ::ffff:192.0.2.1 22", "10.1.2.3 22"),
            ("SSH_CONNECTION=fe80::1%eth0 5 fe80::2%eth0 22", "fe80::1 22"),
        ] {
            assert_eq!(tree.sessions(&[variable], false), [session], "{variable}");
        }
        for nonsense in ["SSH_CONNECTION=", "SSH_CLIENT=a b c", "SSH_CONNECTION=10.1.2.3"] {
            assert_eq!(tree.sessions(&[nonsense], false), [""; 0], "{nonsense}");
        }
    }

    #[test]
    fn without_an_environment_the_server_above_us_holds_the_session() {
        let tree = Tree::new(&tcp(), "")
            .process("systemd", "", &[])
            .process("sshd", "", &[10])
            .process("sshd-session", "", &[11])
            .process("bash", "", &[])
            .process("sudo", "", &[])
            .process("towline", "", &[]);
        assert_eq!(tree.sessions(&[], false), ["10.1.2.3 2222"]);
    }

    #[test]
    fn sudo_hides_the_environment_of_its_parent_from_nobody() {
        let shell = |environment: &[u8]| {
            Tree::new(&tcp(), "")
                .process("bash", "", &[])
                .environ(environment)
                .process("sudo", "", &[])
                .process("towline", "", &[])
        };
        let tree = shell(b"A=b\0SSH_CONNECTION=10.1.2.3 50000 192.0.2.1 2222\0");
        assert_eq!(tree.sessions(&[], false), ["10.1.2.3 2222"]);
        // The connection is from another network namespace, so it is not in the table.
        let tree = shell(b"SSH_CONNECTION=10.5.5.5 50000 192.0.2.1 22\0");
        assert_eq!(tree.sessions(&[], false), [""; 0]);
    }

    #[test]
    fn below_a_multiplexer_every_ssh_connection_counts_and_a_stale_environment_does_not() {
        let tree = Tree::new(&tcp(), "")
            .process("tmux: server", "", &[])
            .process("bash", "", &[])
            .process("towline", "", &[]);
        let stale = "SSH_CONNECTION=10.99.0.1 40000 192.0.2.1 2222";
        let found = tree.sessions(&[stale], true);
        assert_eq!(found, ["10.1.2.3 2222", "10.7.7.7 22", "10.9.9.9 2222"]);
    }

    #[test]
    fn a_person_at_a_terminal_without_a_session_may_cut_off_others() {
        let tree = Tree::new(&tcp(), "").process("systemd", "", &[]).process("towline", "", &[]);
        assert_eq!(tree.sessions(&[], true), ["10.7.7.7 22"]);
        assert_eq!(tree.sessions(&[], false), [""; 0], "no operator: a boot, a timer");
    }

    #[test]
    fn addresses_are_read_as_the_kernel_writes_them() {
        assert_eq!(address(&v4([127, 0, 0, 1], 22)), Some("127.0.0.1:22".parse().unwrap()));
        let words = [[0x20, 1, 0xd, 0xb8], [0; 4], [0; 4], [0, 0, 0, 1]]
            .map(|word| format!("{:08X}", u32::from_ne_bytes(word)));
        let v6 = format!("{}:0016", words.concat());
        assert_eq!(address(&v6), Some("[2001:db8::1]:22".parse().unwrap()));
        for nonsense in ["", ":", "0:0", "zz:16", "€€€€€€€€:0016", "00000000:FFFFF"]
        {
            assert_eq!(address(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn a_plain_port_is_no_lock_out_and_the_ranges_are_named() {
        let session = SshSession { peer: "10.1.2.3".parse().unwrap(), port: 22 };
        let ranges: Vec<IpNet> =
            vec!["198.19.0.0/16".parse().unwrap(), "10.0.0.0/8".parse().unwrap()];
        let found = cut_off(&[session], &ranges, &[6443]);
        assert_eq!(found.len(), 1);
        let line = found[0].to_string();
        for part in ["10.0.0.0/8", "10.1.2.3", "port 22", "--force"] {
            assert!(line.contains(part), "{line}");
        }
        assert_eq!(cut_off(&[session], &ranges, &[22]), []);
        assert_eq!(cut_off(&[session], &ranges[..1], &[]), []);
    }
}
