//! The plan's firewall as an nftables table.
//!
//! One chain is the guard: at the end of every packet's way out, what goes to a guarded network
//! by another link than ours is dropped. Our own sockets' packets carry our mark and pass: they
//! are sealed.

use std::collections::BTreeSet;

use ipnet::IpNet;
use towline_core::plan::Plan;

use crate::netlink::Family;
use crate::nft::{Chain, ChainKind, Hook, KeyType, Rule, Set, Table, TableFamily};

/// Says whose table it is.
pub(super) const COMMENT: &str = "towline: made by the agent, removed by towline down";
/// Names of the sets of guarded networks.
const GUARDED_V4: &str = "guarded4";
const GUARDED_V6: &str = "guarded6";
const GUARD: &str = "guard";
/// After everything that still changes packets, before source addresses are translated.
const GUARD_PRIORITY: i32 = 50;

/// The whole table.
pub(super) fn table(plan: &Plan) -> Table {
    let guarded = &plan.firewall.guarded;
    Table::new(TableFamily::Inet, &plan.firewall.table)
        .comment(COMMENT)
        .set(GUARDED_V4, networks(KeyType::Ipv4, guarded))
        .set(GUARDED_V6, networks(KeyType::Ipv6, guarded))
        .chain(GUARD, guard(plan))
}

/// Whether a table of our name is ours. A kernel before 5.10 forgets the comment.
pub(super) fn is_ours(table: &Table) -> bool {
    match &table.comment {
        Some(comment) => comment == COMMENT,
        None => table.sets.contains_key(GUARDED_V4) && table.chains.contains_key(GUARD),
    }
}

fn networks(key: KeyType, networks: &BTreeSet<IpNet>) -> Set {
    Set::networks(key, networks)
}

fn guard(plan: &Plan) -> Chain {
    let rules = &plan.rules;
    Chain::base(ChainKind::Filter, Hook::Postrouting, GUARD_PRIORITY).rules([
        Rule::new().output(&plan.link.name).accept(),
        Rule::new().output("lo").accept(),
        Rule::new().mark(rules.mark, rules.mask).accept(),
        Rule::new()
            .comment("left in clear")
            .destination_in(Family::V4, GUARDED_V4)
            .counter()
            .drop(),
        Rule::new()
            .comment("left in clear, IPv6")
            .destination_in(Family::V6, GUARDED_V6)
            .counter()
            .drop(),
    ])
}
