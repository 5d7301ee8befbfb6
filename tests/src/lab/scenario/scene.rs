//! Hosts of a case: a control plane on the internet, and workers behind a NAT router.

use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use ipnet::IpNet;
use towline_netlink::{AddressOptions, Family, Route, Rtnetlink, VethPeer};
use towline_nftables::{Chain, ChainKind, Hook, Nft, Rule, Table, TableFamily};

use crate::lab::interrupt::wait_up_to;
use crate::lab::mesh::{Controller, Node, require_tunnel};
use crate::lab::namespace::Namespace;
use crate::lab::nat::Nat;
use crate::lab::ping::{echoes, first_reply};
use crate::lab::scenario::Setting;
use crate::lab::topology::{Host, Lab, Router};
use crate::lab::traffic::Pattern;

/// Limit for two agents to connect. An ordinary pair takes less than a second.
pub(super) const UP_LIMIT: Duration = Duration::from_secs(20);
/// Limit for the same where the time is not what is tested: other cases may run on the same processors.
pub(super) const SETTLE_LIMIT: Duration = Duration::from_secs(60);
/// Limit for a problem to be in the status, on a slow machine.
const PROBLEM_LIMIT: Duration = Duration::from_secs(60);
/// Number of echo requests by which a case judges whether one host reaches another.
const ECHOES: u32 = 5;

/// Hosts of a case, without processes.
pub(super) struct Scene {
    /// Host on the internet, for the controller and a node.
    pub(super) cp: Arc<Host>,
    /// First host in the LAN of the router.
    pub(super) worker: Arc<Host>,
    /// Router of the worker's LAN, 192.168.1.0/24.
    pub(super) router: Router,
    /// Networks that lead nowhere, see [`Self::add_link`].
    islands: Vec<Namespace>,
    /// Owns the namespaces and files of all hosts.
    pub(super) lab: Lab,
}

/// A controller and the nodes `cp` and `worker`.
pub(super) struct Pair {
    pub(super) controller: Controller,
    pub(super) cp: Node,
    pub(super) worker: Node,
}

impl Scene {
    /// Builds the hosts.
    pub(super) fn build(setting: &Setting) -> anyhow::Result<Self> {
        let mut lab = Lab::new(setting.rank)?;
        let cp = lab.host("cp").public("203.0.113.10", "2001:db8::10")?.build()?;
        Self::around(lab, cp)
    }

    /// Builds the hosts, with IPv4 alone at the control plane, so that every path crosses the NAT.
    pub(super) fn build_v4(setting: &Setting) -> anyhow::Result<Self> {
        let mut lab = Lab::new(setting.rank)?;
        let cp = lab.host("cp").public("203.0.113.10", "2001:db8::10")?.only(Family::V4).build()?;
        Self::around(lab, cp)
    }

    fn around(mut lab: Lab, cp: Arc<Host>) -> anyhow::Result<Self> {
        let router = lab
            .router("router")
            .public("203.0.113.11", "2001:db8::11")?
            .lan("192.168.1.0/24", "2001:db8:1::/64")?
            .nat(Nat::Masquerade)
            .build()?;
        let worker = lab.host("worker").behind(&router).build()?;
        Ok(Self { cp, worker, router, islands: Vec::new(), lab })
    }

    /// Adds a link with this address to a host. At its other end nobody answers.
    pub(super) fn add_link(&mut self, host: &Host, link: &str, own: &str) -> anyhow::Result<()> {
        let island = Namespace::new(&format!("island-{}", self.islands.len()))?;
        host.namespace().run(|| {
            let mut netlink = Rtnetlink::open()?;
            let peer = VethPeer { name: "far", namespace: Some(island.file().as_fd()) };
            netlink.add_veth(link, peer)?;
            let index = netlink.link_index(link)?;
            Ok(netlink.set_up(index, true)?)
        })?;
        island.run(|| {
            let mut netlink = Rtnetlink::open()?;
            let index = netlink.link_index("far")?;
            Ok(netlink.set_up(index, true)?)
        })?;
        add_address(host, link, own)?;
        self.islands.push(island);
        Ok(())
    }

    /// Starts a controller, and joins and starts the nodes `cp` and `worker`.
    pub(super) fn join(&self, setting: &Setting) -> anyhow::Result<Pair> {
        self.join_with(setting, ("", &[]), ("", &[]))
    }

