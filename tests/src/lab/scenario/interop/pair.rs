//! Hosts and programs of one case: Towline and one other WireGuard implementation, each configured
//! as a plain peer of the other.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use ipnet::IpNet;
use towline_agent::keys::Wireguard;
use towline_netlink::{AddressOptions, Route, Rtnetlink};
use towline_proto::id::WireguardKey;

use crate::lab::interrupt::wait_for;
use crate::lab::mesh::{Node, START_LIMIT};
use crate::lab::namespace::Namespace;
use crate::lab::nat::Nat;
use crate::lab::peers::{Installed, Peer, link_name, uapi};
use crate::lab::ping::first_reply;
use crate::lab::process::{CommandOutput, Program};
use crate::lab::scenario::Setting;
use crate::lab::topology::{Host, Lab, Router};
use crate::lab::traffic::{Pattern, tcp_both_ways};

/// One side of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// The side that runs Towline.
    Ours,
    /// The side that runs the other implementation.
    Theirs,
}

/// Other implementation of a case, and the WireGuard engine with which Towline meets it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Opponent<'a> {
    /// Installed program that runs on the second host: it listens on [`THEIR_PORT`], and has the second
    /// addresses of [`INNER`] inside the tunnel.
    pub(super) program: &'a Installed,
    /// Towline's engine, as its configuration names it.
    pub(super) engine: &'a str,
}

/// Network between the two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wiring {
    /// Both hosts are on the internet.
    Plain,
    /// This side has two uplinks.
    Roaming(Side),
    /// This side is behind a NAT.
    Behind(Side),
}

/// Configuration that a case varies.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    /// Side that knows the endpoint of the other, and therefore must initiate the handshake.
    pub(super) caller: Side,
    /// Pre-shared keys that each side is configured with: Towline's, then the other's.
    pub(super) preshared_keys: Option<[[u8; 32]; 2]>,
    /// Persistent keepalive of the caller, in seconds.
    pub(super) keepalive: Option<u16>,
}

impl Terms {
    /// Returns the configuration in which only `caller` knows the endpoint of the other side.
    pub(super) fn called_by(caller: Side) -> Self {
        Self { caller, preshared_keys: None, keepalive: None }
    }
}

/// Inner addresses of each side, IPv4 before IPv6.
const INNER: [[&str; 2]; 2] = [["10.9.0.1", "fd09::1"], ["10.9.0.2", "fd09::2"]];
/// UDP port of Towline.
const OUR_PORT: u16 = 51830;
/// UDP port of the other implementation.
const THEIR_PORT: u16 = 51820;
/// Time in seconds after which the NAT removes an idle UDP mapping.
pub(super) const NAT_TIMEOUT: u64 = 3;
/// Time limit of a command of `wg`.
const WG_LIMIT: Duration = Duration::from_secs(10);
/// Name of the other side in Towline's configuration.
const NAME: &str = "other";

/// Hosts and running programs of a case.
pub(super) struct Pair {
    pub(super) ours: Node,
    pub(super) theirs: Peer,
    hosts: [Arc<Host>; 2],
    /// Host on the internet that sends the flood.
    pub(super) stranger: Arc<Host>,
    our_key: WireguardKey,
    /// Link of Towline. Its name is unique, because `wg show` finds all links of the machine in one directory.
    our_link: String,
    their_key: Wireguard,
    terms: Terms,
    _router: Option<Router>,
    /// Last field: the namespaces must outlive the programs that run in them.
    _lab: Lab,
}

