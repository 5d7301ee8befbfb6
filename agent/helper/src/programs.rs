//! The eBPF programs of the agent and their loading (`bpf(2)`).
//!
//! The programs are constants of this package. The helper must not load a program that a client
//! sends.

use std::ffi::c_int;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// Command of `bpf(2)` that loads a program (`linux/bpf.h`).
const BPF_PROG_LOAD: c_int = 5;
/// Type of a socket filter program (`linux/bpf.h`), which TUN steering programs have.
const BPF_PROG_TYPE_SOCKET_FILTER: u32 = 1;

/// eBPF instruction (`struct bpf_insn`): operation code, registers (four bits each: source, then
/// destination), jump offset, and immediate value.
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction(u8, u8, i16, i32);

/// Program that chooses the queue of a TUN by a hash of the last 32 bits of the destination (golden
/// ratio multiplication, upper half).
///
/// Without a program the kernel sends a flow to the queue that the other direction was last written
/// to. When that changes, later packets overtake those that wait in the previous queue.
const STEERING: [Instruction; 13] = [
    // Loads are relative to the packet, which begins with its IP header.
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
    // Packets of other versions go to queue 0.
    Instruction(0xb7, 0, 0, 0),
    Instruction(0x95, 0, 0, 0),
];

/// First fields of `union bpf_attr`, up to the last one that loading needs.
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
/// Returns an error before Linux 4.16, or without the capability `CAP_BPF` (before Linux 5.8
/// `CAP_SYS_ADMIN`) if the machine does not let every user load such programs.
pub fn steering() -> io::Result<OwnedFd> {
    load(BPF_PROG_TYPE_SOCKET_FILTER, &STEERING)
}

fn load(kind: u32, program: &[Instruction]) -> io::Result<OwnedFd> {
    let load = Load {
        kind,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        // An empty licence is enough, because the programs call no function that requires the GPL.
        licence: c"".as_ptr() as u64,
        rest: [0; 4],
    };
    // SAFETY: the kernel reads `load` and the memory that it points to, all of which outlives the
    // call.
    let descriptor =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<Load>()) };
    if descriptor == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as c_int) })
}