    /// Does the same as [`Self::join`], with additional configuration of each node and with these
    /// flags for its token.
    pub(super) fn join_with(
        &self,
        setting: &Setting,
        (cp, cp_flags): (&str, &[&str]),
        (worker, worker_flags): (&str, &[&str]),
    ) -> anyhow::Result<Pair> {
        let controller = Controller::start(&self.lab, &self.cp, &setting.binaries)?;
        let cp = self.node(setting, &controller, &self.cp, "cp", (cp, cp_flags))?;
        let worker =
            self.node(setting, &controller, &self.worker, "worker", (worker, worker_flags))?;
        Ok(Pair { controller, cp, worker })
    }

    /// Joins and starts one more node.
    pub(super) fn node(
        &self,
        setting: &Setting,
        controller: &Controller,
        host: &Arc<Host>,
        name: &str,
        (configuration, flags): (&str, &[&str]),
    ) -> anyhow::Result<Node> {
        start(setting, &self.lab, controller, (host, name), (configuration, flags))
    }
}

impl Pair {
    /// Checks that both nodes connect, and that each answers the other.
    pub(super) fn is_connected(&self) -> anyhow::Result<()> {
        connected(&self.cp, &self.worker)
    }

    /// Waits as [`settled`] does.
    pub(super) fn settles(&self) -> anyhow::Result<()> {
        settled(&self.cp, &self.worker)
    }
}

/// Joins and starts a node with the usual configuration.
pub(super) fn node_behind(
    setting: &Setting,
    lab: &Lab,
    controller: &Controller,
    host: &Arc<Host>,
    name: &str,
) -> anyhow::Result<Node> {
    start(setting, lab, controller, (host, name), ("", &[]))
}

/// Joins and starts a node with additional configuration.
pub(super) fn node_with(
    setting: &Setting,
    lab: &Lab,
    controller: &Controller,
    host: &Arc<Host>,
    name: &str,
    configuration: &str,
) -> anyhow::Result<Node> {
    start(setting, lab, controller, (host, name), (configuration, &[]))
}

/// Joins and starts a node that may relay, with additional configuration.
pub(super) fn relay_with(
    setting: &Setting,
    lab: &Lab,
    controller: &Controller,
    host: &Arc<Host>,
    name: &str,
    configuration: &str,
) -> anyhow::Result<Node> {
    start(setting, lab, controller, (host, name), (configuration, &["--relay"]))
}

fn start(
    setting: &Setting,
    lab: &Lab,
    controller: &Controller,
    (host, name): (&Arc<Host>, &str),
    (configuration, flags): (&str, &[&str]),
) -> anyhow::Result<Node> {
    let mut node = Node::new(lab, host, name, &setting.binaries, configuration)?;
    node.join(&controller.operator().token_with(flags)?)?;
    node.restart()?;
    Ok(node)
}

/// Checks that two nodes connect, and that each answers the other.
pub(super) fn connected(one: &Node, other: &Node) -> anyhow::Result<()> {
    connected_within(UP_LIMIT, one, other)
}

/// Checks that two nodes connect within `limit`, and that each answers the other.
pub(super) fn connected_within(limit: Duration, one: &Node, other: &Node) -> anyhow::Result<()> {
    require_tunnel(one, other, limit)?;
    for (from, to) in [(one, other), (other, one)] {
        answers(from.host(), to.overlay_v4()?)
            .with_context(|| format!("{} does not reach {}", from.name(), to.name()))?;
    }
    Ok(())
}

/// Waits until two nodes are connected and each answers all echo requests of the other, for at most
/// [`SETTLE_LIMIT`] each. Unlike [`connected`] it allows for replies that are late or lost at first.
pub(super) fn settled(one: &Node, other: &Node) -> anyhow::Result<()> {
    require_tunnel(one, other, SETTLE_LIMIT)?;
    for (from, to) in [(one, other), (other, one)] {
        let target = to.overlay_v4()?;
        let mut last = None;
        let answered = wait_up_to(SETTLE_LIMIT, || {
            last = answers(from.host(), target).err();
            Ok(last.is_none().then_some(()))
        })?;
        if let (None, Some(error)) = (answered, last) {
            return Err(error.context(format!("{} does not reach {}", from.name(), to.name())));
        }
    }
    Ok(())
}

/// Checks that an address answers every echo request of a host.
pub(super) fn answers(from: &Host, target: IpAddr) -> anyhow::Result<()> {
    const TIMEOUT: Duration = Duration::from_millis(500);
    let echoes = echoes(from.namespace(), target, ECHOES, TIMEOUT, Pattern::random()?)?;
    let (received, sent) = (echoes.received, echoes.sent);
    ensure!(received == sent, "{target} answered {received} of {sent} echo requests");
    Ok(())
}

