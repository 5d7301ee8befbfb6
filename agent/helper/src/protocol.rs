//! Encoding of requests and responses. Each is one message of a `SOCK_SEQPACKET` socket.
//!
//! ```text
//! request     'T' 'H' version request  numbers (32 bits each, little-endian)
//! response    'T' 'H' version status  present 0 0 0  errno (32 bits, little-endian)
//! ```
//!
//! `present` has a bit for each file of the request, lowest first, which is set if the file exists.
//! The descriptors of the existing files are passed with the response in the same order.
//!
//! Only the requests about a link have numbers: guarding an uplink has those of [`EgressGuard`] in the order
//! network namespace, uplink, tunnel, mark, mask; the others have the namespace and the link. A helper of a version that
//! does not know a request answers that it is malformed.

use std::io;
use std::os::unix::fs::MetadataExt as _;

/// Path of the socket on which systemd listens for the helper.
pub const SOCKET: &str = "/run/towline/helper.sock";
/// Greatest length of a request in bytes.
pub const REQUEST_BYTES: usize = HEADER_BYTES + 4 * NUMBERS;
/// Length of a response in bytes.
pub const RESPONSE_BYTES: usize = 12;
/// Largest number of descriptors in one response: one for each bit of `present`.
pub const DESCRIPTORS: usize = 8;

/// Length of the part of a request before its numbers.
const HEADER_BYTES: usize = 4;
/// Greatest count of numbers in a request.
const NUMBERS: usize = 5;
/// Index of the loopback in every network namespace.
const LOOPBACK: u32 = 1;
const MAGIC: [u8; 2] = *b"TH";
const VERSION: u8 = 1;

/// Request to the helper. The list is closed: the helper does nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Opens the current kubeconfig of the kubelet and the files that it names. They are rotated by
    /// replacing a symbolic link.
    Kubelet(Installation),
    /// Opens the configuration of the container network: the first files of the directory that the
    /// container runtime reads.
    ContainerNetwork,
    /// Opens `/dev/net/tun`, for machines on which only root may open it.
    TunDevice,
    /// Loads the eBPF program that chooses the queue of a TUN by destination.
    SteeringProgram,
    /// Attaches the eBPF program that drops packets to the mesh which were redirected to an uplink.
    GuardUplink(EgressGuard),
    /// Detaches that program from an uplink.
    OpenUplink(Uplink),
    /// Opens the socket `/run/wireguard/NAME.sock` of the client's own TUN link, at which `wg show` asks for
    /// its state.
    WireguardSocket(TunnelLink),
    /// Removes that socket, if nobody serves it any more.
    RemoveWireguardSocket(TunnelLink),
}

/// TUN link of the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TunnelLink(Uplink);

impl TunnelLink {
    /// Returns the link with this index in the network namespace of the calling thread. Returns `None`
    /// if no link but the loopback has such an index.
    ///
    /// # Errors
    ///
    /// Returns an error if `/proc` is not mounted.
    pub fn here(index: u32) -> io::Result<Option<Self>> {
        Ok(Uplink::here(index)?.map(Self))
    }

    /// Returns true if the link is in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// Returns an error if `/proc` is not mounted.
    pub fn is_here(&self) -> io::Result<bool> {
        self.0.is_here()
    }

    /// Returns the index of the link.
    pub fn index(&self) -> u32 {
        self.0.index()
    }
}

/// Link that leads out of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uplink {
    /// Network namespace of the link, by the inode number of the namespace.
    namespace: u32,
    link: LinkIndex,
}

impl Uplink {
    /// Returns the link with this index in the network namespace of the calling thread. Returns `None`
    /// if no link that leads out has such an index.
    ///
    /// # Errors
    ///
    /// Returns an error if `/proc` is not mounted.
    pub fn here(index: u32) -> io::Result<Option<Self>> {
        let namespace = namespace()?;
        Ok(LinkIndex::new(index).map(|link| Self { namespace, link }))
    }

