//! The eBPF programs of the agent and their loading (`bpf(2)`).
//!
//! The programs are constants of this package, except for the numbers of a request. The helper must
//! not load a program that a client sends.

use std::ffi::{CStr, c_int};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// Command of `bpf(2)` that loads a program (`linux/bpf.h`).
const BPF_PROG_LOAD: c_int = 5;
/// Type of a socket filter program (`linux/bpf.h`), which TUN steering programs have.
const BPF_PROG_TYPE_SOCKET_FILTER: u32 = 1;

/// Length of a program's name in bytes, with its final zero (`BPF_OBJ_NAME_LEN`).
pub(crate) const PROGRAM_NAME_BYTES: usize = 16;

/// eBPF instruction (`struct bpf_insn`): operation code, registers (four bits each: source, then
/// destination), jump offset, and immediate value.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Instruction(pub u8, pub u8, pub i16, pub i32);

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
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; PROGRAM_NAME_BYTES],
}

/// Loads the program that chooses the queue of a TUN by destination.
///
/// # Errors
///
/// Returns an error before Linux 4.16, or without the capability `CAP_BPF` (before Linux 5.8
/// `CAP_SYS_ADMIN`) if the machine does not let every user load such programs.
pub fn steering() -> io::Result<OwnedFd> {
    // An empty licence is enough, because the program calls no function that requires the GPL.
    load(BPF_PROG_TYPE_SOCKET_FILTER, &STEERING, c"", c"")
}

/// Loads a program of at most 15 bytes of name. The name is for tools such as `bpftool`, and may be
/// empty, which kernels before 4.15 require.
pub(crate) fn load(
    kind: u32,
    program: &[Instruction],
    licence: &CStr,
    name: &CStr,
) -> io::Result<OwnedFd> {
    let mut load = Load {
        kind,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        licence: licence.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: [0; PROGRAM_NAME_BYTES],
    };
    for (to, from) in load.name.iter_mut().zip(name.to_bytes()).take(PROGRAM_NAME_BYTES - 1) {
        *to = *from;
    }
    let descriptor = call(BPF_PROG_LOAD, &mut load)?;
    // SAFETY: the descriptor is new, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Calls `bpf(2)`. `attributes` is the prefix of `union bpf_attr` that belongs to the command.
pub(crate) fn call<T>(command: c_int, attributes: &mut T) -> io::Result<c_int> {
    // SAFETY: the kernel reads and writes `attributes`, which has the given size, and the memory that
    // it points to. All of it outlives the call.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>())
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result as c_int) }
}
