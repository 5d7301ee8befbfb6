//! Which queue of the TUN a packet comes by: always the same for the same destination.
//!
//! By itself the kernel has a flow follow its replies: it comes by the queue that the other
//! direction was last written to, and what still waits in the queue before is overtaken. A program
//! (eBPF, see `bpf(2)`) that looks at nothing but the destination takes its place.

use std::ffi::{c_int, c_uint};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `linux/if_tun.h`: takes the descriptor of a program that returns a queue's number, of which the
/// kernel takes the remainder.
const TUNSETSTEERINGEBPF: c_uint = 0x8004_54e0;
/// `linux/bpf.h`.
const BPF_PROG_LOAD: c_int = 5;
const BPF_PROG_TYPE_SOCKET_FILTER: u32 = 1;

/// `struct bpf_insn`: operation, registers (source, then destination, four bits each), where to
/// jump, and a number.
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction(u8, u8, i16, i32);

/// The last 32 bits of the destination, mixed: golden ratio multiplication, upper half.
const PROGRAM: [Instruction; 13] = [
    // What is loaded is of the packet, which begins with its IP header.
    Instruction(0xbf, 0x16, 0, 0),
    Instruction(0x30, 0, 0, 0),
    Instruction(0x77, 0, 0, 4),
    Instruction(0x15, 0, 3, 6),
    Instruction(0x55, 0, 6, 4),
    Instruction(0x20, 0, 0, 16),
    Instruction(0x05, 0, 1, 0),
    Instruction(0x20, 0, 0, 36),
    Instruction(0x24, 0, 0, 0x9e37_79b1_u32 as i32),
    Instruction(0x74, 0, 0, 16),
    Instruction(0x95, 0, 0, 0),
    // Neither IPv4 nor IPv6.
    Instruction(0xb7, 0, 0, 0),
    Instruction(0x95, 0, 0, 0),
];

/// The beginning of `union bpf_attr`, as far as loading needs it.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    licence: u64,
    rest: [u64; 4],
}

/// Has the TUN choose queues by destination alone.
///
/// # Errors
///
/// Before Linux 4.16; without the capability `CAP_BPF` (before Linux 5.8 `CAP_SYS_ADMIN`), where
/// the machine does not let everybody load such programs.
pub(super) fn by_destination(tun: BorrowedFd<'_>) -> io::Result<()> {
    let program = load()?;
    let descriptor: c_int = program.as_raw_fd();
    // SAFETY: the call reads one `int`, which `descriptor` is; the program lives until it returns,
    // and the TUN then holds it.
    let result = unsafe {
        libc::ioctl(tun.as_raw_fd(), TUNSETSTEERINGEBPF as _, (&raw const descriptor).cast_mut())
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn load() -> io::Result<OwnedFd> {
    let load = Load {
        kind: BPF_PROG_TYPE_SOCKET_FILTER,
        count: PROGRAM.len() as u32,
        instructions: PROGRAM.as_ptr() as u64,
        // It calls nothing that asks for one.
        licence: c"".as_ptr() as u64,
        rest: [0; 4],
    };
    // SAFETY: the kernel reads `load` and what it points to, all of which outlives the call.
    let descriptor =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<Load>()) };
    if descriptor == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as c_int) })
}
