//! Faults of nodes whose routers allow no direct path, so that they need a relay.

use towline_netlink::Family;
use towline_nftables::Rule;

use super::ask::{View, ask, ask_while, poke};
use super::{Case, Outcome};
use crate::lab::mesh::{Controller, Node, require_tunnel};
use crate::lab::nat::Nat;
use crate::lab::scenario::Setting;
use crate::lab::scenario::scene::{SETTLE_LIMIT, drop_first, node_behind, relay_with};
use crate::lab::topology::{Lab, Router};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "relays/rewriting-nat",
            "The NAT of a machine takes another port for each peer, so that a relay is needed",
            "nat-mapping-dependent",
            |setting, case| {
                let sites =
                    Sites::build(setting, Nat::SymmetricRandom, "[relay]\nenabled = true\n")?;
                sites.is_connected()?;
                ask(case, &[View::new(&sites.nodes[0], "worker-2")])
            },
        ),
        Case::new(
            "relays/direct-path-blocked",
            "A router drops what goes to the other site, so that only a relay is left",
            "relayed-no-answer",
            blocked,
        ),
        Case::new(
            "relays/none",
            "Both nodes are behind NATs that allow no direct path, and there is no relay",
            "no-relay",
            |setting, case| {
                let sites = Sites::build(setting, Nat::SymmetricRandom, "")?;
                ask(case, &[View::new(&sites.nodes[0], "worker-2")])
            },
        ),
        Case::new("relays/dead", "The only relay is off", "relay-silent", dead),
    ]
}

/// Two nodes behind routers of their own, beside two public nodes.
struct Sites {
    /// The nodes `worker-1` and `worker-2`.
    nodes: Vec<Node>,
    /// The public nodes, the one that may relay first.
    public: Vec<Node>,
    _controller: Controller,
    routers: Vec<Router>,
    _lab: Lab,
}

impl Sites {
    /// Builds the hosts, and joins them. `relay` is the configuration of the node that may relay.
    fn build(setting: &Setting, nat: Nat, relay: &str) -> anyhow::Result<Self> {
        let mut lab = Lab::new(setting.rank)?;
        let host = lab.host("ctl").public("203.0.113.2", "2001:db8::2")?.build()?;
        let relay_host = lab.host("relay").public("203.0.113.3", "2001:db8::3")?.build()?;
        let controller = Controller::start(&lab, &host, &setting.binaries)?;
        let public = vec![
            relay_with(setting, &lab, &controller, &relay_host, "relay", relay)?,
            node_behind(setting, &lab, &controller, &host, "ctl")?,
        ];
        let (mut nodes, mut routers) = (Vec::new(), Vec::new());
        for number in [1, 2] {
            let router = lab
                .router(&format!("router-{number}"))
                .public_number(10 + number)?
                .lan_number(number)?
                .nat(nat)
                .build()?;
            let name = format!("worker-{number}");
            let worker = lab.host(&name).behind(&router).only(Family::V4).build()?;
            nodes.push(node_behind(setting, &lab, &controller, &worker, &name)?);
            routers.push(router);
        }
        Ok(Self { nodes, public, _controller: controller, routers, _lab: lab })
    }

    /// Waits until the two nodes are connected.
    fn is_connected(&self) -> anyhow::Result<()> {
        require_tunnel(&self.nodes[0], &self.nodes[1], SETTLE_LIMIT)
    }
}

fn blocked(setting: &Setting, case: &Case) -> anyhow::Result<Outcome> {
    let sites = Sites::build(setting, Nat::Masquerade, "[relay]\nenabled = true\n")?;
    let udp = || Rule::new().protocol(libc::IPPROTO_UDP as u8);
    let other: ipnet::IpNet = "203.0.113.12/32".parse()?;
    let rules = [udp().destination(other).drop(), udp().source(other).drop()];
    drop_first(sites.routers[0].host(), "site", rules)?;
    ask(case, &[View::new(&sites.nodes[0], "worker-2")])
}

fn dead(setting: &Setting, case: &Case) -> anyhow::Result<Outcome> {
    let mut sites = Sites::build(setting, Nat::SymmetricRandom, "[relay]\nenabled = true\n")?;
    sites.is_connected()?;
    let address = sites.nodes[1].overlay_v4()?;
    drop(sites.public[0].take_agent());
    let from = sites.nodes[0].host();
    ask_while(case, &[View::new(&sites.nodes[0], "worker-2")], || poke(from, address))
}