impl Pair {
    /// Builds the hosts, and configures and starts both programs.
    pub(super) fn start(
        setting: &Setting,
        opponent: &Opponent<'_>,
        wiring: Wiring,
        terms: Terms,
    ) -> anyhow::Result<Self> {
        let mut lab = Lab::new(setting.rank)?;
        let mut router = None;
        if let Wiring::Behind(_) = wiring {
            let built = lab
                .router("router")
                .public("203.0.113.40", "2001:db8::40")?
                .lan("192.168.1.0/24", "2001:db8:1::/64")?
                .nat(Nat::Masquerade)
                .build()?;
            for setting in ["udp_timeout", "udp_timeout_stream"] {
                let setting = format!("net.netfilter.nf_conntrack_{setting}");
                built.host().namespace().sysctl(&setting, &NAT_TIMEOUT.to_string())?;
            }
            router = Some(built);
        }
        let hosts = [(Side::Ours, "ours", "10"), (Side::Theirs, "theirs", "20")];
        let [ours, theirs] = hosts.map(|(side, name, number)| {
            let builder = lab.host(name);
            let builder = match &router {
                Some(router) if wiring == Wiring::Behind(side) => builder.behind(router),
                _ => builder
                    .public(&format!("203.0.113.{number}"), &format!("2001:db8::{number}"))?,
            };
            let second = format!("{number}1");
            let builder = if wiring == Wiring::Roaming(side) {
                builder.public(&format!("203.0.113.{second}"), &format!("2001:db8::{second}"))?
            } else {
                builder
            };
            builder.build()
        });
        let hosts = [ours?, theirs?];
        let stranger = lab.host("stranger").public("203.0.113.30", "2001:db8::30")?.build()?;
        let outer = |side: Side, port| -> anyhow::Result<SocketAddr> {
            let address =
                hosts[side as usize].addresses().first().context("the host has no address")?;
            Ok(SocketAddr::new(*address, port))
        };

        let their_key = Wireguard::generate()?;
        let our_link = link_name();
        let configuration =
            format!("[link]\nname = {our_link:?}\n[wireguard]\nengine = {:?}\n", opponent.engine)
                + &our_configuration(&lab, &their_key, terms, outer(Side::Theirs, THEIR_PORT)?)?;
        let mut ours = Node::new(&lab, &hosts[0], "ours", &setting.binaries, &configuration)?;
        let our_key = ours.command_ok(&["pubkey"])?.trim().parse()?;
        ours.launch()?;
        wait_for("answer from the agent", START_LIMIT, || {
            ours.agent()?.check()?;
            Ok(ours.peers().ok())
        })?;

        let link = link_name();
        let log = lab.directory().join("theirs.log");
        let theirs = Peer::start(opponent.program, hosts[1].namespace(), &link, &log)?;
        let mut pair = Self {
            ours,
            theirs,
            stranger,
            our_key,
            our_link,
            their_key,
            terms,
            _router: router,
            hosts: hosts.clone(),
            _lab: lab,
        };
        pair.configure_theirs(outer(Side::Ours, OUR_PORT)?)?;
        hosts[1].namespace().run(|| dress(&link))?;
        Ok(pair)
    }

    /// Configures the other side's program with Towline as its peer.
    fn configure_theirs(&mut self, our_endpoint: SocketAddr) -> anyhow::Result<()> {
        let calls = self.terms.caller == Side::Theirs;
        let peer = uapi::Peer {
            public_key: self.our_key.0,
            preshared_key: self.terms.preshared_keys.map(|[_, theirs]| theirs),
            endpoint: calls.then_some(our_endpoint),
            allowed_ips: inner_nets(Side::Ours)?,
            keepalive: if calls { self.terms.keepalive.unwrap_or(0) } else { 0 },
        };
        self.theirs.configure(&uapi::Device {
            private_key: self.their_key.secret().to_bytes(),
            port: THEIR_PORT,
            peers: vec![peer],
        })
    }

    /// Returns the public key of Towline.
    pub(super) fn our_key(&self) -> WireguardKey {
        self.our_key
    }

    /// Returns the public key of the other side.
    pub(super) fn their_key(&self) -> WireguardKey {
        self.their_key.public()
    }

    /// Returns the network namespace of a side.
    pub(super) fn host(&self, side: Side) -> &Namespace {
        self.hosts[side as usize].namespace()
    }

