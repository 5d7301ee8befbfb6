//! Encoding of requests and responses. Each is one message of a `SOCK_SEQPACKET` socket.
//!
//! ```text
//! request     'T' 'H' version request
//! response    'T' 'H' version status  present 0 0 0  errno (32 bits, little-endian)
//! ```
//!
//! `present` has a bit for each file of the request, lowest first, which is set if the file exists.
//! The descriptors of the existing files are passed with the response in the same order.

/// Path of the socket on which systemd listens for the helper.
pub const SOCKET: &str = "/run/towline/helper.sock";
/// Length of a request in bytes.
pub const REQUEST_BYTES: usize = 4;
/// Length of a response in bytes.
pub const RESPONSE_BYTES: usize = 12;
/// Largest number of descriptors in one response: one for each bit of `present`.
pub const DESCRIPTORS: usize = 8;

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
}

impl Installation {
    /// All installations, in the order in which their kubeconfig is searched.
    pub const ALL: [Self; 3] = [Self::Kubeadm, Self::K3s, Self::Rke2];

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
pub const CNI_DIRECTORIES: [&str; 3] = [
    "/etc/cni/net.d",
    "/var/lib/rancher/k3s/agent/etc/cni/net.d",
    "/var/lib/rancher/rke2/agent/etc/cni/net.d",
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

impl Request {
    /// All requests, for parsing and tests.
    pub const ALL: [Self; 6] = [
        Self::Kubelet(Installation::Kubeadm),
        Self::Kubelet(Installation::K3s),
        Self::Kubelet(Installation::Rke2),
        Self::ContainerNetwork,
        Self::TunDevice,
        Self::SteeringProgram,
    ];

    /// Returns the request as a message.
    pub fn encode(self) -> [u8; REQUEST_BYTES] {
        [MAGIC[0], MAGIC[1], VERSION, self.code()]
    }

    /// Parses a whole message. Returns `None` if it is not a request.
    pub fn parse(message: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|request| message == request.encode())
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
        for request in Request::ALL {
            assert_eq!(Request::parse(&request.encode()), Some(request));
            let mut longer = request.encode().to_vec();
            longer.push(0);
            assert_eq!(Request::parse(&longer), None);
            assert_eq!(Request::parse(&longer[..3]), None);
        }
        let known: Vec<u8> = Request::ALL.iter().map(|request| request.encode()[3]).collect();
        for code in 0..=u8::MAX {
            let parsed = Request::parse(&[b'T', b'H', 1, code]);
            assert_eq!(parsed.is_some(), known.contains(&code), "{code}");
        }
        assert_eq!(Request::parse(b"TH\x021"), None);
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
