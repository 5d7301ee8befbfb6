//! The eBPF program that drops packets to the mesh which another program redirects to an uplink.
//!
//! A program that redirects a packet from one link to another (`bpf_redirect`) skips every nftables
//! hook, that of the family netdev at egress too. Programs of traffic control at the egress of the
//! output link still see the packet. This one is attached there by TCX (Linux 6.6), before all others,
//! since any of them may end the chain. It is no BPF link, so that it outlives the process that
//! attached it.
//!
//! The program looks up the packet's destination in the kernel's routing tables and follows Towline's
//! rules and routes there. So it needs no map, and nobody updates it when the mesh changes:
//!
//! | packet | verdict |
//! |---|---|
//! | neither IPv4 nor IPv6, such as ARP | next program |
//! | our mark, from a local socket, and never received by a link | next program: nftables judges it |
//! | IPv6 neighbour discovery | next program |
//! | a route refuses the destination, or leads into the tunnel | drop |
//! | all others | next program |
//!
//! A packet that was redirected may have a socket too: that of the pod that sent it. But a link has
//! received it.
//!
//! # Limits
//!
//! - The kernel looks up no route for a link that does not forward (`net.ipv4.conf.LINK.forwarding`, and
//!   the same of IPv6). The packet then passes.
//! - The program expects Ethernet links.
//! - A netkit link keeps its pod's socket, and does not count as having received the packet. A program
//!   on such a link that sets our mark itself gets past this one.
//!
//! Other programs of TCX stay as they are.

use std::ffi::{CStr, c_int};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use crate::programs::{self, Instruction, PROGRAM_NAME_BYTES};
use crate::protocol::{EgressGuard, Uplink};

/// Name that identifies the program as Towline's.
const NAME: &CStr = c"towline_egress";

/// Commands of `bpf(2)` (`linux/bpf.h`).
const BPF_PROG_ATTACH: c_int = 8;
const BPF_PROG_DETACH: c_int = 9;
const BPF_PROG_GET_FD_BY_ID: c_int = 13;
const BPF_OBJ_GET_INFO_BY_FD: c_int = 15;
const BPF_PROG_QUERY: c_int = 16;
/// Type of programs of traffic control.
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
/// Attachment type of programs that see packets entering a link (TCX, Linux 6.6).
const BPF_TCX_INGRESS: u32 = 46;
/// Attachment type of programs that see packets leaving a link.
const BPF_TCX_EGRESS: u32 = 47;
/// Flag of an attachment that puts the program before another one: before all if none is named.
const BPF_F_BEFORE: u32 = 1 << 3;
/// Greatest number of programs at one attachment point (`BPF_MPROG_MAX`).
const PROGRAMS: usize = 64;

/// Verdict that lets the next program decide (`TCX_NEXT`).
const NEXT: i32 = -1;
/// Verdict that drops the packet (`TCX_DROP`).
const DROP: i32 = 2;

/// Functions of the kernel that the program calls.
const LOAD_BYTES: i32 = 26;
const FIB_LOOKUP: i32 = 69;
/// Flag of a lookup that needs no neighbour of the route found (`BPF_FIB_LOOKUP_SKIP_NEIGH`, Linux 6.3).
const SKIP_NEIGHBOUR: i32 = 4;
/// Results of a lookup that the route refuses: `BPF_FIB_LKUP_RET_BLACKHOLE`, `_UNREACHABLE`, `_PROHIBIT`.
const REFUSALS: [i32; 3] = [1, 2, 3];

/// Offsets of fields in `struct __sk_buff`.
const SKB_MARK: i16 = 8;
const SKB_PROTOCOL: i16 = 16;
const SKB_INGRESS: i16 = 36;
const SKB_IFINDEX: i16 = 40;
const SKB_SOCKET: i16 = 168;

/// Offset of the `struct bpf_fib_lookup` on the stack; below, its size and the offsets of its fields.
const LOOKUP: i16 = -64;
const LOOKUP_BYTES: i32 = 64;
const LOOKUP_IFINDEX: i16 = LOOKUP + 8;
const LOOKUP_SOURCE: i16 = LOOKUP + 16;
const LOOKUP_DESTINATION: i16 = LOOKUP + 32;
/// Offset of 8 bytes on the stack for single fields of the packet.
const SCRATCH: i16 = LOOKUP - 8;

/// Offsets in a frame that begins with its Ethernet header.
const IP: i32 = 14;
const V4_SOURCE: i32 = IP + 12;
const V4_DESTINATION: i32 = IP + 16;
const V6_NEXT_HEADER: i32 = IP + 6;
const V6_SOURCE: i32 = IP + 8;
const V6_DESTINATION: i32 = IP + 24;
const V6_PAYLOAD: i32 = IP + 40;