    /// Returns the endpoint of a side, as it is seen from the internet.
    pub(super) fn outer(&self, side: Side) -> anyhow::Result<SocketAddr> {
        let address =
            self.hosts[side as usize].addresses().first().context("the host has no address")?;
        Ok(SocketAddr::new(*address, if side == Side::Ours { OUR_PORT } else { THEIR_PORT }))
    }

    /// Returns the inner addresses of a side, IPv4 first.
    pub(super) fn inner(&self, side: Side) -> anyhow::Result<[IpAddr; 2]> {
        inner(side)
    }

    /// Returns the name of a side's link.
    fn link(&self, side: Side) -> &str {
        if side == Side::Ours { &self.our_link } else { self.theirs.link() }
    }

    /// Sends echo requests from this side. Returns the time until the first reply, or `None` if
    /// there is none within `timeout`.
    pub(super) fn ping(&self, from: Side, timeout: Duration) -> anyhow::Result<Option<Duration>> {
        let begun = Instant::now();
        let [target, _] = inner(from.other())?;
        let deadline = begun + timeout;
        let at = first_reply(self.host(from), target, self.link(from), deadline)?;
        Ok(at.map(|at| at - begun))
    }

    /// Does the same as [`Self::ping`]. Without a reply, returns an error with the peer's state.
    pub(super) fn ping_ok(&self, from: Side, timeout: Duration) -> anyhow::Result<Duration> {
        self.ping(from, timeout)?.ok_or_else(|| {
            let state = self.state().unwrap_or_else(|error| format!("{error:#}"));
            anyhow!("no echo reply within {} s: {state}", timeout.as_secs())
        })
    }

    /// Transfers bytes over TCP in both directions and over both inner address families, and
    /// verifies them.
    pub(super) fn exchange(&self, from: Side, bytes: u64) -> anyhow::Result<()> {
        let pattern = Pattern::random()?;
        for address in inner(from.other())? {
            let (from, to) = (self.host(from), self.host(from.other()));
            tcp_both_ways(from, to, address, bytes, pattern, |_| ())?;
        }
        Ok(())
    }

    /// Returns a description of the peer's state, as the agent reports it.
    pub(super) fn state(&self) -> anyhow::Result<String> {
        let peer = self.ours.peer(NAME)?.context("the agent does not list the other side")?;
        Ok(format!("the agent reports {} ({})", peer.state, peer.reason.unwrap_or_default()))
    }

    /// Returns the age of the last handshake, as the agent reports it.
    pub(super) fn handshake_age(&self) -> anyhow::Result<Duration> {
        let output = self.ours.command_ok(&["peers", "-o", "json"])?;
        let peers: serde_json::Value = serde_json::from_str(&output)?;
        let age = peers[0]["handshake_age_ms"].as_u64().context("no handshake yet")?;
        Ok(Duration::from_millis(age))
    }

    /// Returns a drop counter of `towline status`.
    pub(super) fn drops(&self, reason: &str) -> anyhow::Result<u64> {
        let output = self.ours.command_ok(&["status", "-o", "json"])?;
        let status: serde_json::Value = serde_json::from_str(&output)?;
        status["drops"][reason]
            .as_u64()
            .with_context(|| format!("status has no drop counter {reason}"))
    }

    /// Sets the first uplink of a side down.
    pub(super) fn unplug(&self, side: Side) -> anyhow::Result<()> {
        self.host(side).run(|| {
            let mut netlink = Rtnetlink::open()?;
            let index = netlink.link_index("eth0")?;
            Ok(netlink.set_up(index, false)?)
        })
    }

    /// Adds a peer that never answers to Towline's configuration. Returns its key.
    pub(super) fn add_silent_peer(&mut self) -> anyhow::Result<WireguardKey> {
        let key = Wireguard::generate()?.public();
        let path = self.ours.config();
        let mut text = std::fs::read_to_string(&path)?;
        let _ = write!(
            text,
            "\n[[peer]]\nname = \"silent\"\npublic_key = \"{key}\"\nallowed_ips = [\"10.9.1.0/24\"]\n"
        );
        std::fs::write(&path, text)?;
        self.ours.reload()?;
        Ok(key)
    }

