//! Which queue of the TUN a packet comes by: always the same for the same destination.
//!
//! The program (eBPF, see `bpf(2)`) is [`towline_helper::programs::steering`]. An agent that may not
//! load it asks the helper, which returns its descriptor.

use std::ffi::{c_int, c_uint};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use towline_helper::protocol::Request;
use towline_helper::{client, programs};

/// `linux/if_tun.h`: takes the descriptor of a program that returns a queue's number, of which the
/// kernel takes the remainder.
const TUNSETSTEERINGEBPF: c_uint = 0x8004_54e0;

/// Has the TUN choose queues by destination alone.
///
/// # Errors
///
/// Before Linux 4.16; where neither this process nor the helper may load programs.
pub(super) fn by_destination(tun: BorrowedFd<'_>) -> io::Result<()> {
    let program = program()?;
    let descriptor: c_int = program.as_raw_fd();
    // SAFETY: the call reads one `int`, which `descriptor` is; the program lives until it returns,
    // and the TUN then holds it.
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
                    "loading a steering program needs CAP_BPF or towline-helper: {error}: run \
                     `systemctl start towline-helper.socket`"
                ))
            })
        }
        loaded => loaded,
    }
}
