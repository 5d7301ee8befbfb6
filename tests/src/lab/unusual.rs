//! Unusual packets that might bypass a guard by their ports, their marks or their form, sent from a
//! local socket or from a pod.

use std::net::{IpAddr, SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};

use super::actor::Actor;
use super::namespace::Namespace;
use super::spoof::{self, Spoofer};

/// A way to send from a local socket.
#[derive(Debug, Clone, Copy)]
pub struct FromHost {
    /// Rights of the thread that owns the socket.
    pub actor: Actor,
    /// Kind of the socket.
    pub transport: Transport,
    /// Source port; with 0 the kernel chooses one.
    pub port: u16,
    /// Packet mark (`SO_MARK`). `nobody` may not set one, and sends without a mark.
    pub mark: Option<u32>,
}

/// Kind of a local socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// A UDP socket.
    Udp,
    /// A TCP socket, which sends only its SYN.
    Tcp,
    /// A raw IP socket, which sends a UDP datagram including all headers; IPv4 only.
    Raw,
}

/// Form of a pod's packet. Each form has a source port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FromPod {
    /// A UDP datagram.
    Udp(u16),
    /// The SYN of a TCP connection.
    Tcp(u16),
    /// The fragments of a UDP datagram.
    Fragments(u16),
    /// A UDP datagram after an extension header of this kind; IPv6 only.
    Extended(u16, u8),
}

/// The addresses of a packet.
#[derive(Debug, Clone, Copy)]
pub struct Way {
    /// Source address.
    pub from: IpAddr,
    /// Destination address and port.
    pub to: SocketAddr,
}

/// MTU of the uplinks in bytes.
const MTU: usize = 1_500;
/// Minimum size in bytes of a payload that is sent in fragments.
const LARGE: usize = 4_000;

impl FromHost {
    /// Returns a UDP datagram from an ephemeral port.
    pub const fn udp(actor: Actor) -> Self {
        Self { actor, transport: Transport::Udp, port: 0, mark: None }
    }

    /// Sends the payload from the host in `namespace`, `times` times for each pair of addresses. A
    /// failed send is ignored, since guards cause it; a failed bind or mark is an error.
    pub fn send(
        self,
        namespace: &Namespace,
        ways: &[Way],
        payload: &[u8],
        times: usize,
    ) -> anyhow::Result<()> {
        self.actor
            .run(namespace, || ways.iter().try_for_each(|way| self.send_one(*way, payload, times)))
    }

    fn send_one(self, Way { from, to }: Way, payload: &[u8], times: usize) -> anyhow::Result<()> {
        match self.transport {
            Transport::Udp => {
                let socket = self.socket(to, Type::DGRAM, Protocol::UDP)?;
                for _ in 0..times {
                    let _ = socket.send_to(payload, &to.into());
                }
            }
            Transport::Tcp => {
                let socket = self.socket(to, Type::STREAM, Protocol::TCP)?;
                // The SYN is sent at once; its answer does not matter.
                let _ = socket.connect(&to.into());
            }
            Transport::Raw if to.is_ipv4() => {
                let packet = spoof::udp((from, self.port).into(), to, payload)?;
                let unbound = Self { port: 0, ..self };
                let socket = unbound.socket(to, Type::RAW, Protocol::from(libc::IPPROTO_RAW))?;
                for _ in 0..times {
                    let _ = socket.send_to(&packet, &to.into());
                }
            }
            Transport::Raw => {}
        }
        Ok(())
    }

    fn socket(self, to: SocketAddr, kind: Type, protocol: Protocol) -> anyhow::Result<Socket> {
        let socket = Socket::new(Domain::for_address(to), kind, Some(protocol))?;
        socket.set_nonblocking(true)?;
        if kind == Type::STREAM {
            socket.set_reuse_address(true)?;
        }
        if let Some(mark) = self.mark {
            let marked = socket.set_mark(mark);
            if self.actor != Actor::User {
                marked?;
            }
        }
        if self.port != 0 {
            let any: IpAddr = match to {
                SocketAddr::V4(_) => [0; 4].into(),
                SocketAddr::V6(_) => {
                    socket.set_only_v6(true)?;
                    [0u16; 8].into()
                }
            };
            socket.bind(&SocketAddr::new(any, self.port).into())?;
        }
        Ok(socket)
    }
}

impl FromPod {
    /// Sends packets with the payload on the pod's link, `times` times for each pair of addresses.
    pub fn send(
        self,
        spoofer: &Spoofer,
        ways: &[Way],
        payload: &[u8],
        times: usize,
    ) -> anyhow::Result<()> {
        for way in ways {
            let packets = self.packets(*way, payload)?;
            for _ in 0..times {
                for packet in &packets {
                    spoofer.send(packet)?;
                }
            }
        }
        Ok(())
    }

    fn packets(self, Way { from, to }: Way, payload: &[u8]) -> anyhow::Result<Vec<Vec<u8>>> {
        match self {
            Self::Udp(port) => Ok(vec![spoof::udp((from, port).into(), to, payload)?]),
            Self::Tcp(port) => Ok(vec![spoof::tcp_syn((from, port).into(), to)?]),
            Self::Fragments(port) => {
                // Each fragment contains the payload at least once.
                let large = payload.repeat(LARGE.div_ceil(payload.len().max(1)));
                spoof::fragments(&spoof::udp((from, port).into(), to, &large)?, MTU)
            }
            Self::Extended(..) if to.is_ipv4() => Ok(Vec::new()),
            Self::Extended(port, kind) => {
                let packet = spoof::udp((from, port).into(), to, payload)?;
                Ok(vec![spoof::extended(&packet, kind)?])
            }
        }
    }
}