    /// Runs `wg COMMAND LINK` with more arguments for Towline's link.
    pub(super) fn wg(&self, command: &str, more: &[&str]) -> anyhow::Result<CommandOutput> {
        let program =
            Program::new("wg").args([command, self.our_link.as_str()]).args(more.iter().copied());
        program.run(self.host(Side::Ours), WG_LIMIT)
    }

    /// Removes the caller's persistent keepalive from the running program.
    pub(super) fn stop_keepalive(&mut self) -> anyhow::Result<()> {
        self.terms.keepalive = None;
        if self.terms.caller == Side::Theirs {
            let endpoint = self.outer(Side::Ours)?;
            return self.configure_theirs(endpoint);
        }
        let path = self.ours.config();
        let text = std::fs::read_to_string(&path)?;
        let lines = text.lines().filter(|line| !line.starts_with("keepalive"));
        std::fs::write(&path, lines.collect::<Vec<_>>().join("\n"))?;
        self.ours.reload()
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // A killed agent leaves its socket behind.
        let _ = std::fs::remove_file(uapi::socket(&self.our_link));
    }
}

impl Side {
    /// Returns the opposite side.
    pub(super) fn other(self) -> Self {
        match self {
            Self::Ours => Self::Theirs,
            Self::Theirs => Self::Ours,
        }
    }
}

/// Returns Towline's configuration, and writes its pre-shared key.
fn our_configuration(
    lab: &Lab,
    their_key: &Wireguard,
    terms: Terms,
    their_endpoint: SocketAddr,
) -> anyhow::Result<String> {
    let mut text = format!("[node]\naddresses = {:?}\n", INNER[Side::Ours as usize]);
    let nets = inner_nets(Side::Theirs)?.iter().map(ToString::to_string).collect::<Vec<_>>();
    let _ = writeln!(text, "[[peer]]\nname = {NAME:?}\nallowed_ips = {nets:?}");
    let _ = writeln!(text, "public_key = \"{}\"", their_key.public());
    if terms.caller == Side::Ours {
        let _ = writeln!(text, "endpoint = \"{their_endpoint}\"");
        if let Some(seconds) = terms.keepalive {
            let _ = writeln!(text, "keepalive = {seconds}");
        }
    }
    if let Some([ours, _]) = terms.preshared_keys {
        let file = lab.directory().join("ours.psk");
        let options =
            std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&file)?;
        // The file contains the key in base64, like every WireGuard key.
        std::io::Write::write_all(&mut &options, WireguardKey(ours).to_string().as_bytes())?;
        let _ = writeln!(text, "preshared_key_file = {file:?}");
    }
    Ok(text)
}

/// Sets up the addresses, MTU and routes of the other side's link.
fn dress(link: &str) -> anyhow::Result<()> {
    let mut netlink = Rtnetlink::open()?;
    let index = netlink.link_index(link)?;
    netlink.set_mtu(index, 1420)?;
    for net in inner_nets(Side::Theirs)? {
        let options = AddressOptions { no_dad: true, ..Default::default() };
        netlink.add_address(index, net, options)?;
    }
    netlink.set_up(index, true)?;
    for net in inner_nets(Side::Ours)? {
        netlink.add_route(&Route::new(net).dev(index))?;
    }
    Ok(())
}

fn inner(side: Side) -> anyhow::Result<[IpAddr; 2]> {
    let [v4, v6] = INNER[side as usize];
    Ok([v4.parse()?, v6.parse()?])
}

fn inner_nets(side: Side) -> anyhow::Result<Vec<IpNet>> {
    Ok(inner(side)?.map(IpNet::from).to_vec())
}
