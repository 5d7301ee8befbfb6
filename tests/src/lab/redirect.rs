//! What a CNI plugin with eBPF host routing does to a pod's packets: a program on the pod's link looks up
//! the way in the kernel's tables and redirects the packet there. No nftables hook sees it.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use towline_netlink::Rtnetlink;

use super::namespace::Namespace;

/// The program on a link. Dropping it takes it away.
#[derive(Debug)]
pub struct Redirect {
    _link: OwnedFd,
}

/// Commands of `linux/bpf.h`, the kind of program, and where it is attached (Linux 6.6).
const BPF_PROG_LOAD: c_int = 5;
const BPF_LINK_CREATE: c_int = 28;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_TCX_INGRESS: u32 = 46;

/// `struct bpf_insn`: operation, registers (source, then destination, four bits each), where to jump,
/// and a number.
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction(u8, u8, i16, i32);

/// Functions that a program may call.
const LOAD_BYTES: i32 = 26;
const FIB_LOOKUP: i32 = 69;
const REDIRECT_NEIGHBOUR: i32 = 152;

/// Offsets in `struct __sk_buff`.
const PROTOCOL: i16 = 16;
const IFINDEX: i16 = 40;

/// `struct bpf_fib_lookup` lies on the stack, from this offset on.
const LOOKUP: i16 = -64;
const LOOKUP_BYTES: i32 = 64;
const LOOKUP_IFINDEX: i16 = LOOKUP + 8;
const LOOKUP_SOURCE: i32 = LOOKUP as i32 + 16;
const LOOKUP_DESTINATION: i32 = LOOKUP as i32 + 32;

/// Behind the Ethernet header.
const V4_SOURCE: i32 = 14 + 12;
const V4_DESTINATION: i32 = 14 + 16;
const V6_SOURCE: i32 = 14 + 8;
const V6_DESTINATION: i32 = 14 + 24;

/// `TC_ACT_SHOT`; 0 is `TC_ACT_OK`.
const DROP: i32 = 2;
/// `BPF_FIB_LKUP_RET_BLACKHOLE`, `_UNREACHABLE` and `_PROHIBIT` are 1 to 3; `_NO_NEIGH` is 7.
const LAST_REFUSAL: i32 = 3;
const NO_NEIGHBOUR: i32 = 7;

fn mov(to: u8, value: i32) -> Instruction {
    Instruction(0xb7, to, 0, value)
}

fn copy(to: u8, from: u8) -> Instruction {
    Instruction(0xbf, (from << 4) | to, 0, 0)
}

/// Copies so many bytes of the packet, from this offset on, to this offset of the stack.
fn load_bytes(at: i32, to: i32, bytes: i32) -> [Instruction; 6] {
    [
        copy(1, 6),
        mov(2, at),
        copy(3, 10),
        Instruction(0x07, 3, 0, to),
        mov(4, bytes),
        Instruction(0x85, 0, 0, LOAD_BYTES),
    ]
}

fn program() -> Vec<Instruction> {
    let exit = Instruction(0x95, 0, 0, 0);
    let family = |family| Instruction(0x72, 10, LOOKUP, family);
    let mut program = vec![copy(6, 1)];
    // All zero but for what follows.
    program.extend((0..8).map(|word| Instruction(0x7a, 10, LOOKUP + 8 * word, 0)));
    program.push(Instruction(0x61, (6 << 4) | 2, IFINDEX, 0));
    program.push(Instruction(0x63, (2 << 4) | 10, LOOKUP_IFINDEX, 0));
    program.push(Instruction(0x61, (6 << 4) | 7, PROTOCOL, 0));
    let v4 = [
        load_bytes(V4_SOURCE, LOOKUP_SOURCE, 4),
        load_bytes(V4_DESTINATION, LOOKUP_DESTINATION, 4),
    ];
    let v6 = [
        load_bytes(V6_SOURCE, LOOKUP_SOURCE, 16),
        load_bytes(V6_DESTINATION, LOOKUP_DESTINATION, 16),
    ];
    let (v4, v6) = (v4.as_flattened(), v6.as_flattened());
    let (v4_len, v6_len) = (v4.len() as i16, v6.len() as i16);
    let ethertype = |number: u16| i32::from(number.to_be());
    // IPv4, else past it and the jump behind it.
    program.push(Instruction(0x55, 7, v4_len + 2, ethertype(0x0800)));
    program.push(family(libc::AF_INET));
    program.extend(v4);
    program.push(Instruction(0x05, 0, v6_len + 4, 0));
    // IPv6, else nothing is done.
    program.push(Instruction(0x15, 7, 2, ethertype(0x86dd)));
    program.push(mov(0, 0));
    program.push(exit);
    program.push(family(libc::AF_INET6));
    program.extend(v6);
    program.extend([
        copy(1, 6),
        copy(2, 10),
        Instruction(0x07, 2, 0, i32::from(LOOKUP)),
        mov(3, LOOKUP_BYTES),
        mov(4, 0),
        Instruction(0x85, 0, 0, FIB_LOOKUP),
        // Found, also where the neighbour is not known yet: there.
        Instruction(0x15, 0, 5, 0),
        Instruction(0x15, 0, 4, NO_NEIGHBOUR),
        // A refusal drops; what else there is is left to the host.
        Instruction(0x25, 0, 1, LAST_REFUSAL),
        Instruction(0x05, 0, 8, 0),
        mov(0, 0),
        exit,
        Instruction(0x61, (10 << 4) | 1, LOOKUP_IFINDEX, 0),
        mov(2, 0),
        mov(3, 0),
        mov(4, 0),
        Instruction(0x85, 0, 0, REDIRECT_NEIGHBOUR),
        exit,
        mov(0, DROP),
        exit,
    ]);
    program
}

/// The beginning of `union bpf_attr`, as far as loading needs it.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    licence: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    rest: [u64; 4],
}

/// The same, as far as attaching needs it.
#[repr(C)]
struct Attach {
    program: u32,
    link: u32,
    kind: u32,
    flags: u32,
    rest: [u64; 4],
}

impl Redirect {
    /// Attaches the program to what enters by the link `link` of `namespace`.
    ///
    /// # Errors
    /// Where the kernel has no such programs (before Linux 6.6) or refuses them.
    pub fn attach(namespace: &Namespace, link: &str) -> anyhow::Result<Self> {
        namespace.run(|| {
            let link = Rtnetlink::open()?.link_index(link)?;
            let program = load()?;
            let attach = Attach {
                program: program.as_raw_fd().cast_unsigned(),
                link,
                kind: BPF_TCX_INGRESS,
                flags: 0,
                rest: [0; 4],
            };
            Ok(Self { _link: call(BPF_LINK_CREATE, &attach)? })
        })
    }
}

fn load() -> io::Result<OwnedFd> {
    let program = program();
    let load = Load {
        kind: BPF_PROG_TYPE_SCHED_CLS,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        // The lookup asks for it.
        licence: c"GPL".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        rest: [0; 4],
    };
    call(BPF_PROG_LOAD, &load)
}

/// A call of `bpf(2)` that gives a descriptor.
fn call<T>(command: c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads `attributes`, of this size, and what it points to, all of which outlives
    // the call.
    let descriptor = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>())
    };
    if descriptor == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as c_int) })
}
