//! The eBPF programs of the agent, and how they are loaded (`bpf(2)`).
//!
//! They are constants of this package: the helper loads nothing that a client sends.

use std::ffi::c_int;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// `linux/bpf.h`.
const BPF_PROG_LOAD: c_int = 5;
const BPF_PROG_TYPE_SOCKET_FILTER: u32 = 1;

/// `struct bpf_insn`: operation, registers (source, then destination, four bits each), offset of a
/// jump, and a number.
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction(u8, u8, i16, i32);

/// Chooses the queue of a TUN: the last 32 bits of the destination, mixed (golden ratio
/// multiplication, upper half).
///
/// By itself the kernel has a flow follow its replies: it comes by the queue that the other
/// direction was last written to, and overtakes what still waits in the queue before.
const STEERING: [Instruction; 13] = [
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

/// The beginning of `union bpf_attr`, up to the last field that loading needs.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    licence: u64,
    rest: [u64; 4],
}

/// Loads the program that chooses the queue of a TUN by destination.
///
/// # Errors
///
/// Before Linux 4.16; without the capability `CAP_BPF` (before Linux 5.8 `CAP_SYS_ADMIN`), where
/// the machine does not let everybody load such programs.
pub fn steering() -> io::Result<OwnedFd> {
    load(BPF_PROG_TYPE_SOCKET_FILTER, &STEERING)
}

fn load(kind: u32, program: &[Instruction]) -> io::Result<OwnedFd> {
    let load = Load {
        kind,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        // The programs call nothing that asks for one.
        licence: c"".as_ptr() as u64,
        rest: [0; 4],
    };
    // SAFETY: the kernel reads `load` and what it points to, all of which outlives the call.
    let descriptor =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<Load>()) };
    if descriptor == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as c_int) })
}