/// Part of the program that jumps lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Label {
    /// IPv4 or IPv6.
    Ip,
    /// Not one of our own packets.
    Foreign,
    /// IPv6.
    Ipv6,
    /// IPv6, but not neighbour discovery.
    Addresses,
    /// IPv6, with a source that the lookup must not see.
    NoSource,
    /// The lookup.
    Lookup,
    Next,
    Drop,
}

/// Program under construction.
#[derive(Debug, Default)]
struct Assembler {
    instructions: Vec<Instruction>,
    /// Jumps by the index of their instruction.
    jumps: Vec<(usize, Label)>,
    /// Labels with the index of the instruction that follows.
    labels: Vec<(Label, usize)>,
}

impl Assembler {
    fn push(&mut self, code: u8, registers: u8, offset: i16, value: i32) {
        self.instructions.push(Instruction(code, registers, offset, value));
    }

    fn label(&mut self, label: Label) {
        self.labels.push((label, self.instructions.len()));
    }

    fn jump(&mut self, code: u8, register: u8, value: i32, to: Label) {
        self.jumps.push((self.instructions.len(), to));
        self.push(code, register, 0, value);
    }

    /// Jumps if the lower half of a register equals a value.
    fn if_equal(&mut self, register: u8, value: i32, to: Label) {
        self.jump(0x16, register, value, to);
    }

    fn unless_equal(&mut self, register: u8, value: i32, to: Label) {
        self.jump(0x56, register, value, to);
    }

    fn go_to(&mut self, to: Label) {
        self.jump(0x05, 0, 0, to);
    }

    fn set(&mut self, register: u8, value: i32) {
        self.push(0xb7, register, 0, value);
    }

    fn copy(&mut self, to: u8, from: u8) {
        self.push(0xbf, from << 4 | to, 0, 0);
    }

    /// Loads a field of 32 bits of the context.
    fn field(&mut self, register: u8, offset: i16) {
        self.push(0x61, 6 << 4 | register, offset, 0);
    }

    /// Loads a byte of the stack.
    fn byte(&mut self, register: u8, offset: i16) {
        self.push(0x71, 10 << 4 | register, offset, 0);
    }

    /// Sets eight bytes of the stack to zero.
    fn clear(&mut self, offset: i16) {
        self.push(0x7a, 10, offset, 0);
    }

    /// Copies bytes of the packet to the stack. Copies zeros if the packet is too short.
    fn load(&mut self, at: i32, to: i16, bytes: i32) {
        self.copy(1, 6);
        self.set(2, at);
        self.copy(3, 10);
        self.push(0x07, 3, 0, to.into());
        self.set(4, bytes);
        self.push(0x85, 0, 0, LOAD_BYTES);
    }

    /// Returns the program, with the distances of its jumps.
    fn finish(mut self) -> Vec<Instruction> {
        for (at, to) in self.jumps {
            let target = self.labels.iter().find(|(label, _)| *label == to);
            // Every label is placed; see the test that loads the program.
            let target = target.map_or(at + 1, |(_, target)| *target);
            if let Some(jump) = self.instructions.get_mut(at) {
                jump.2 = (target - at - 1) as i16;
            }
        }
        self.instructions
    }
}