    /// Returns true if the link is in the network namespace of the calling thread. Indices mean other
    /// links elsewhere.
    ///
    /// # Errors
    ///
    /// Returns an error if `/proc` is not mounted.
    pub fn is_here(&self) -> io::Result<bool> {
        Ok(self.namespace == namespace()?)
    }

    /// Returns the index of the link.
    pub fn index(&self) -> u32 {
        self.link.0
    }
}

/// Returns the inode number of the calling thread's network namespace.
fn namespace() -> io::Result<u32> {
    let metadata = std::fs::metadata("/proc/thread-self/ns/net")?;
    u32::try_from(metadata.ino()).map_err(io::Error::other)
}

/// Index of a link that is not the loopback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkIndex(u32);

impl LinkIndex {
    /// Returns the index, or `None` if it belongs to no link or to the loopback.
    pub fn new(index: u32) -> Option<Self> {
        (index > LOOPBACK && index <= i32::MAX.cast_unsigned()).then_some(Self(index))
    }
}

/// Numbers of the program that guards an uplink, see [`crate::egress`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EgressGuard {
    uplink: Uplink,
    /// Link of the tunnel; `None` if there is none now.
    tunnel: Option<LinkIndex>,
    mark: u32,
    mask: u32,
}

impl EgressGuard {
    /// Creates a guard of the link `uplink`. Packets of local sockets whose mark is `mark` in the bits
    /// of `mask` pass. Returns `None` if the mark is 0 or has bits outside
    /// of the mask, or if the uplink is the tunnel.
    pub fn new(uplink: Uplink, tunnel: Option<LinkIndex>, mark: u32, mask: u32) -> Option<Self> {
        let is_valid = mark != 0 && mark & !mask == 0 && tunnel != Some(uplink.link);
        is_valid.then_some(Self { uplink, tunnel, mark, mask })
    }

    /// Returns the uplink.
    pub fn uplink(&self) -> Uplink {
        self.uplink
    }

    /// Returns the index of the tunnel's link; 0 if there is none.
    pub fn tunnel(&self) -> u32 {
        self.tunnel.map_or(0, |link| link.0)
    }

    /// Returns the mark of Towline's own packets.
    pub fn mark(&self) -> u32 {
        self.mark
    }

    /// Returns the bits of the mark that are Towline's.
    pub fn mask(&self) -> u32 {
        self.mask
    }
}

/// Installer of the kubelet, which determines the paths of its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Installation {
    /// The layout of kubeadm, which other installers use too.
    Kubeadm,
    /// The layout of k3s.
    K3s,
    /// The layout of RKE2.
    Rke2,
    /// The layout of k0s.
    K0s,
    /// The layout of the MicroK8s snap.
    MicroK8s,
    /// The layout of Amazon EKS, on hybrid nodes too. Its kubeconfig runs a program for the
    /// credentials.
    Eks,
}

impl Installation {
    /// All installations, in the order in which their kubeconfig is searched.
    pub const ALL: [Self; 6] =
        [Self::Kubeadm, Self::K3s, Self::Rke2, Self::K0s, Self::MicroK8s, Self::Eks];

    /// Returns the paths of the kubelet's files. The first is the kubeconfig.
    pub fn files(self) -> &'static [&'static str] {
        match self {
            Self::Kubeadm => &[
                "/etc/kubernetes/kubelet.conf",
                "/var/lib/kubelet/pki/kubelet-client-current.pem",
                "/etc/kubernetes/pki/ca.crt",
            ],
            Self::K3s => &[
                "/var/lib/rancher/k3s/agent/kubelet.kubeconfig",
                "/var/lib/rancher/k3s/agent/client-kubelet.crt",
                "/var/lib/rancher/k3s/agent/client-kubelet.key",
                "/var/lib/rancher/k3s/agent/server-ca.crt",
            ],
            Self::Rke2 => &[
                "/var/lib/rancher/rke2/agent/kubelet.kubeconfig",
                "/var/lib/rancher/rke2/agent/client-kubelet.crt",
                "/var/lib/rancher/rke2/agent/client-kubelet.key",
                "/var/lib/rancher/rke2/agent/server-ca.crt",
            ],
            Self::K0s => &[
                "/var/lib/k0s/kubelet.conf",
                "/var/lib/k0s/kubelet/pki/kubelet-client-current.pem",
                "/var/lib/k0s/pki/ca.crt",
            ],
            Self::MicroK8s => &[
                "/var/snap/microk8s/current/credentials/kubelet.config",
                "/var/snap/microk8s/current/certs/kubelet.crt",
                "/var/snap/microk8s/current/certs/kubelet.key",
                "/var/snap/microk8s/current/certs/ca.crt",
            ],
            Self::Eks => &["/var/lib/kubelet/kubeconfig"],
        }
    }

    /// Returns the installation whose [`files`](Self::files) contain this path.
    pub fn of(path: &std::path::Path) -> Option<Self> {
        let holds = |installation: &Self| {
            installation.files().iter().any(|file| path == std::path::Path::new(file))
        };
        Self::ALL.into_iter().find(holds)
    }
}

