//! Steering of packets to the queues of the TUN: all packets for one destination arrive by the same
//! queue.
//!
//! The program (eBPF, see `bpf(2)`) is [`towline_helper::programs::steering`]. An agent that may not
//! load it asks the helper, which returns its descriptor.

use std::ffi::{c_int, c_uint};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use towline_helper::protocol::Request;
use towline_helper::{client, programs};

/// Ioctl of `linux/if_tun.h` that sets the steering program of a TUN. The kernel takes the
/// program's result modulo the number of queues.
const TUNSETSTEERINGEBPF: c_uint = 0x8004_54e0;

/// Makes the TUN choose the queue of a packet by its destination only.
///
/// # Errors
///
/// Returns an error before Linux 4.16, or if neither this process nor the helper may load eBPF
/// programs.
pub(super) fn by_destination(tun: BorrowedFd<'_>) -> io::Result<()> {
    let program = program()?;
    let descriptor: c_int = program.as_raw_fd();
    // SAFETY: the call reads one `int`, which `descriptor` is. The program lives until the call
    // returns, and the TUN then holds a reference to it.
    let result = unsafe {
        libc::ioctl(tun.as_raw_fd(), TUNSETSTEERINGEBPF as _, (&raw const descriptor).cast_mut())
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn program() -> io::Result<OwnedFd> {
    match programs::steering() {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            client::ask_for_one(Request::SteeringProgram).map_err(|error| {
                io::Error::other(format!(
                    "cannot load the steering program: it needs CAP_BPF or towline-helper: {error}: run \
                     `systemctl start towline-helper.socket`"
                ))
            })
        }
        loaded => loaded,
    }
}
