//! Firewalls of other programs, in the shape that those programs give them.

use towline_nftables::{Chain, ChainKind, CtState, Hook, Policy, Rule, Table, TableFamily};

/// Returns a filter chain that accepts what every firewall accepts.
pub(super) fn filter(hook: Hook) -> Chain {
    Chain::base(ChainKind::Filter, hook, 0)
        .rule(Rule::new().ct_state(CtState::ESTABLISHED | CtState::RELATED).accept())
        .rule(Rule::new().input("lo").accept())
        .rule(Rule::new().protocol(libc::IPPROTO_ICMPV6 as u8).accept())
}

/// Returns the rules of ufw, which accept only SSH and the tunnels.
pub(super) fn ufw() -> Table {
    let user = Chain::regular()
        .rule(Rule::new().protocol(libc::IPPROTO_UDP as u8).destination_port(51_830).accept())
        .rule(Rule::new().protocol(libc::IPPROTO_TCP as u8).destination_port(22).accept());
    let before = Chain::regular()
        .rule(Rule::new().input("lo").accept())
        .rule(Rule::new().ct_state(CtState::ESTABLISHED | CtState::RELATED).accept())
        .rule(Rule::new().jump("ufw-user-input"));
    let input = Chain::base(ChainKind::Filter, Hook::Input, 0)
        .policy(Policy::Drop)
        .rule(Rule::new().jump("ufw-before-input"));
    Table::new(TableFamily::Ip, "filter")
        .chain("INPUT", input)
        .chain("ufw-before-input", before)
        .chain("ufw-user-input", user)
}

/// Returns the rules of Docker before it had a chain for others: it drops all that is forwarded, but for its
/// own containers.
pub(super) fn docker() -> Table {
    let forward = Chain::base(ChainKind::Filter, Hook::Forward, 0)
        .policy(Policy::Drop)
        .rule(Rule::new().jump("DOCKER-ISOLATION"))
        .rule(
            Rule::new()
                .output("docker0")
                .ct_state(CtState::ESTABLISHED | CtState::RELATED)
                .accept(),
        )
        .rule(Rule::new().input("docker0").accept());
    Table::new(TableFamily::Ip, "filter")
        .chain("FORWARD", forward)
        .chain("DOCKER-ISOLATION", Chain::regular().rule(Rule::new().return_()))
}