/// Directories of container network configurations, in the order in which they are searched.
pub const CNI_DIRECTORIES: [&str; 4] = [
    "/etc/cni/net.d",
    "/var/lib/rancher/k3s/agent/etc/cni/net.d",
    "/var/lib/rancher/rke2/agent/etc/cni/net.d",
    "/var/snap/microk8s/current/args/cni-network",
];

/// Result of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// The request was carried out, and the descriptors are passed with the response.
    Done,
    /// The message is not a request of this version.
    Malformed,
    /// The client is neither root nor the agent's user.
    Denied,
    /// A system call failed, see [`Response::errno`].
    Failed,
}

/// Response without its descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Response {
    /// Result of the request.
    pub status: Status,
    /// Bits of the files whose descriptors are passed, see the module.
    pub present: u8,
    /// Error number of the system with [`Status::Failed`]; otherwise 0.
    pub errno: i32,
}

/// Number of the request [`Request::GuardUplink`] in a message.
const GUARD_UPLINK: u8 = 7;
/// Number of the request [`Request::OpenUplink`] in a message.
const OPEN_UPLINK: u8 = 8;
/// Number of the request [`Request::WireguardSocket`] in a message.
const WIREGUARD_SOCKET: u8 = 12;
/// Number of the request [`Request::RemoveWireguardSocket`] in a message.
const REMOVE_WIREGUARD_SOCKET: u8 = 13;

impl Request {
    /// All requests without numbers, for parsing and tests.
    pub const PLAIN: [Self; 9] = [
        Self::Kubelet(Installation::Kubeadm),
        Self::Kubelet(Installation::K3s),
        Self::Kubelet(Installation::Rke2),
        Self::Kubelet(Installation::K0s),
        Self::Kubelet(Installation::MicroK8s),
        Self::Kubelet(Installation::Eks),
        Self::ContainerNetwork,
        Self::TunDevice,
        Self::SteeringProgram,
    ];

    /// Returns the request as a message.
    pub fn encode(self) -> Vec<u8> {
        let numbers = match self {
            Self::GuardUplink(guard) => {
                let Uplink { namespace, link } = guard.uplink;
                vec![namespace, link.0, guard.tunnel(), guard.mark, guard.mask]
            }
            Self::OpenUplink(Uplink { namespace, link })
            | Self::WireguardSocket(TunnelLink(Uplink { namespace, link }))
            | Self::RemoveWireguardSocket(TunnelLink(Uplink { namespace, link })) => {
                vec![namespace, link.0]
            }
            _ => Vec::new(),
        };
        let mut message = vec![MAGIC[0], MAGIC[1], VERSION, self.code()];
        message.extend(numbers.into_iter().flat_map(u32::to_le_bytes));
        message
    }

