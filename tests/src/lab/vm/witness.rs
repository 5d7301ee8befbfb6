//! Classifies and counts what a machine sent, outside of the machine.

use std::net::IpAddr;
use std::time::Instant;

use data_encoding::HEXLOWER;
use ipnet::IpNet;
use memchr::memmem;

use crate::lab::capture::frame::Outer;

/// Payload of the background traffic to addresses of the mesh.
pub const MESH_LABEL: &str = "lab-mesh-traffic";
/// Payload of the background traffic to an address outside of the mesh, which proves that the
/// traffic runs.
pub const PLAIN_LABEL: &str = "lab-plain-traffic";
/// Maximum number of packets that are described; all are counted.
const SAMPLES: usize = 5;
/// Bytes of a packet's payload that are described: the header of its protocol, and a little.
const SAMPLE_BYTES: usize = 24;

/// Counts of what one machine sent since the last [`Witness::reset`].
#[derive(Debug, Clone)]
pub struct Sent {
    /// Time at which the count started.
    pub since: Instant,
    /// Packets to the mesh that are not sealed, recognised by an address or by their payload.
    pub clear: u64,
    /// Packets of the background traffic to an address outside of the mesh.
    pub plain: u64,
    /// WireGuard messages, which are sealed.
    pub sealed: u64,
    /// Packets from a mesh address to elsewhere: the kernel chose that source in a moment in which
    /// the uplink had no address. Not counted are the background traffic, and neighbor discovery,
    /// which the kernel sends with the source of the packet that waits for the answer.
    pub misaddressed: u64,
    /// Descriptions of the first clear or misaddressed packets: seconds after `since`, addresses,
    /// and the start of the payload.
    pub samples: Vec<String>,
}

/// Classifies the frames that one machine sends.
#[derive(Debug)]
pub(super) struct Witness {
    mesh: Vec<IpNet>,
    gateways: [IpAddr; 2],
    sent: Sent,
}

impl Sent {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            clear: 0,
            plain: 0,
            sealed: 0,
            misaddressed: 0,
            samples: Vec::new(),
        }
    }
}

impl Witness {
    /// Creates the witness of a machine in a mesh with these networks, behind these gateways.
    pub(super) fn new(mesh: &[IpNet], gateways: [IpAddr; 2]) -> Self {
        Self { mesh: mesh.to_vec(), gateways, sent: Sent::new() }
    }

    pub(super) fn sent(&self) -> Sent {
        self.sent.clone()
    }

    pub(super) fn reset(&mut self) {
        self.sent = Sent::new();
    }

    pub(super) fn see(&mut self, frame: &[u8]) {
        let Some(outer) = Outer::parse(frame) else { return };
        let is_of_mesh = |address: IpAddr| self.mesh.iter().any(|net| net.contains(&address));
        let has = |label: &str| memmem::find(frame, label.as_bytes()).is_some();
        // Both ends of the mesh's traffic are in the mesh.
        let is_to_mesh = is_of_mesh(outer.destination)
            || outer.neighbor_target.is_some_and(is_of_mesh)
            || has(MESH_LABEL);
        let is_to_gateway = self.gateways.contains(&outer.destination);
        if is_to_mesh {
            self.sent.clear += 1;
            self.describe(&outer);
        } else if has(PLAIN_LABEL) {
            self.sent.plain += 1;
        } else if is_of_mesh(outer.source) && !is_to_gateway && outer.neighbor_target.is_none() {
            self.sent.misaddressed += 1;
            self.describe(&outer);
        } else if outer.is_wireguard() {
            self.sent.sealed += 1;
        }
    }

    fn describe(&mut self, outer: &Outer<'_>) {
        if self.sent.samples.len() < SAMPLES {
            let seconds = self.sent.since.elapsed().as_secs_f64();
            let Outer { source, destination, protocol, payload, .. } = outer;
            let start = HEXLOWER.encode(&payload[..payload.len().min(SAMPLE_BYTES)]);
            self.sent.samples.push(format!(
                "{seconds:.1} s {source} > {destination} protocol {protocol}: {start}"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(destination: [u8; 4], payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 203, 0, 113, 20]);
        frame.extend(destination);
        frame.extend([0; 8]);
        frame.extend(payload);
        frame
    }

    #[test]
    fn clear_packets_are_found_by_address_and_by_payload() {
        let gateways = ["203.0.113.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        let mut witness = Witness::new(&["198.19.0.0/16".parse().unwrap()], gateways);
        witness.see(&frame([198, 19, 0, 7], b""));
        // A clear packet inside another, unencrypted tunnel.
        witness.see(&frame([203, 0, 113, 10], format!("....{MESH_LABEL}").as_bytes()));
        witness.see(&frame([203, 0, 113, 1], PLAIN_LABEL.as_bytes()));
        witness.see(&frame([203, 0, 113, 10], &[4, 0, 0, 0, 1, 2, 3, 4]));
        witness.see(&frame([203, 0, 113, 10], b"something else"));
        witness.see(&[]);
        for payload in [&[4, 0, 0, 0, 1, 2, 3, 4][..], b"not sealed"] {
            let mut misaddressed = frame([203, 0, 113, 10], payload);
            misaddressed[26..30].copy_from_slice(&[198, 19, 0, 9]);
            witness.see(&misaddressed);
        }
        // A plain packet with such a source, as the kernel chooses it without another address.
        let mut plain = frame([203, 0, 113, 1], PLAIN_LABEL.as_bytes());
        plain[26..30].copy_from_slice(&[198, 19, 0, 9]);
        witness.see(&plain);
        let sent = witness.sent();
        assert_eq!(sent.misaddressed, 2);
        assert_eq!((sent.clear, sent.plain, sent.sealed), (2, 2, 1));
        assert_eq!(sent.samples.len(), 4);
        witness.reset();
        assert_eq!(witness.sent().clear, 0);
    }
}