/// Checks that an address answers a host's echo request through the tunnel within `limit`.
pub(super) fn answers_within(limit: Duration, from: &Host, target: IpAddr) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    let reply = first_reply(from.namespace(), target, "towline0", deadline)?;
    ensure!(reply.is_some(), "{target} did not answer for {} s", limit.as_secs());
    Ok(())
}

/// Checks that the status of a node names a problem with each of these words.
pub(super) fn names_problem(node: &Node, words: &[&str]) -> anyhow::Result<()> {
    let mut last = Vec::new();
    let found = wait_up_to(PROBLEM_LIMIT, || {
        last = node.status()?.problems;
        let named = |problem: &String| words.iter().all(|word| problem.contains(word));
        Ok(last.iter().any(named).then_some(()))
    })?;
    ensure!(found.is_some(), "no problem of {} names {words:?}: {last:?}", node.name());
    Ok(())
}

/// Checks that a note in the status of a node contains these words.
pub(super) fn names_note(node: &Node, words: &str) -> anyhow::Result<()> {
    let mut last = Vec::new();
    let found = wait_up_to(PROBLEM_LIMIT, || {
        last = node.status()?.notes;
        Ok(last.iter().any(|note| note.contains(words)).then_some(()))
    })?;
    ensure!(found.is_some(), "no note of {} has {words:?}: {last:?}", node.name());
    Ok(())
}

/// Checks that a node has no problems.
pub(super) fn has_no_problem(node: &Node) -> anyhow::Result<()> {
    let problems = node.status()?.problems;
    ensure!(problems.is_empty(), "{} has problems: {problems:?}", node.name());
    Ok(())
}

/// Checks that a node publishes an address, with any port.
pub(super) fn publishes(node: &Node, address: &str) -> anyhow::Result<()> {
    let address: IpAddr = address.parse()?;
    let candidates = node.status()?.candidates;
    let is_published = candidates.iter().any(|candidate| candidate.address.ip() == address);
    ensure!(is_published, "{} does not publish {address}: {candidates:?}", node.name());
    Ok(())
}

/// Adds an address to a link of a host.
pub(super) fn add_address(host: &Host, link: &str, own: &str) -> anyhow::Result<()> {
    change(host, |netlink| {
        let index = netlink.link_index(link)?;
        netlink.add_address(
            index,
            own.parse()?,
            AddressOptions { no_dad: true, ..Default::default() },
        )?;
        Ok(())
    })
}

/// Deletes an address from a link of a host.
pub(super) fn delete_address(host: &Host, link: &str, own: &str) -> anyhow::Result<()> {
    change(host, |netlink| {
        let index = netlink.link_index(link)?;
        Ok(netlink.delete_address(index, own.parse()?)?)
    })
}

/// Adds a route of a host by a link, through a gateway if there is one.
pub(super) fn add_route(
    host: &Host,
    net: &str,
    link: &str,
    gateway: Option<&str>,
    more: impl FnOnce(Route) -> Route + Send,
) -> anyhow::Result<()> {
    change(host, |netlink| {
        let net: IpNet = net.parse()?;
        let mut route = Route::new(net).dev(netlink.link_index(link)?);
        if let Some(gateway) = gateway {
            route = route.via(gateway.parse()?);
        }
        Ok(netlink.replace_route(&more(route))?)
    })
}

/// Loads an nftables table of another program on a host.
pub(super) fn load(host: &Host, table: &Table) -> anyhow::Result<()> {
    host.namespace().run(|| {
        Nft::open()?.load(table)?;
        Ok(())
    })
}

/// Makes a host drop IPv4 packets before its other rules and its connection tracking see them. `table` is
/// the name of the new table, and each of `rules` drops.
pub(super) fn drop_first(
    host: &Host,
    table: &str,
    rules: impl IntoIterator<Item = Rule>,
) -> anyhow::Result<()> {
    let chain = Chain::base(ChainKind::Filter, Hook::Prerouting, -300).rules(rules);
    load(host, &Table::new(TableFamily::Ip, table).chain("first", chain))
}

/// Changes the network of a host over netlink.
pub(super) fn change<T: Send>(
    host: &Host,
    change: impl FnOnce(&mut Rtnetlink) -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    host.namespace().run(|| change(&mut Rtnetlink::open()?))
}
