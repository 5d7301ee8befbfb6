//! Self-tests of the offloads: whether `UDP_SEGMENT` and `UDP_GRO` work on this machine.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::Offloads;
use crate::arena::{SLOT_BYTES, SendBatch};
use crate::switch::OffReason;

use super::endpoint::set;
use super::messages::{Headers, ReceivedMessage};
use super::{UDP_GRO, UDP_SEGMENT};

/// Longest time that a self-test waits for its datagrams on the loopback.
const SELF_TEST_TIMEOUT: Duration = Duration::from_millis(200);
/// First kernel version in which `UDP_GRO` reports correct lengths.
const GRO_SINCE: [u32; 3] = [5, 12, 0];
/// Kernel versions, from the first up to but excluding the second, that corrupt segments of equal
/// length when sending.
const SEGMENT_CORRUPTED: [[u32; 3]; 2] = [[7, 0, 0], [7, 1, 5]];

/// Checks whether `UDP_SEGMENT` and `UDP_GRO` work on this machine, in this order. An error is the
/// reason why not.
pub(super) fn probe(offloads: Offloads) -> (Result<(), OffReason>, Result<(), OffReason>) {
    let version = kernel_version();
    let segment = if !offloads.udp_segment {
        Err(OffReason::Configured)
    } else if SEGMENT_CORRUPTED[0] <= version && version < SEGMENT_CORRUPTED[1] {
        Err(OffReason::Defective("Linux 7.0 to 7.1.4 damages segments that it sends"))
    } else {
        try_out(SelfTest::Segment)
    };
    let gro = if !offloads.udp_gro {
        Err(OffReason::Configured)
    } else if version < GRO_SINCE {
        Err(OffReason::Defective("UDP_GRO is broken before Linux 5.12"))
    } else {
        try_out(SelfTest::Gro)
    };
    (segment, gro)
}

/// Returns the numbers of the kernel's version. A number that cannot be read is 0.
fn kernel_version() -> [u32; 3] {
    let mut version = [0; 3];
    if let Ok(name) = nix::sys::utsname::uname() {
        let release = name.release().to_string_lossy();
        let numbers = release.split(|c: char| !c.is_ascii_digit());
        for (to, from) in version.iter_mut().zip(numbers) {
            *to = from.parse().unwrap_or(0);
        }
    }
    version
}

/// Offload that a self-test checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SelfTest {
    Segment,
    Gro,
}

/// Sends a GSO batch over the loopback and compares what arrives. Without a usable loopback the
/// test passes.
fn try_out(what: SelfTest) -> Result<(), OffReason> {
    const LENGTHS: [usize; 5] = [1200, 1200, 1200, 1200, 700];
    let refused =
        |error: io::Error| OffReason::Unsupported(format!("the kernel refused it: {error}"));
    let sockets = [0; 2].map(|_| {
        let any = SockAddr::from(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
        socket.bind(&any)?;
        socket.set_read_timeout(Some(SELF_TEST_TIMEOUT))?;
        io::Result::Ok(socket)
    });
    let [Ok(sender), Ok(receiver)] = sockets else { return Ok(()) };
    set(&sender, libc::SOL_UDP, UDP_SEGMENT, 0).map_err(refused)?;
    if what == SelfTest::Gro {
        set(&receiver, libc::SOL_UDP, UDP_GRO, 1).map_err(refused)?;
    }
    let Ok(Some(to)) = receiver.local_addr().map(|address| address.as_socket()) else {
        return Ok(());
    };
    let mut batch = SendBatch::new(SLOT_BYTES, LENGTHS.len());
    let mut sent: Vec<u8> = Vec::new();
    for (number, length) in LENGTHS.into_iter().enumerate() {
        let datagram: Vec<u8> = (0..length).map(|at| (at * 7 + at / 256 + number) as u8).collect();
        if !batch.push(to.into(), &datagram) {
            return Err(OffReason::SelfTest("a self-test has no room".to_owned()));
        }
        sent.extend_from_slice(&datagram);
    }
    let mut headers = Headers::new();
    match headers.send(&sender, batch.bytes(), batch.gso_batches()) {
        Ok(_) => {}
        Err(error) if error.raw_os_error() == Some(libc::ENETUNREACH) => return Ok(()),
        Err(error) => return Err(refused(error)),
    }
    let mut slots = vec![0; SLOT_BYTES];
    let mut received: Vec<u8> = Vec::new();
    while received.len() < sent.len() {
        if headers.receive_waiting(&receiver, &mut slots).is_err() {
            break;
        }
        let Some(ReceivedMessage { len, segment_size, .. }) = headers.received(0) else { break };
        // Either the whole GSO batch arrives at once, or one datagram with the length that was
        // sent.
        let whole = segment_size == LENGTHS[0] && len == sent.len();
        let single = segment_size == 0 && LENGTHS.contains(&len);
        if !whole && !single {
            return Err(OffReason::SelfTest(format!(
                "self-test failed: received {len} bytes in segments of {segment_size}"
            )));
        }
        received.extend_from_slice(&slots[..len]);
    }
    // Nothing arrives if the loopback is down or a firewall drops the datagrams.
    if received.is_empty() || received == sent {
        Ok(())
    } else {
        let why = "self-test failed: the received bytes differ from those sent";
        Err(OffReason::SelfTest(why.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A self-test that fails wrongly halves the throughput, and nothing else reveals it.
    #[test]
    fn a_kernel_that_has_the_offloads_passes_their_self_tests() {
        for (what, since) in [(SelfTest::Segment, [4, 18, 0]), (SelfTest::Gro, GRO_SINCE)] {
            let corrupted =
                SEGMENT_CORRUPTED[0] <= kernel_version() && kernel_version() < SEGMENT_CORRUPTED[1];
            if kernel_version() >= since && !corrupted {
                assert_eq!(try_out(what), Ok(()), "{what:?}");
            }
        }
    }
}
