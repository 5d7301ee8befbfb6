//! Liveness of the TCP connections between agents and controllers.
//!
//! Both ends set the same values, so both notice at the same time that the other one is gone.

use std::io;
use std::os::fd::AsFd;

use nix::sys::socket::{setsockopt, sockopt};

/// Time without data before the first probe, in seconds.
const IDLE_S: u32 = 5;
/// Interval between two probes, in seconds.
const INTERVAL_S: u32 = 3;
/// Number of probes without an answer that end a connection.
const PROBES: u32 = 3;
/// Time in milliseconds after which the kernel ends a connection that has unacknowledged data.
const UNACKNOWLEDGED_MS: u32 = 14_000;

/// Lets the kernel end a connection whose peer is gone: after 5 + 3 * 3 = 14 s without data, or within
/// 30 s if data was sent in the meantime, since the kernel does not probe while data is unacknowledged.
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
