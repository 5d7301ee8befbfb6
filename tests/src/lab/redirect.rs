//! eBPF host routing, as a CNI plugin applies it to a pod's packets: a program on the pod's link
//! redirects the packet to another link, either by the kernel's routing tables or without looking into
//! them. No nftables hook sees such a packet.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use towline_netlink::Rtnetlink;

use super::namespace::Namespace;

/// How a program chooses the link to which it redirects a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice<'a> {
    /// By the kernel's routing tables.
    ByLookup,
    /// Always the link of this name.
    Fixed(&'a str),
}

/// An attached program. Dropping it detaches the program.
#[derive(Debug)]
pub struct Redirect {
    _link: OwnedFd,
}

/// Commands of `linux/bpf.h`, the program type, and the attach point (Linux 6.6).
const BPF_PROG_LOAD: c_int = 5;
const BPF_LINK_CREATE: c_int = 28;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_TCX_INGRESS: u32 = 46;

/// The kernel's `struct bpf_insn`: opcode, registers (source in the upper four bits, destination in
/// the lower), jump offset, and immediate value.
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction(u8, u8, i16, i32);

/// Helper functions of the kernel that the program calls.
const LOAD_BYTES: i32 = 26;
const FIB_LOOKUP: i32 = 69;
const REDIRECT: i32 = 23;
const REDIRECT_NEIGHBOUR: i32 = 152;

/// Offsets of fields in `struct __sk_buff`.
const PACKET_TYPE: i16 = 4;
const PROTOCOL: i16 = 16;
const IFINDEX: i16 = 40;

/// Offset of the `struct bpf_fib_lookup` on the stack; below, its size and the offsets of its
/// fields.
const LOOKUP: i16 = -64;
const LOOKUP_BYTES: i32 = 64;
const LOOKUP_IFINDEX: i16 = LOOKUP + 8;
const LOOKUP_SOURCE: i32 = LOOKUP as i32 + 16;
const LOOKUP_DESTINATION: i32 = LOOKUP as i32 + 32;

/// Offsets of addresses in a packet that begins with its Ethernet header.
const V4_SOURCE: i32 = 14 + 12;
const V4_DESTINATION: i32 = 14 + 16;
const V6_SOURCE: i32 = 14 + 8;
const V6_DESTINATION: i32 = 14 + 24;

/// Return value `TC_ACT_SHOT`; 0 is `TC_ACT_OK`.
const DROP: i32 = 2;
/// Results of the lookup: `BPF_FIB_LKUP_RET_BLACKHOLE`, `_UNREACHABLE` and `_PROHIBIT` are 1 to 3;
/// `_NO_NEIGH` is 7.
const LAST_REFUSAL: i32 = 3;
const NO_NEIGHBOUR: i32 = 7;

fn mov(to: u8, value: i32) -> Instruction {
    Instruction(0xb7, to, 0, value)
}

fn copy(to: u8, from: u8) -> Instruction {
    Instruction(0xbf, (from << 4) | to, 0, 0)
}

/// Copies `bytes` bytes of the packet from offset `at` to the offset `to` of the stack.
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

/// Returns the program that redirects every unicast frame of IP to a link.
fn fixed(link: u32) -> Vec<Instruction> {
    let ethertype = |number: u16| i32::from(number.to_be());
    vec![
        Instruction(0x61, (1 << 4) | 2, PACKET_TYPE, 0),
        Instruction(0x61, (1 << 4) | 3, PROTOCOL, 0),
        mov(0, 0),
        // `PACKET_BROADCAST` and `PACKET_MULTICAST`: ARP and neighbour discovery go to the host.
        Instruction(0x15, 2, 6, 1),
        Instruction(0x15, 2, 5, 2),
        Instruction(0x15, 3, 1, ethertype(0x0800)),
        Instruction(0x55, 3, 3, ethertype(0x86dd)),
        mov(1, link.cast_signed()),
        mov(2, 0),
        Instruction(0x85, 0, 0, REDIRECT),
        Instruction(0x95, 0, 0, 0),
    ]
}

/// Returns the program that redirects by the kernel's routing tables.
fn by_lookup() -> Vec<Instruction> {
    let exit = Instruction(0x95, 0, 0, 0);
    let family = |family| Instruction(0x72, 10, LOOKUP, family);
    let mut program = vec![copy(6, 1)];
    // All fields are zero except those set below.
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
    // For IPv4; otherwise skips this block and the jump after it.
    program.push(Instruction(0x55, 7, v4_len + 2, ethertype(0x0800)));
    program.push(family(libc::AF_INET));
    program.extend(v4);
    program.push(Instruction(0x05, 0, v6_len + 4, 0));
    // For IPv6; otherwise the packet passes unchanged.
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
        // A route was found, though its neighbour may be unknown: redirect.
        Instruction(0x15, 0, 5, 0),
        Instruction(0x15, 0, 4, NO_NEIGHBOUR),
        // A refusal drops the packet; every other result leaves it to the host.
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

/// Prefix of `union bpf_attr` that is needed to load a program.
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

/// Prefix of `union bpf_attr` that is needed to attach a program.
#[repr(C)]
struct Attach {
    program: u32,
    link: u32,
    kind: u32,
    flags: u32,
    rest: [u64; 4],
}

impl Redirect {
    /// Attaches the program to packets that enter by the link `link` of `namespace`.
    ///
    /// # Errors
    /// If the kernel has no such programs (before Linux 6.6) or refuses them.
    pub fn attach(namespace: &Namespace, link: &str, choice: Choice<'_>) -> anyhow::Result<Self> {
        namespace.run(|| {
            let mut rtnetlink = Rtnetlink::open()?;
            let link = rtnetlink.link_index(link)?;
            let program = load(&match choice {
                Choice::ByLookup => by_lookup(),
                Choice::Fixed(to) => fixed(rtnetlink.link_index(to)?),
            })?;
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

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let load = Load {
        kind: BPF_PROG_TYPE_SCHED_CLS,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        // The lookup helper is reserved for GPL programs.
        licence: c"GPL".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        rest: [0; 4],
    };
    call(BPF_PROG_LOAD, &load)
}

/// Calls `bpf(2)` with a command that returns a descriptor.
fn call<T>(command: c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads `attributes`, of this size, and what it points to, all of which outlives
    // the call.
    let descriptor = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>())
    };
    if descriptor == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as c_int) })
}
