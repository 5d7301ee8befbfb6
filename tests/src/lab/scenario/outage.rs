//! `cargo lab outage`: no controller runs, and what happens to nodes heals without one; then a controller comes
//! back empty, and once with an old backup.
//!
//! `anchor` and `rover` are public, and `anchor` relays; `b` and `c` are each behind a NAT. While no controller runs, a
//! session is re-keyed, `c` reboots, `rover` gets another address, the NAT of `b` gets another address, and all
//! certificates end. A case is healed when every pair of nodes answers each other's pings again, and the case of
//! the certificates when every node has a session with a controller that came back.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ipnet::IpNet;
use rcgen::CertificateSigningRequestParams;
use serde::{Deserialize, Serialize};
use towline_agent::state::StateDir;
use towline_controller::authority::{Authority, Subject};
use towline_controller::clock;
use towline_controller::state_dir::StateDir as ControllerDir;
use towline_netlink::{AddressOptions, Family, Route, Rtnetlink};

use super::Setting;
use crate::lab::interrupt::{self, wait_for, wait_up_to};
use crate::lab::mesh::{Controller, Node, START_LIMIT};
use crate::lab::namespace::Namespace;
use crate::lab::nat::Nat;
use crate::lab::ping::echoes;
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Promises, round};
use crate::lab::topology::{Host, Lab, Router};
use crate::lab::traffic::Pattern;

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Outage {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Results of the cases without a controller.
    pub cases: Vec<Case>,
    /// Results of the controllers that came back with a store that lacks nodes.
    pub returns: Vec<Return>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Result of a case.
#[derive(Debug, Serialize)]
pub struct Case {
    /// Name of the event.
    pub name: &'static str,
    /// True if it healed.
    pub healed: bool,
    /// Time from the event until it had healed, in milliseconds; absent if it did not heal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heal_ms: Option<f64>,
}

/// Result of a controller that came back.
#[derive(Debug, Serialize)]
pub struct Return {
    /// What the controller's store was: `empty` or `old_backup`.
    pub store: &'static str,
    /// Number of peers that a node had before and does not have after, over all nodes.
    pub peers_wiped: usize,
    /// Number of pairs of nodes that do not answer each other's pings.
    pub tunnels_lost: usize,
    /// Number of nodes that the controller does not list as connected.
    pub nodes_missing: usize,
    /// Number of removed nodes that are in the mesh again.
    pub removed_back: usize,
    /// Time until the controller listed all nodes as connected, in milliseconds; absent if it did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub back_ms: Option<f64>,
}

/// Limit for all pairs of nodes to answer each other after an event.
const HEAL: Duration = Duration::from_secs(30);
/// Limit for all nodes to be connected after a controller came back: the longest pause between two attempts of an
/// agent is 15 s.
const BACK: Duration = Duration::from_secs(60);
/// Limit for a session to be re-keyed: WireGuard does it after 120 s of use.
const REKEY: Duration = Duration::from_secs(150);
/// Timeout of one ping.
const PING: Duration = Duration::from_millis(250);
/// Number of pings in a row that must be answered.
const PINGS: u32 = 3;
/// Name of the agent's TUN link.
const LINK: &str = "towline0";
/// Age of an ended certificate, in seconds.
const AGE: i64 = 10 * 24 * 3600;
/// Gateway of the public hosts.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);

/// Runs the scenario and returns its results.
pub fn run(setting: &Setting) -> anyhow::Result<Outage> {
    let mut figures = Outage { rootless: setting.rank == Rank::Rootless, ..Outage::default() };
    let mut world = World::build(setting)?;
    figures.failed = Promises::broken_by(|promises| figures.measure(setting, &mut world, promises));
    Ok(figures)
}

/// Hosts and programs of the scenario. Fields are dropped in this order: processes, hosts, lab.
struct World {
    /// The nodes anchor, b, c and rover, in this order.
    nodes: Vec<Node>,
    /// IPv4 address in the mesh of each node.
    overlay: Vec<IpAddr>,
    controller: Controller,
    /// Router of `b`.
    router: Router,
    /// Path of the old backup.
    backup: PathBuf,
    pattern: Pattern,
    _router_of_c: Router,
    _lab: Lab,
}

/// Number of each node in [`World::nodes`].
const ANCHOR: usize = 0;
const B: usize = 1;
const C: usize = 2;
const ROVER: usize = 3;
/// Name of the node that is removed after the backup.
const REMOVED: &str = "removed";

/// The part of `towline peers -o json` that shows a handshake.
#[derive(Debug, Deserialize)]
struct Handshake {
    name: String,
    handshake_age_ms: Option<u64>,
}

impl World {
    /// Builds the hosts and starts the mesh. The backup is made when only `anchor`, `b` and a node that is removed
    /// later have joined.
    fn build(setting: &Setting) -> anyhow::Result<Self> {
        setting.output.step("building two public hosts and two NATs, joining four nodes");
        let mut lab = Lab::new(setting.rank)?;
        let ctl = lab.host("ctl").public("203.0.113.2", "2001:db8::2")?.build()?;
        let anchor = lab.host("anchor").public("203.0.113.3", "2001:db8::3")?.build()?;
        let mut routers = Vec::new();
        for number in [11, 12] {
            routers.push(
                lab.router(&format!("r{number}"))
                    .public_number(number)?
                    .lan_number(number)?
                    .nat(Nat::Masquerade)
                    .build()?,
            );
        }
        let b = lab.host("b").only(Family::V4).behind(&routers[0]).build()?;
        let c = lab.host("c").only(Family::V4).behind(&routers[1]).build()?;
        let rover =
            lab.host("rover").only(Family::V4).public("203.0.113.20", "2001:db8::20")?.build()?;
        let controller = Controller::start(&lab, &ctl, &setting.binaries)?;
        let join = |lab: &Lab, host: &Arc<Host>, name: &str, start: bool| {
            // Without a controller, only a relay tells nodes behind NATs that another one has a new address.
            let is_relay = name == "anchor";
            let more = if is_relay { "[relay]\nenabled = true\n" } else { "" };
            let mut node = Node::new(lab, host, name, &setting.binaries, more)?;
            let site = format!("site-{name}");
            let flags = ["--site", &site, "--relay"];
            let flags = if is_relay { &flags[..] } else { &flags[..2] };
            node.join(&controller.operator().token_with(flags)?)?;
            if start {
                node.restart()?;
            }
            anyhow::Ok(node)
        };
        let mut nodes = vec![join(&lab, &anchor, "anchor", true)?, join(&lab, &b, "b", true)?];
        // It shares a host with `rover`, which starts its agent later.
        join(&lab, &rover, REMOVED, false)?;
        let backup = lab.directory().join("old.redb");
        let path = backup.to_str().context("the lab's directory has no name in UTF-8")?;
        controller.operator().command_ok(&["backup", path])?;
        controller.operator().command_ok(&["node", "remove", REMOVED])?;
        nodes.push(join(&lab, &c, "c", true)?);
        nodes.push(join(&lab, &rover, "rover", true)?);
        let others = nodes.len() - 1;
        let mut overlay = Vec::new();
        for node in &nodes {
            wait_for("complete map on every node", START_LIMIT, || {
                Ok((node.peers()?.len() == others).then_some(()))
            })?;
            overlay.push(node.overlay_v4()?);
        }
        let router_of_c = routers.pop().context("there is no second router")?;
        let router = routers.pop().context("there is no router")?;
        let pattern = Pattern::random()?;
        let world = Self {
            nodes,
            overlay,
            controller,
            router,
            backup,
            pattern,
            _router_of_c: router_of_c,
            _lab: lab,
        };
        if world.healed(HEAL)?.is_none() {
            bail!("the nodes do not reach each other at the start");
        }
        Ok(world)
    }

    /// Returns the number of pairs of nodes of which the first gets no answers from the second. Counts no further
    /// than `enough`.
    fn lost(&self, enough: usize) -> anyhow::Result<usize> {
        let mut lost = 0;
        for (here, node) in self.nodes.iter().enumerate() {
            let namespace = node.host().namespace();
            for (_, target) in self.overlay.iter().enumerate().filter(|(n, _)| *n != here) {
                interrupt::check()?;
                // A request is refused while the link does not exist.
                let answered = echoes(namespace, *target, PINGS, PING, self.pattern)
                    .is_ok_and(|echoes| echoes.received == PINGS);
                lost += usize::from(!answered);
                if lost >= enough {
                    return Ok(lost);
                }
            }
        }
        Ok(lost)
    }

    /// Waits until all pairs of nodes answer each other, and returns how long that took.
    fn healed(&self, limit: Duration) -> anyhow::Result<Option<Duration>> {
        let start = Instant::now();
        wait_up_to(limit, || Ok((self.lost(1)? == 0).then(|| start.elapsed())))
    }

    /// Waits until the controller lists every node as connected, and returns how long that took.
    fn back(&self, limit: Duration) -> anyhow::Result<Option<Duration>> {
        let start = Instant::now();
        wait_up_to(limit, || Ok((self.missing()? == 0).then(|| start.elapsed())))
    }

    /// Returns how many nodes the controller does not list as connected.
    fn missing(&self) -> anyhow::Result<usize> {
        let listed = self.controller.operator().nodes()?;
        let is_online =
            |node: &&Node| listed.iter().any(|listed| listed.name == node.name() && listed.online);
        Ok(self.nodes.len() - self.nodes.iter().filter(is_online).count())
    }

    /// Causes an event. `name` is one of [`CASES`].
    fn cause(&mut self, name: &str) -> anyhow::Result<()> {
        match name {
            "reboot" => {
                let node = &mut self.nodes[C];
                node.agent()?.kill()?;
                drop(node.take_agent());
                // A reboot leaves no link. The agent starts with the signed map that it cached.
                remove_link(node.host().namespace())?;
                node.launch()
            }
            "roam" => {
                let (before, after) =
                    (Ipv4Addr::new(203, 0, 113, 20), Ipv4Addr::new(203, 0, 113, 70));
                roam(self.nodes[ROVER].host().namespace(), before, after)
            }
            "nat_readdress" => {
                let (before, after) =
                    (Ipv4Addr::new(203, 0, 113, 11), Ipv4Addr::new(203, 0, 113, 61));
                readdress(self.router.host().namespace(), before, after)
            }
            other => bail!("unknown event {other}"),
        }
    }

    /// Replaces the certificates of all nodes by ones that have ended, and restarts the agents with them.
    fn end_certificates(&mut self) -> anyhow::Result<()> {
        let dir = ControllerDir::new(self.controller.operator().state());
        let now = clock::now().unix;
        let authority = Authority::load_or_create(&dir, false, now)?;
        for node in &mut self.nodes {
            if let Some(agent) = node.take_agent() {
                agent.stop()?;
            }
            let state = StateDir::open(&node.state())?;
            let csr = state.keys()?.identity.signing_request()?;
            let csr = CertificateSigningRequestParams::from_der(&csr.into())?;
            let membership = state.require_membership()?;
            let subject = Subject::Node(membership.grant.node_id);
            let leaf = authority.issue(subject, &csr.public_key, now - AGE)?;
            state.store_certificate(&[leaf, authority.certificate().clone()])?;
            drop(state);
            node.launch()?;
        }
        Ok(())
    }

    /// Waits until `anchor` and `b` have a newer session than at the start, while they send to each other.
    fn rekeyed(&self) -> anyhow::Result<Option<Duration>> {
        let start = Instant::now();
        let namespace = self.nodes[ANCHOR].host().namespace();
        wait_up_to(REKEY, || {
            echoes(namespace, self.overlay[B], 1, PING, self.pattern)?;
            let output = self.nodes[ANCHOR].command_ok(&["peers", "-o", "json"])?;
            let peers: Vec<Handshake> = serde_json::from_str(&output)
                .context("cannot parse the output of `towline peers`")?;
            let elapsed = start.elapsed();
            let is_newer = |age: u64| u128::from(age) < elapsed.as_millis();
            let newer = peers.iter().any(|peer| {
                peer.name == self.nodes[B].name() && peer.handshake_age_ms.is_some_and(is_newer)
            });
            Ok(newer.then_some(elapsed))
        })
    }

    /// Returns the names of the peers of each node.
    fn peers(&self) -> anyhow::Result<Vec<Vec<String>>> {
        let names = |node: &Node| {
            let peers = node.peers()?;
            anyhow::Ok(peers.into_iter().map(|peer| peer.name).collect())
        };
        self.nodes.iter().map(names).collect()
    }

    /// Replaces the controller's store by the backup, or by nothing, and starts the controller.
    fn come_back(&mut self, backup: bool) -> anyhow::Result<()> {
        if let Some(daemon) = self.controller.take_daemon() {
            daemon.stop()?;
        }
        let state = self.controller.operator().state().to_owned();
        let store = state.join("towline.redb");
        if backup {
            std::fs::copy(&self.backup, &store).context("cannot copy the backup")?;
        } else {
            std::fs::remove_file(&store).context("cannot remove the store")?;
            for counter in ["starts", "sequence"] {
                std::fs::remove_file(state.join(counter)).context("cannot remove a counter")?;
            }
        }
        self.controller.restart()
    }
}

/// Gives a public host another IPv4 address, and keeps its default route.
pub(super) fn roam(namespace: &Namespace, before: Ipv4Addr, after: Ipv4Addr) -> anyhow::Result<()> {
    readdress(namespace, before, after)?;
    // The default route may have ended with the address.
    namespace.run(|| {
        let mut netlink = Rtnetlink::open()?;
        let link = netlink.link_index("eth0")?;
        let all = IpNet::V4(ipnet::Ipv4Net::default());
        // It still exists where the kernel promoted the new address.
        let _ = netlink.add_route(&Route::new(all).via(GATEWAY.into()).dev(link).metric(100));
        Ok(())
    })
}

/// Removes the TUN link, which outlives the agent, as a reboot does.
pub(super) fn remove_link(namespace: &Namespace) -> anyhow::Result<()> {
    namespace.run(|| {
        let mut netlink = Rtnetlink::open()?;
        if let Some(link) = netlink.link(LINK)? {
            netlink.delete_link(link.index)?;
        }
        Ok(())
    })
}

/// Changes the IPv4 address of the link `eth0`.
fn readdress(namespace: &Namespace, before: Ipv4Addr, after: Ipv4Addr) -> anyhow::Result<()> {
    // With this setting, routes remain when the primary address is removed.
    namespace.sysctl("net.ipv4.conf.all.promote_secondaries", "1")?;
    namespace.run(|| {
        let mut netlink = Rtnetlink::open()?;
        let link = netlink.link_index("eth0")?;
        let net = |address: Ipv4Addr| IpNet::new_assert(address.into(), 24);
        netlink.add_address(link, net(after), AddressOptions::default())?;
        Ok(netlink.delete_address(link, net(before))?)
    })
}

/// Events that the nodes heal among themselves.
const CASES: [&str; 3] = ["reboot", "roam", "nat_readdress"];

impl Outage {
    /// Runs all cases without a controller, then lets controllers come back.
    fn measure(
        &mut self,
        setting: &Setting,
        world: &mut World,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        let before = world.peers()?;
        drop(world.controller.take_daemon());
        for name in CASES {
            setting.output.step(&format!("{name}, without a controller"));
            let start = Instant::now();
            let healed = world.cause(name).and_then(|()| world.healed(HEAL));
            self.add(name, healed.map(|healed| healed.map(|_| start.elapsed())), promises);
        }
        setting.output.step("rekey, without a controller: up to 150 s");
        self.add("rekey", world.rekeyed(), promises);
        setting.output.step("certificates_end, without a controller and then with it");
        let ended = world.end_certificates().and_then(|()| world.healed(HEAL));
        self.add("certificates_end_tunnels", ended, promises);
        world.controller.restart()?;
        self.add("certificates_end_renewed", world.back(BACK), promises);
        for (store, backup) in [("empty", false), ("old_backup", true)] {
            setting.output.step(&format!("the controller comes back, store: {store}"));
            match came_back(world, store, backup, &before) {
                Ok(figures) => {
                    figures.check(promises);
                    self.returns.push(figures);
                }
                Err(error) => promises.fail(format!("{store}: {error:#}")),
            }
        }
        Ok(())
    }

    /// Adds the result of a case.
    fn add(
        &mut self,
        name: &'static str,
        healed: anyhow::Result<Option<Duration>>,
        promises: &mut Promises,
    ) {
        let healed = healed.unwrap_or_else(|error| {
            promises.fail(format!("{name}: {error:#}"));
            None
        });
        promises.hold(healed.is_some(), || format!("{name}: healed"));
        let heal_ms = healed.map(|time| round(time.as_secs_f64() * 1000.0));
        self.cases.push(Case { name, healed: healed.is_some(), heal_ms });
    }
}

/// Lets a controller come back with another store, and compares the peers of the nodes with those of `before`.
fn came_back(
    world: &mut World,
    store: &'static str,
    backup: bool,
    before: &[Vec<String>],
) -> anyhow::Result<Return> {
    world.come_back(backup)?;
    let back = world.back(BACK)?;
    let after = world.peers()?;
    let wiped = |(before, after): (&Vec<String>, &Vec<String>)| {
        before.iter().filter(|name| !after.contains(name)).count()
    };
    let listed = world.controller.operator().nodes()?;
    // Records of the nodes reach their peers soon after the session is open.
    let tunnels_lost = match world.healed(HEAL)? {
        Some(_) => 0,
        None => world.lost(usize::MAX)?,
    };
    Ok(Return {
        store,
        peers_wiped: before.iter().zip(&after).map(wiped).sum(),
        tunnels_lost,
        nodes_missing: world.missing()?,
        removed_back: listed.iter().filter(|node| node.name == REMOVED).count(),
        back_ms: back.map(|time| round(time.as_secs_f64() * 1000.0)),
    })
}

impl Return {
    fn check(&self, promises: &mut Promises) {
        let Self { store, peers_wiped, tunnels_lost, nodes_missing, removed_back, .. } = *self;
        for (what, count) in [
            ("peers_wiped", peers_wiped),
            ("tunnels_lost", tunnels_lost),
            ("nodes_missing", nodes_missing),
            ("removed_back", removed_back),
        ] {
            promises.hold(count == 0, || format!("{store}: {what} 0: {count}"));
        }
    }
}

impl Figures for Outage {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        for case in &self.cases {
            let time =
                case.heal_ms.map_or("not healed".to_owned(), |ms| format!("healed in {ms} ms"));
            let _ = writeln!(text, "{}: {time}", case.name);
        }
        for back in &self.returns {
            let time = back.back_ms.map_or("-".to_owned(), |ms| ms.to_string());
            let _ = writeln!(
                text,
                "controller back, store {}: all nodes connected after {time} ms, {} peers wiped, {} tunnels lost",
                back.store, back.peers_wiped, back.tunnels_lost
            );
        }
        text
    }
}
