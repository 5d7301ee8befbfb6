//! What routers do to packets, by nftables: the same module that the agent uses.

use towline_agent::netlink::Family;
use towline_agent::nft::{Chain, ChainKind, CtState, Hook, Nft, Rule, Table, TableFamily};

/// What a router does to packets that it forwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nat {
    /// What most routers at homes and in datacenters do, and Linux's masquerade does: IPv4 leaves
    /// from the router's address, from the same port for every destination while that is free, and
    /// only answers come in (RFC 4787: address and port dependent filtering). IPv6 is not
    /// translated, but filtered alike.
    Masquerade,
}

const TABLE: &str = "lab";
/// After connection tracking.
const FILTER: i32 = 0;
const TRANSLATE_SOURCE: i32 = 100;

/// Installs it in the calling thread's namespace; `uplink` leads to the internet.
pub fn install(nat: Nat, uplink: &str) -> anyhow::Result<()> {
    let Nat::Masquerade = nat;
    let answers =
        Rule::new().input(uplink).ct_state(CtState::ESTABLISHED | CtState::RELATED).accept();
    let unsolicited = Rule::new().input(uplink).drop();
    let ping = |protocol| Rule::new().protocol(protocol).accept();
    let translate = Rule::new().family(Family::V4).output(uplink).masquerade();
    let table = Table::new(TableFamily::Inet, TABLE)
        .chain(
            "translate",
            Chain::base(ChainKind::Nat, Hook::Postrouting, TRANSLATE_SOURCE).rule(translate),
        )
        .chain(
            "forward",
            Chain::base(ChainKind::Filter, Hook::Forward, FILTER)
                .rules([answers.clone(), unsolicited.clone()]),
        )
        // What is not for the router itself must not leave a trace in its connection table either:
        // it would take the very port that an inside host is about to use towards that peer.
        .chain(
            "input",
            Chain::base(ChainKind::Filter, Hook::Input, FILTER).rules([
                answers,
                ping(libc::IPPROTO_ICMP as u8),
                ping(libc::IPPROTO_ICMPV6 as u8),
                unsolicited,
            ]),
        );
    Nft::open()?.load(&table)?;
    Ok(())
}