/// Returns the program for a guard. Register 6 holds the context.
fn program(guard: &EgressGuard) -> Vec<Instruction> {
    let ethertype = |number: u16| i32::from(number.to_be());
    let version = |program: &mut Assembler, number: i32| {
        program.load(IP, SCRATCH, 1);
        program.byte(1, SCRATCH);
        program.push(0x74, 1, 0, 4);
        program.unless_equal(1, number, Label::Next);
    };
    let mut program = Assembler::default();
    program.copy(6, 1);
    program.field(7, SKB_PROTOCOL);
    program.if_equal(7, ethertype(0x0800), Label::Ip);
    program.unless_equal(7, ethertype(0x86dd), Label::Next);

    program.label(Label::Ip);
    program.field(1, SKB_MARK);
    program.push(0x54, 1, 0, guard.mask().cast_signed());
    program.unless_equal(1, guard.mark().cast_signed(), Label::Foreign);
    program.field(1, SKB_INGRESS);
    program.unless_equal(1, 0, Label::Foreign);
    program.push(0x79, 6 << 4 | 1, SKB_SOCKET, 0);
    // Compares all 64 bits: the register holds a pointer.
    program.jump(0x55, 1, 0, Label::Next);

    program.label(Label::Foreign);
    for word in 0..9 {
        program.clear(SCRATCH + 8 * word);
    }
    program.field(1, SKB_IFINDEX);
    program.push(0x63, 1 << 4 | 10, LOOKUP_IFINDEX, 0);
    program.unless_equal(7, ethertype(0x0800), Label::Ipv6);
    version(&mut program, 4);
    program.push(0x72, 10, LOOKUP, libc::AF_INET);
    program.load(V4_SOURCE, LOOKUP_SOURCE, 4);
    program.load(V4_DESTINATION, LOOKUP_DESTINATION, 4);
    program.go_to(Label::Lookup);

    program.label(Label::Ipv6);
    version(&mut program, 6);
    // Neighbour discovery has the hop limit 255, so no router forwarded it.
    program.load(V6_NEXT_HEADER, SCRATCH, 2);
    program.byte(1, SCRATCH);
    program.unless_equal(1, libc::IPPROTO_ICMPV6, Label::Addresses);
    program.byte(1, SCRATCH + 1);
    program.unless_equal(1, 255, Label::Addresses);
    program.load(V6_PAYLOAD, SCRATCH, 1);
    program.byte(1, SCRATCH);
    for kind in 133..=137 {
        program.if_equal(1, kind, Label::Next);
    }
    program.label(Label::Addresses);
    program.push(0x72, 10, LOOKUP, libc::AF_INET6);
    program.load(V6_SOURCE, LOOKUP_SOURCE, 16);
    program.load(V6_DESTINATION, LOOKUP_DESTINATION, 16);
    // The kernel looks up no route from a link-local or multicast source.
    program.byte(1, LOOKUP_SOURCE);
    program.if_equal(1, 0xff, Label::NoSource);
    program.unless_equal(1, 0xfe, Label::Lookup);
    program.byte(1, LOOKUP_SOURCE + 1);
    program.push(0x54, 1, 0, 0xc0);
    program.unless_equal(1, 0x80, Label::Lookup);
    program.label(Label::NoSource);
    program.clear(LOOKUP_SOURCE);
    program.clear(LOOKUP_SOURCE + 8);

    program.label(Label::Lookup);
    program.copy(1, 6);
    program.copy(2, 10);
    program.push(0x07, 2, 0, LOOKUP.into());
    program.set(3, LOOKUP_BYTES);
    // The lookup is that of a packet that enters by this link: all of Towline's rules for forwarded
    // packets apply. With `BPF_FIB_LOOKUP_OUTPUT` it would skip the routes into the tunnel.
    program.set(4, SKIP_NEIGHBOUR);
    program.push(0x85, 0, 0, FIB_LOOKUP);
    for refusal in REFUSALS {
        program.if_equal(0, refusal, Label::Drop);
    }
    program.push(0x61, 10 << 4 | 1, LOOKUP_IFINDEX, 0);
    program.if_equal(1, guard.tunnel().cast_signed(), Label::Drop);
    program.label(Label::Next);
    program.set(0, NEXT);
    program.push(0x95, 0, 0, 0);
    program.label(Label::Drop);
    program.set(0, DROP);
    program.push(0x95, 0, 0, 0);
    program.finish()
}

/// Attaches the guard to its uplink as the first program, in place of earlier ones of Towline. Changes
/// nothing if it is attached already.
///
/// # Errors
///
/// Returns an error before Linux 6.6, without the capabilities `CAP_BPF`, `CAP_NET_ADMIN` and (to
/// recognize earlier programs) `CAP_SYS_ADMIN`, or if the uplink is gone.
pub fn attach(guard: &EgressGuard) -> io::Result<()> {
    // The kernel accepts the lookup only from a program under the GPL. That concerns the instructions
    // above, not this package.
    let program = programs::load(BPF_PROG_TYPE_SCHED_CLS, &program(guard), c"GPL", NAME)?;
    let attached = attached(guard.uplink())?;
    let mut ours = attached.iter().filter_map(|at| at.ours.as_ref());
    let is_first = attached.first().is_some_and(|at| at.ours.is_some());
    if let (true, Some(only), None) = (is_first, ours.next(), ours.next())
        && Info::of(only)?.tag == Info::of(&program)?.tag
    {
        return Ok(());
    }
    let mut attach = Attach::new(guard.uplink(), &program);
    attach.flags = BPF_F_BEFORE;
    programs::call(BPF_PROG_ATTACH, &mut attach)?;
    detach_all(guard.uplink(), attached)
}

/// Detaches every program of Towline from the egress of a link. A missing link is no error.
///
/// # Errors
///
/// Returns an error if this process may not list or detach the programs of the link.
pub fn detach(uplink: Uplink) -> io::Result<()> {
    detach_all(uplink, attached(uplink)?)
}

fn detach_all(uplink: Uplink, attached: Vec<Attached>) -> io::Result<()> {
    for program in attached.iter().filter_map(|at| at.ours.as_ref()) {
        match programs::call(BPF_PROG_DETACH, &mut Attach::new(uplink, program)) {
            // Another process detached it, or the link is gone.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => {}
            result => {
                result?;
            }
        }
    }
    Ok(())
}