    /// Parses a whole message. Returns `None` if it is not a request.
    pub fn parse(message: &[u8]) -> Option<Self> {
        let (header, numbers) = message.split_first_chunk::<HEADER_BYTES>()?;
        let [m0, m1, version, code] = *header;
        if [m0, m1] != MAGIC || version != VERSION {
            return None;
        }
        let (numbers, rest) = numbers.as_chunks::<4>();
        if !rest.is_empty() || numbers.len() > NUMBERS {
            return None;
        }
        let number = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes);
        let uplink = |namespace, link| {
            Some(Uplink { namespace: number(namespace), link: LinkIndex::new(number(link))? })
        };
        match (code, numbers) {
            (GUARD_UPLINK, [namespace, link, tunnel, mark, mask]) => {
                let tunnel = match number(tunnel) {
                    0 => None,
                    index => Some(LinkIndex::new(index)?),
                };
                let uplink = uplink(namespace, link)?;
                EgressGuard::new(uplink, tunnel, number(mark), number(mask)).map(Self::GuardUplink)
            }
            (OPEN_UPLINK, [namespace, link]) => uplink(namespace, link).map(Self::OpenUplink),
            (WIREGUARD_SOCKET, [namespace, link]) => {
                uplink(namespace, link).map(TunnelLink).map(Self::WireguardSocket)
            }
            (REMOVE_WIREGUARD_SOCKET, [namespace, link]) => {
                uplink(namespace, link).map(TunnelLink).map(Self::RemoveWireguardSocket)
            }
            (_, []) => Self::PLAIN.into_iter().find(|request| request.code() == code),
            _ => None,
        }
    }

    /// Returns the number of the request in a message. A number is never reused for another
    /// request.
    fn code(self) -> u8 {
        match self {
            Self::Kubelet(Installation::Kubeadm) => 1,
            Self::Kubelet(Installation::K3s) => 2,
            Self::Kubelet(Installation::Rke2) => 3,
            Self::ContainerNetwork => 4,
            Self::TunDevice => 5,
            Self::SteeringProgram => 6,
            Self::GuardUplink(_) => GUARD_UPLINK,
            Self::OpenUplink(_) => OPEN_UPLINK,
            Self::WireguardSocket(_) => WIREGUARD_SOCKET,
            Self::RemoveWireguardSocket(_) => REMOVE_WIREGUARD_SOCKET,
            Self::Kubelet(Installation::K0s) => 9,
            Self::Kubelet(Installation::MicroK8s) => 10,
            Self::Kubelet(Installation::Eks) => 11,
        }
    }
}

impl Status {
    const ALL: [Self; 4] = [Self::Done, Self::Malformed, Self::Denied, Self::Failed];

    fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Malformed => 1,
            Self::Denied => 2,
            Self::Failed => 3,
        }
    }
}

impl Response {
    /// Creates a response without descriptors.
    pub fn without(status: Status, errno: i32) -> Self {
        Self { status, present: 0, errno }
    }

    /// Returns the response as a message.
    pub fn encode(self) -> [u8; RESPONSE_BYTES] {
        let mut message = [0; RESPONSE_BYTES];
        message[..4].copy_from_slice(&[MAGIC[0], MAGIC[1], VERSION, self.status.code()]);
        message[4] = self.present;
        message[8..].copy_from_slice(&self.errno.to_le_bytes());
        message
    }

