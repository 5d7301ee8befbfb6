//! Hosts behind NAT routers that are set up simply.

use super::Case;
use super::scene::{add_address, connected, node_behind};
use crate::lab::mesh::Controller;
use crate::lab::nat::Nat;
use crate::lab::scenario::Setting;
use crate::lab::topology::Lab;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("nats/controller-known-by-its-second-address", |setting| {
            two_sites(setting, [Nat::Masquerade, Nat::Masquerade])
        }),
        Case::new("nats/both-routers-only-masquerade", |setting| {
            two_sites(setting, [Nat::Unfiltered, Nat::Unfiltered])
        })
        .long(),
        Case::new("nats/one-router-only-masquerades", |setting| {
            two_sites(setting, [Nat::Unfiltered, Nat::Masquerade])
        })
        .long(),
    ]
}

/// Two nodes behind NAT routers, and no other node. They know the controller by the second address of
/// its link, at which they also ask for their public addresses.
fn two_sites(setting: &Setting, nats: [Nat; 2]) -> anyhow::Result<()> {
    let mut lab = Lab::new(setting.rank)?;
    let host = lab.host("controller").public("203.0.113.10", "2001:db8::10")?.build()?;
    add_address(&host, "eth0", "203.0.113.50/24")?;
    let known = "203.0.113.50".parse()?;
    let controller = Controller::start_known_by(&lab, &host, &setting.binaries, known)?;
    let mut nodes = Vec::new();
    for (number, nat) in (1..).zip(nats) {
        let router = lab
            .router(&format!("router-{number}"))
            .public(&format!("203.0.113.1{number}"), &format!("2001:db8::1{number}"))?
            .lan(&format!("192.168.{number}.0/24"), &format!("2001:db8:{number}::/64"))?
            .nat(nat)
            .build()?;
        let name = format!("worker-{number}");
        let worker = lab.host(&name).behind(&router).only(towline_netlink::Family::V4).build()?;
        nodes.push((node_behind(setting, &lab, &controller, &worker, &name)?, router));
    }
    let [(one, _), (other, _)] = nodes.as_slice() else { unreachable!("two nodes") };
    connected(one, other)
}
