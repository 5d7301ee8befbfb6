//! Sockets of a second UDP port, and datagrams with a limited number of hops.

use std::time::Instant;

use towline_core::path::LocalPort;

use super::{OpenUdpError, Ready, SendBatch, Udp, UdpIo, open_group, set};
use crate::arena::RecvBatch;
use crate::drops::Drops;
use crate::switch::Switch;

/// Opens sockets of a port that the kernel chooses: one pair for each of `count` workers. All
/// datagrams get `mark`, unless that is 0. The switches are those of the workers' other sockets.
pub(crate) fn open_second_port(
    mark: u32,
    switches: [Switch; 2],
    count: usize,
) -> Result<Vec<Udp>, OpenUdpError> {
    let mut sockets = open_group(0, mark, switches, count)?;
    for endpoint in sockets.iter_mut().flat_map(|udp| udp.v4.iter_mut().chain(&mut udp.v6)) {
        endpoint.port_kind = LocalPort::Second;
    }
    Ok(sockets)
}

impl Udp {
    /// Returns the number of descriptors without those of the second port.
    fn own_fds(&self) -> usize {
        usize::from(self.v4.is_some()) + usize::from(self.v6.is_some())
    }

    /// Receives from the second port, if it is open and ready.
    pub(super) fn receive_second(
        &mut self,
        ready: Ready,
        batch: &mut RecvBatch,
        drops: &Drops,
    ) -> std::io::Result<()> {
        let own = self.own_fds();
        match &mut self.second {
            Some(second) if !ready.after(own).is_empty() => {
                second.receive(ready.after(own), batch, drops)
            }
            _ => Ok(()),
        }
    }

    /// Sends a batch of one datagram with a hop limit (TTL) of `hops`: at most `hops - 1` routers forward it.
    pub(super) fn send_hops(&mut self, now: Instant, batch: &SendBatch, hops: u8, drops: &Drops) {
        self.set_hops(Some(hops));
        self.send_gso_batches(now, batch.bytes(), batch.gso_batches(), drops);
        self.set_hops(None);
    }

    fn set_hops(&mut self, hops: Option<u8>) {
        /// Value for the system's own limit.
        const DEFAULT: i32 = -1;
        if let Some(second) = &mut self.second {
            second.set_hops(hops);
        }
        let hops = hops.map_or(DEFAULT, i32::from);
        // The option exists on every kernel. If it were refused, the datagram would go all the way.
        if let Some(v4) = &self.v4 {
            let _ = set(&v4.socket, libc::IPPROTO_IP, libc::IP_TTL, hops);
        }
        if let Some(v6) = &self.v6 {
            let _ = set(&v6.socket, libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, hops);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};
    use std::os::fd::AsRawFd as _;

    use towline_core::path::Path;

    use super::*;
    use crate::arena::Destination;
    use crate::udp::open_udp;

    /// Receives one datagram, and returns its path and its traffic class.
    fn receive(udp: &mut Udp, drops: &Drops) -> (Path, u8) {
        let mut batch = RecvBatch::new(8);
        let fds = udp.fds().into_iter().map(|fd| fd.as_raw_fd());
        let mut fds: Vec<libc::pollfd> =
            fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
        // SAFETY: the call gets a slice of `pollfd` with its length, which lives until it returns.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, 5_000) };
        udp.receive(Ready::ALL, &mut batch, drops).unwrap();
        let [received] = batch.received() else { panic!("one datagram") };
        (received.from, received.traffic_class)
    }

    fn send(udp: &mut Udp, drops: &Drops, to: Destination) {
        let mut batch = SendBatch::new(4_096, 4);
        batch.place(&to.path, 4).unwrap()[..4].copy_from_slice(b"ping");
        batch.commit(&to, 4);
        udp.send(Instant::now(), &batch, drops);
    }

    #[test]
    fn a_datagram_leaves_from_the_port_of_its_path_and_arrives_there() {
        let drops = Drops::default();
        let [mut one, mut other] = [0; 2].map(|_| open_udp(0, 0).unwrap());
        let switches = [one.segment.clone(), one.gro.clone()];
        let second = open_second_port(0, switches, 1).unwrap().pop().unwrap();
        let ports = [(LocalPort::Configured, one.port()), (LocalPort::Second, second.port())];
        one.set_second_port(Some(second));
        for (port, number) in ports {
            let to = SocketAddr::from((Ipv4Addr::LOCALHOST, other.port()));
            send(&mut one, &drops, Path { port, ..Path::direct(to) }.into());
            let (from, _) = receive(&mut other, &drops);
            assert_eq!(from.remote.port(), number);
            send(&mut other, &drops, Path::direct(from.remote).into());
            assert_eq!(receive(&mut one, &drops).0.port, port);
        }
        one.set_second_port(None);
        assert_eq!(one.fds().len(), one.own_fds(), "the second port is closed");
    }

    #[test]
    fn the_traffic_class_of_a_datagram_arrives_with_it() {
        let drops = Drops::default();
        let [mut one, mut other] = [0; 2].map(|_| open_udp(0, 0).unwrap());
        let to = Path::direct(SocketAddr::from((Ipv4Addr::LOCALHOST, other.port())));
        for traffic_class in [0, 2, 3, 0xba] {
            send(&mut one, &drops, Destination { traffic_class, ..to.into() });
            assert_eq!(receive(&mut other, &drops).1, traffic_class);
        }
    }
}