/// Part of `union bpf_attr` that belongs to [`BPF_PROG_ATTACH`] and [`BPF_PROG_DETACH`].
#[repr(C)]
#[derive(Debug, Default)]
struct Attach {
    link: u32,
    program: u32,
    kind: u32,
    flags: u32,
    replaced: u32,
    relative: u32,
    revision: u64,
}

impl Attach {
    fn new(uplink: Uplink, program: &OwnedFd) -> Self {
        let link = uplink.index();
        let program = program.as_raw_fd().cast_unsigned();
        Self { link, program, kind: BPF_TCX_EGRESS, ..Self::default() }
    }
}

/// Direction of the packets that a TCX program sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Packets that enter the link.
    Ingress,
    /// Packets that leave by the link.
    Egress,
}

impl Direction {
    /// Attachment type (`linux/bpf.h`).
    fn kind(self) -> u32 {
        match self {
            Self::Ingress => BPF_TCX_INGRESS,
            Self::Egress => BPF_TCX_EGRESS,
        }
    }
}

/// Returns the number of TCX programs at a link, by its index. The link is one of this network
/// namespace.
///
/// # Errors
///
/// Returns an error before Linux 6.6, if the link is gone, or if the kernel does not permit the query.
pub fn count_programs(link: u32, direction: Direction) -> io::Result<u32> {
    let mut query = Query { link, kind: direction.kind(), ..Query::default() };
    programs::call(BPF_PROG_QUERY, &mut query)?;
    Ok(query.count)
}

/// Part of `union bpf_attr` that belongs to [`BPF_PROG_QUERY`].
#[repr(C)]
#[derive(Debug, Default)]
struct Query {
    link: u32,
    kind: u32,
    flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    padding: u32,
    program_flags: u64,
    links: u64,
    link_flags: u64,
    revision: u64,
}

/// Program that is attached to a link.
#[derive(Debug)]
struct Attached {
    /// The program, if it is Towline's.
    ours: Option<OwnedFd>,
}

/// Returns the programs at the egress of a link, in the order in which they run. Returns none if the
/// kernel has no TCX or the link is gone.
fn attached(uplink: Uplink) -> io::Result<Vec<Attached>> {
    let mut ids = [0u32; PROGRAMS];
    if !uplink.is_here()? {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    let mut query = Query {
        link: uplink.index(),
        kind: BPF_TCX_EGRESS,
        programs: ids.as_mut_ptr() as u64,
        count: PROGRAMS as u32,
        ..Query::default()
    };
    if let Err(error) = programs::call(BPF_PROG_QUERY, &mut query) {
        let absent = [libc::EINVAL, libc::ENOENT, libc::ENODEV, libc::ENOSYS];
        let is_absent = error.raw_os_error().is_some_and(|errno| absent.contains(&errno));
        return if is_absent { Ok(Vec::new()) } else { Err(error) };
    }
    let mut found = Vec::new();
    for id in ids.iter().take(query.count as usize) {
        match by_id(*id) {
            Ok(program) => {
                let is_ours = Info::of(&program)?.is_ours();
                found.push(Attached { ours: is_ours.then_some(program) });
            }
            // It was detached in the meantime.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

fn by_id(id: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct ById {
        id: u32,
        next: u32,
        flags: u32,
    }
    let descriptor = programs::call(BPF_PROG_GET_FD_BY_ID, &mut ById { id, next: 0, flags: 0 })?;
    // SAFETY: the descriptor is new, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Prefix of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Debug, Default)]
struct Info {
    kind: u32,
    id: u32,
    /// Hash of the instructions.
    tag: [u8; 8],
    jited_length: u32,
    translated_length: u32,
    jited: u64,
    translated: u64,
    load_time: u64,
    creator: u32,
    maps_count: u32,
    maps: u64,
    name: [u8; PROGRAM_NAME_BYTES],
}

impl Info {
    fn of(program: &OwnedFd) -> io::Result<Self> {
        #[repr(C)]
        struct Get {
            descriptor: u32,
            length: u32,
            information: u64,
        }
        let mut info = Self::default();
        let mut get = Get {
            descriptor: program.as_raw_fd().cast_unsigned(),
            length: size_of::<Self>() as u32,
            information: &raw mut info as u64,
        };
        programs::call(BPF_OBJ_GET_INFO_BY_FD, &mut get)?;
        Ok(info)
    }

    fn is_ours(&self) -> bool {
        let name = NAME.to_bytes_with_nul();
        self.kind == BPF_PROG_TYPE_SCHED_CLS && self.name.starts_with(name)
    }
}