    /// Parses a whole message. Returns `None` if it is not a response.
    pub fn parse(message: &[u8]) -> Option<Self> {
        let message: &[u8; RESPONSE_BYTES] = message.try_into().ok()?;
        let [m0, m1, version, code, present, z0, z1, z2, e0, e1, e2, e3] = *message;
        if [m0, m1] != MAGIC || version != VERSION || [z0, z1, z2] != [0; 3] {
            return None;
        }
        let status = Status::ALL.into_iter().find(|status| status.code() == code)?;
        let response = Self { status, present, errno: i32::from_le_bytes([e0, e1, e2, e3]) };
        let done = status == Status::Done;
        let consistent =
            (done || present == 0) && (status == Status::Failed || response.errno == 0);
        consistent.then_some(response)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_read_back_and_nothing_else_is_one() {
        for request in Request::PLAIN {
            assert_eq!(Request::parse(&request.encode()), Some(request));
            let mut longer = request.encode().to_vec();
            longer.push(0);
            assert_eq!(Request::parse(&longer), None);
            assert_eq!(Request::parse(&longer[..3]), None);
        }
        let known: Vec<u8> = Request::PLAIN.iter().map(|request| request.encode()[3]).collect();
        for code in 0..=u8::MAX {
            let parsed = Request::parse(&[b'T', b'H', 1, code]);
            assert_eq!(parsed.is_some(), known.contains(&code), "{code}");
        }
        assert_eq!(Request::parse(b"TH\x021"), None);
    }

    #[test]
    fn the_numbers_of_an_uplink_are_checked() {
        let message = |code: u8, numbers: &[u32]| {
            let numbers = numbers.iter().flat_map(|number| number.to_le_bytes());
            Request::parse(&[b'T', b'H', 1, code].into_iter().chain(numbers).collect::<Vec<_>>())
        };
        let uplink = Uplink::here(2).unwrap().unwrap();
        let here = uplink.namespace;
        for tunnel in [None, LinkIndex::new(9)] {
            let guard = EgressGuard::new(uplink, tunnel, 0x10, 0x30).unwrap();
            let request = Request::GuardUplink(guard);
            assert_eq!(Request::parse(&request.encode()), Some(request));
            assert_eq!(request.encode().len(), REQUEST_BYTES);
        }
        let request = Request::OpenUplink(uplink);
        assert_eq!(Request::parse(&request.encode()), Some(request));
        assert_eq!(message(8, &[here, 2]), Some(request));
        let link = TunnelLink::here(2).unwrap().unwrap();
        for request in [Request::WireguardSocket(link), Request::RemoveWireguardSocket(link)] {
            assert_eq!(Request::parse(&request.encode()), Some(request));
        }
        assert_eq!(message(12, &[here, 1]), None, "the loopback");
        assert_eq!(message(13, &[here]), None);
        let Some(Request::OpenUplink(elsewhere)) = message(8, &[here ^ 1, 2]) else { panic!() };
        assert!(uplink.is_here().unwrap() && !elsewhere.is_here().unwrap());
        for numbers in [
            // No link, the loopback, no index of a link, the tunnel itself.
            [here, 0, 9, 0x10, 0x30],
            [here, 1, 9, 0x10, 0x30],
            [here, u32::MAX, 9, 0x10, 0x30],
            [here, 2, 1, 0x10, 0x30],
            [here, 2, 2, 0x10, 0x30],
            // Marks that every packet has, and bits outside of the mask.
            [here, 2, 9, 0, 0x30],
            [here, 2, 9, 0, 0],
            [here, 2, 9, 0x10, 0x20],
        ] {
            assert_eq!(message(7, &numbers), None, "{numbers:?}");
        }
        assert_eq!(message(7, &[here, 2, 9, 0x10]), None);
        assert_eq!(message(7, &[here, 2, 9, 0x10, 0x30, 0]), None);
        assert_eq!(message(8, &[here, 0]), None);
        assert_eq!(message(8, &[here]), None);
        assert_eq!(message(6, &[here]), None, "a request without numbers");
        let mut cut = request.encode();
        cut.pop();
        assert_eq!(Request::parse(&cut), None);
    }

    #[test]
    fn responses_read_back() {
        for response in [
            Response { status: Status::Done, present: 0b101, errno: 0 },
            Response::without(Status::Malformed, 0),
            Response::without(Status::Failed, 13),
        ] {
            assert_eq!(Response::parse(&response.encode()), Some(response));
        }
        assert_eq!(Response::parse(&[0; RESPONSE_BYTES]), None);
    }

    #[test]
    fn a_file_belongs_to_one_installation() {
        for installation in Installation::ALL {
            for file in installation.files() {
                assert_eq!(Installation::of(std::path::Path::new(file)), Some(installation));
            }
            assert!(installation.files().len() <= DESCRIPTORS);
        }
        assert_eq!(Installation::of(std::path::Path::new("/etc/kubernetes/admin.conf")), None);
        assert_eq!(Installation::of(std::path::Path::new("/etc/shadow")), None);
    }
}
