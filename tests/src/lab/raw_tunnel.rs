//! A member that ignores all rules: a WireGuard session with a node, under a member's own key,
//! through which any inner packet can be sent.

use std::net::{SocketAddr, UdpSocket};
use std::path::Path as FilePath;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use data_encoding::BASE64;
use towline_core::path::Path;
use towline_dataplane::arena::SendBatch;
use towline_proto::id::WireguardKey;
use towline_wireguard::{Answered, HANDSHAKE_BYTES, Inputs, PADDING, Secrets, Session, Single};
use x25519_dalek::{PublicKey, StaticSecret};

use super::interrupt::wait_up_to;
use super::namespace::Namespace;

/// An established session and its socket.
#[derive(Debug)]
pub struct RawTunnel {
    session: Session,
    socket: UdpSocket,
    to: SocketAddr,
}

/// Time limit of a handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Interval between two initiations.
const AGAIN: Duration = Duration::from_millis(700);

/// Reads a WireGuard private key from a node's file.
pub fn private_key(file: &FilePath) -> anyhow::Result<StaticSecret> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let bytes = BASE64.decode(text.trim().as_bytes()).context("the key is not valid base64")?;
    let bytes: [u8; 32] = bytes.try_into().ok().context("the key does not have 32 bytes")?;
    Ok(StaticSecret::from(bytes))
}

/// Opens a socket with a new port, for datagrams to `to`.
fn open(namespace: &Namespace, to: SocketAddr) -> anyhow::Result<UdpSocket> {
    let local: SocketAddr = if to.is_ipv4() {
        ([0, 0, 0, 0], 0).into()
    } else {
        (std::net::Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let socket = namespace.run(|| Ok(UdpSocket::bind(local)?))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(AGAIN))?;
    Ok(socket)
}

impl RawTunnel {
    /// Completes a handshake from `namespace` with the node whose key is `peer` and that listens at
    /// `to`, as the member with the key `own`.
    pub fn connect(
        namespace: &Namespace,
        own: StaticSecret,
        peer: &PublicKey,
        to: SocketAddr,
    ) -> anyhow::Result<Self> {
        let socket = open(namespace, to)?;
        let secrets = Secrets::new(own);
        let session = Session::new(&secrets, WireguardKey(peer.to_bytes()), None, 1);
        let mut tunnel = Self { session, socket, to };
        let done = wait_up_to(HANDSHAKE_LIMIT, || {
            let mut message = [0; HANDSHAKE_BYTES];
            let session = &mut tunnel.session;
            let length =
                Inputs::system(Instant::now(), |inputs| session.initiate(inputs, &mut message));
            tunnel.socket.send(&message[..length])?;
            tunnel.await_response()
        })?;
        done.with_context(|| format!("no handshake with {to}"))?;
        Ok(tunnel)
    }

    /// Sends from another port from now on.
    pub fn roam(&mut self, namespace: &Namespace) -> anyhow::Result<()> {
        self.socket = open(namespace, self.to)?;
        Ok(())
    }

    fn await_response(&mut self) -> anyhow::Result<Option<()>> {
        let (mut datagram, mut reply) = ([0; 2048], [0; HANDSHAKE_BYTES]);
        while let Ok(length) = self.socket.recv(&mut datagram) {
            // Only responses and cookie replies matter here, not probes or the node's own
            // initiations.
            if datagram[0] != 2 && datagram[0] != 3 {
                continue;
            }
            let session = &mut self.session;
            let answered = Inputs::system(Instant::now(), |inputs| {
                session.handshake(inputs, &datagram[..length], &mut reply)
            });
            if let Answered::Established { len } = answered {
                self.socket.send(&reply[..len])?;
                return Ok(Some(()));
            }
        }
        Ok(None)
    }

    /// Seals an inner packet and sends it.
    pub fn send(&mut self, packet: &[u8]) -> anyhow::Result<()> {
        if !self.session.is_ready(Instant::now()) {
            bail!("the session with {} has expired", self.to);
        }
        let mut padded = packet.to_vec();
        padded.resize(packet.len().next_multiple_of(PADDING), 0);
        let mut out = SendBatch::new(padded.len() + 2 * HANDSHAKE_BYTES, 1);
        let to = Path::from(self.to).into();
        self.session.seal(Instant::now(), &mut Single::new(&padded), &mut out.to(&to));
        out.seal();
        for gso in out.gso_batches() {
            self.socket.send(&out.bytes()[gso.start..gso.start + gso.len])?;
        }
        Ok(())
    }
}
