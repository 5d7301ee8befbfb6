//! Liveness of the TCP connections between agents and controllers.
//!
//! Both ends set the same values, so both notice at the same time that the other one is gone.

use std::io;
use std::os::fd::AsFd;

use nix::sys::socket::{setsockopt, sockopt};

/// Time without data before the first probe, in seconds. With 10,000 connections these are 2,500 probes a second.
const IDLE_S: u32 = 4;
/// Interval between two probes, in seconds.
const INTERVAL_S: u32 = 1;
/// Number of probes without an answer that end a connection.
const PROBES: u32 = 3;
/// Time in milliseconds after which the kernel ends a connection that has unacknowledged data.
const UNACKNOWLEDGED_MS: u32 = 7_000;
/// Longest time in which the kernel notices that a peer is gone, in milliseconds. The kernel does not probe while
/// data is unacknowledged. So the worst case is data that is sent just before the probes would have ended the
/// connection.
const NOTICED_MS: u32 = (IDLE_S + PROBES * INTERVAL_S) * 1_000 + UNACKNOWLEDGED_MS;

/// Peers that are gone are noticed within 15 s, at both ends.
const _: () = assert!(NOTICED_MS <= 15_000);

/// Lets the kernel end a connection whose peer is gone: after 4 + 3 * 1 = 7 s without data, or within 14 s if data was
/// sent in the meantime.
///
/// # Errors
///
/// If the descriptor is no TCP socket.
pub fn keep_alive(socket: &impl AsFd) -> io::Result<()> {
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &IDLE_S)?;
    setsockopt(socket, sockopt::TcpKeepInterval, &INTERVAL_S)?;
    setsockopt(socket, sockopt::TcpKeepCount, &PROBES)?;
    setsockopt(socket, sockopt::TcpUserTimeout, &UNACKNOWLEDGED_MS)?;
    Ok(())
}
