//! Evaluates the matches of iptables, which have the layout of the kernel's `struct xt_*` (`linux/netfilter`).

use towline_netlink::codec::u32_at;

use super::{NEW, ORDINARY, Run, Truth};

/// Bytes of a match, in the machine's byte order.
#[derive(Clone, Copy)]
struct Info<'a>(&'a [u8]);

impl Info<'_> {
    fn byte(self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }

    fn short(self, at: usize) -> Option<u16> {
        let bytes = self.0.get(at..at + 2)?;
        bytes.first_chunk().map(|bytes| u16::from_ne_bytes(*bytes))
    }

    fn long(self, at: usize) -> Option<u32> {
        u32_at(self.0, at)
    }
}

impl Run<'_> {
    /// Evaluates a match of iptables.
    pub(super) fn iptables(&self, name: &str, revision: u32, info: &[u8]) -> Truth {
        let info = Info(info);
        let known = match (name, revision) {
            ("comment", _) => Some(true),
            ("conntrack", 2 | 3) => conntrack(info),
            ("state", _) => info.long(0).map(|states| states & NEW != 0),
            ("multiport", 1) => self.multiport(info),
            ("addrtype", 1) => self.addrtype(info),
            ("tcp", 0) => self.tcp(info),
            ("udp", 0) => self.udp(info),
            ("icmp" | "icmp6", _) => Some(false),
            _ => None,
        };
        known.map_or(Truth::Maybe, Truth::from)
    }

    /// Evaluates `struct xt_multiport_v1`: flags, count, 15 ports, 15 flags of ranges, inversion.
    fn multiport(&self, info: Info<'_>) -> Option<bool> {
        const PORTS: usize = 15;
        let count = usize::from(info.byte(1)?).min(PORTS);
        let has = |port: u16| {
            let mut found = false;
            let mut at = 0;
            while at < count {
                let first = info.short(2 + 2 * at)?;
                let is_range = info.byte(32 + at)? != 0;
                at += 1 + usize::from(is_range);
                let last = if is_range { info.short(2 + 2 * (at - 1))? } else { first };
                found |= (first..=last).contains(&port);
            }
            Some(found)
        };
        let source = has(self.packet.source_port)?;
        let destination = has(self.packet.destination_port)?;
        let found = match info.byte(0)? {
            0 => source,
            1 => destination,
            2 => source || destination,
            _ => return None,
        };
        Some(found != (info.byte(47)? != 0))
    }

    /// Evaluates `struct xt_addrtype_info_v1`: masks of source and destination, flags.
    fn addrtype(&self, info: Info<'_>) -> Option<bool> {
        const INVERT_SOURCE: u32 = 1;
        const INVERT_DESTINATION: u32 = 2;
        let (source, destination, flags) = (info.short(0)?, info.short(2)?, info.long(4)?);
        if flags & !(INVERT_SOURCE | INVERT_DESTINATION) != 0 {
            return None;
        }
        let fits = |mask: u16, kind: u32, inversion: u32| {
            mask == 0 || (u32::from(mask) & 1 << kind != 0) != (flags & inversion != 0)
        };
        Some(
            fits(source, self.kind_of_source(), INVERT_SOURCE)
                && fits(destination, self.kind_of_destination(), INVERT_DESTINATION),
        )
    }

    /// Evaluates `struct xt_tcp`: ports, option, mask and comparison of the flags, inversions.
    fn tcp(&self, info: Info<'_>) -> Option<bool> {
        const SYN: u8 = 2;
        const INVERT_FLAGS: u8 = 4;
        if i32::from(self.packet.protocol) != libc::IPPROTO_TCP {
            return Some(false);
        }
        let (mask, wanted, inverted) = (info.byte(9)?, info.byte(10)?, info.byte(11)?);
        // The packet is a SYN.
        let has_flags = mask == 0 || (mask & SYN == wanted) != (inverted & INVERT_FLAGS != 0);
        Some(self.has_ports(info, inverted)? && has_flags)
    }

    /// Evaluates `struct xt_udp`: ports, inversions.
    fn udp(&self, info: Info<'_>) -> Option<bool> {
        if i32::from(self.packet.protocol) != libc::IPPROTO_UDP {
            return Some(false);
        }
        self.has_ports(info, info.byte(8)?)
    }

    /// Returns whether the packet's ports are in the two ranges at the start of a match.
    fn has_ports(&self, info: Info<'_>, inverted: u8) -> Option<bool> {
        let range =
            |at: usize, port: u16| Some((info.short(at)?..=info.short(at + 2)?).contains(&port));
        let source = range(0, self.packet.source_port)? != (inverted & 1 != 0);
        let destination = range(4, self.packet.destination_port)? != (inverted & 2 != 0);
        Some(source && destination)
    }
}

/// Evaluates the states of `struct xt_conntrack_mtinfo3`: flags at 146, inverted flags at 148, states at
/// 150.
fn conntrack(info: Info<'_>) -> Option<bool> {
    const STATE: u16 = 1;
    if info.short(146)? != STATE {
        return None;
    }
    let states = u32::from(info.short(150)?);
    // Another chain may have translated an address, or excluded the packet from conntrack.
    let is_known = states & NEW != 0 || states & !(ORDINARY | NEW) == 0;
    is_known.then_some((states & NEW != 0) != (info.short(148)? & STATE != 0))
}
