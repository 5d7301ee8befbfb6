//! What happens to a packet from this node to an address, and to its answer: peer, rule, route, guards,
//! firewalls of other programs, path and MTU.
//!
//! `kernel.rs` asks the kernel. [`trace`] is a pure function of its answers and those of the agent.

pub mod destination;
pub mod kernel;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::Serialize;
use towline_proto::code::Coded as _;
use towline_proto::pb;

use crate::doctor::reference::{self, Message};
use crate::doctor::{Answers, Cause, Check, CheckState, Subject};
use destination::Target;
use kernel::{KernelView, OwnRoute};

/// What the configuration says about this node's own networks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OwnAddresses {
    /// Addresses and networks of this node in the mesh, beside its overlay addresses.
    pub networks: Vec<IpNet>,
    /// True if the list may lack some, since the agent chooses node IPs by itself.
    pub is_incomplete: bool,
    /// True if packets of this machine with another source are translated.
    pub is_masquerading: bool,
}

/// Way of a packet and of its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Trace {
    /// Destination, as it was asked for.
    pub destination: String,
    /// Address of the destination.
    pub address: IpAddr,
    /// TCP port of the destination, if one was given.
    pub port: Option<u16>,
    /// Name of the peer that holds the address.
    pub peer: Option<String>,
    /// Result for both directions.
    pub outcome: Outcome,
    /// Code of the first step that drops the packet or lets it leave in clear; `None` if none does.
    pub cause: Option<String>,
    /// What to do, for people; `None` if there is no cause.
    pub remedy: Option<String>,
    /// Steps from this node to the destination.
    pub outgoing: Vec<Step>,
    /// Steps on this node of the answer, or of a connection from there.
    pub incoming: Vec<Step>,
}

/// Result of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The packet travels through the tunnel.
    Tunnel,
    /// The packet leaves by another link, since its destination does not belong to the mesh.
    Outside,
    /// The packet leaves by another link although its destination belongs to the mesh, since a guard is missing.
    InClear,
    /// The destination is this host.
    Local,
    /// The packet or its answer is dropped.
    Dropped,
}

/// One step of a packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    /// Name of the step: `peer`, `rule`, `route`, `guard`, `source`, `firewalls`, `path`, `mtu`,
    /// `rp-filter`.
    pub name: &'static str,
    /// Fate of the packet at this step.
    pub fate: Fate,
    /// Description of the step, for people.
    pub finding: String,
    /// Code of the cause, if the packet is dropped there or leaves in clear.
    pub cause: Option<String>,
}

impl Step {
    /// Moves what to do from the finding, or else takes it from the document.
    fn take_remedy(&mut self) -> Option<String> {
        let code = self.cause.as_deref()?;
        let Message { finding, remedy } = Message::of(code, &self.finding);
        let remedy = remedy.map(ToOwned::to_owned).or_else(|| reference::remedy(code));
        self.finding = finding.to_owned();
        remedy
    }
}

/// Codes of problems with which the nftables guard is missing.
const WITHOUT_FIREWALL: [&str; 5] = [
    "nftables-table-in-use",
    "nftables-guard-missing",
    "nftables-failed",
    "link-name-in-use",
    "host-open",
];

/// What happens to a packet at a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// The packet passes.
    Pass,
    /// The packet is dropped.
    Drop,
    /// It is not known, or does not matter.
    Unknown,
}

impl Fate {
    /// Returns the word for the output.
    pub fn word(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Drop => "drop",
            Self::Unknown => "unknown",
        }
    }
}

/// Everything that a trace is made of.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// Destination with its address.
    pub target: &'a Target,
    /// Answers of the agent.
    pub answers: &'a Answers,
    /// Checks of the same answers, see [`crate::doctor::examine`].
    pub checks: &'a [Check],
    /// Own networks of this node.
    pub own: &'a OwnAddresses,
    /// Answers of the kernel.
    pub kernel: &'a KernelView,
}

/// Traces a packet to the target and its answer.
pub fn trace(input: Input<'_>) -> Trace {
    let target = input.target;
    let holder = holder(target.address, &input.answers.peers);
    let tracer = Tracer { input, holder: holder.map(|(peer, _)| peer) };
    let mut outgoing = vec![tracer.peer(holder.map(|(_, net)| net))];
    outgoing.extend(tracer.route());
    let (guard, outcome) = tracer.guard();
    outgoing.push(guard);
    let mut incoming = Vec::new();
    if outcome == Outcome::Tunnel {
        outgoing.push(tracer.source());
        outgoing.push(tracer.firewalls(Direction::Out));
        outgoing.extend(tracer.path());
        incoming.push(tracer.sender());
        incoming.push(tracer.reverse_path());
        incoming.push(tracer.firewalls(Direction::In));
    }
    let mut steps = outgoing.iter_mut().chain(&mut incoming);
    let (cause, remedy) = match steps.find(|step| step.cause.is_some()) {
        Some(step) => (step.cause.clone(), step.take_remedy()),
        None => (None, None),
    };
    Trace {
        destination: target.text.clone(),
        address: target.address,
        port: target.port,
        peer: tracer.holder.map(|peer| peer.name.clone()),
        outcome: match outcome {
            Outcome::InClear => Outcome::InClear,
            _ if cause.is_some() => Outcome::Dropped,
            other => other,
        },
        remedy,
        cause,
        outgoing,
        incoming,
    }
}

/// Returns the peer to which packets to an address are sent, and the network by which it is found: the
/// longest one.
fn holder(address: IpAddr, peers: &[pb::PeerStatus]) -> Option<(&pb::PeerStatus, IpNet)> {
    let networks = peers.iter().flat_map(|peer| {
        let own = peer.overlay_addresses.iter().filter_map(|own| own.parse::<IpAddr>().ok());
        let own = own.map(IpNet::from);
        // Of the nodes that share a prefix, one is used.
        let used = peer.prefixes.iter().filter(move |net| !peer.standby_prefixes.contains(net));
        let behind = used.filter_map(|net| net.parse::<IpNet>().ok());
        own.chain(behind).map(move |net| (peer, net))
    });
    let covering = networks.filter(|(_, net)| net.contains(&address));
    covering.max_by_key(|(_, net)| net.prefix_len())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Out,
    In,
}

struct Tracer<'a> {
    input: Input<'a>,
    /// Peer that holds the address.
    holder: Option<&'a pb::PeerStatus>,
}

fn step(name: &'static str, fate: Fate, finding: impl Into<String>) -> Step {
    Step { name, fate, finding: finding.into(), cause: None }
}

fn dropped(name: &'static str, code: &str, finding: impl Into<String>) -> Step {
    Step { cause: Some(code.to_owned()), ..step(name, Fate::Drop, finding) }
}

impl Tracer<'_> {
    fn address(&self) -> IpAddr {
        self.input.target.address
    }

    /// Returns the step that finds the peer.
    fn peer(&self, net: Option<IpNet>) -> Step {
        match (self.holder, net) {
            (Some(peer), Some(net)) => {
                let text = format!("{net} is reached through {}", peer.name);
                let others = self.standby(net).join(", ");
                let text = match others.as_str() {
                    "" => text,
                    others => format!("{text} (also behind {others})"),
                };
                step("peer", Fate::Pass, text)
            }
            _ => {
                let text = format!("no peer holds {}", self.address());
                step("peer", Fate::Unknown, text)
            }
        }
    }

    /// Returns the names of the peers that share a network and are not used for it now.
    fn standby(&self, net: IpNet) -> Vec<&str> {
        let net = net.to_string();
        let peers = self.input.answers.peers.iter();
        let standby = peers.filter(|peer| peer.standby_prefixes.contains(&net));
        standby.map(|peer| peer.name.as_str()).collect()
    }

    /// Returns the steps that select rule and route.
    fn route(&self) -> Vec<Step> {
        let Some(route) = &self.input.kernel.route else {
            return vec![step("route", Fate::Unknown, "the kernel has no route that lets it pass")];
        };
        let table = format!("table {}", route.table);
        let rule = match route.rule {
            Some(priority) => format!("rule of priority {priority} looks up {table}"),
            None => format!("no rule of the kernel's list leads to {table}"),
        };
        let mut text = table;
        if let Some(link) = &route.link {
            text.push_str(&format!(": link {link}"));
        }
        if let Some(gateway) = route.gateway {
            text.push_str(&format!(", gateway {gateway}"));
        }
        if let Some(source) = route.source {
            text.push_str(&format!(", source {source}"));
        }
        vec![step("rule", Fate::Pass, rule), step("route", Fate::Pass, text)]
    }

    /// Returns what the guards do, and where the packet goes.
    fn guard(&self) -> (Step, Outcome) {
        let kernel = self.input.kernel;
        let own = kernel.own_route;
        let address = self.address();
        let Some(route) = &kernel.route else {
            let step = match own {
                Some((net, OwnRoute::Guard)) => {
                    let why = match self.holder {
                        Some(peer) => format!("{} is {}", peer.name, peer.state),
                        None => "no peer holds it".to_owned(),
                    };
                    let text = format!("the unreachable route of {net} refuses it: {why}");
                    dropped("guard", Cause::GuardRefuses.code(), text)
                }
                _ => {
                    let text = format!("nothing leads to {address}, and nothing guards it");
                    dropped("guard", Cause::RouteMissing.code(), text)
                }
            };
            return (step, Outcome::Dropped);
        };
        if route.is_local {
            let text = self.api_endpoint().unwrap_or_else(|| "an address of this host".to_owned());
            return (step("guard", Fate::Pass, text), Outcome::Local);
        }
        if route.link.as_deref() == Some(self.input.kernel.link.as_str()) {
            let text = format!("it enters the tunnel by {}", self.input.kernel.link);
            return (step("guard", Fate::Pass, text), Outcome::Tunnel);
        }
        match own {
            Some((net, OwnRoute::Guard | OwnRoute::Tunnel)) => self.past_tunnel(&format!(
                "{net} belongs to the mesh, but a route of the host leads past the tunnel"
            )),
            Some((net, OwnRoute::Host)) => {
                let text = format!("{net} is a network of this host that stays as it is");
                (step("guard", Fate::Pass, text), Outcome::Outside)
            }
            None if self.holder.is_some() => {
                self.past_tunnel("a peer holds it, but Towline has no route to it")
            }
            None if kernel.firewall_guard == Some(true) => {
                self.past_tunnel("it belongs to the mesh, but Towline has no route to it")
            }
            None => {
                let text = "not guarded: it does not belong to the mesh";
                (step("guard", Fate::Pass, text), Outcome::Outside)
            }
        }
    }

    /// Returns what happens to a packet for the mesh that leaves by another link than the tunnel. `found` says
    /// why it does.
    fn past_tunnel(&self, found: &str) -> (Step, Outcome) {
        let status = &self.input.answers.status;
        let reason = (status.applied_reason_code.as_str(), status.applied_reason.as_str());
        let problems = status.problem_details.iter();
        let problems = problems.map(|problem| (problem.code.as_str(), problem.message.as_str()));
        let missing = problems.chain([reason]).find(|(code, _)| WITHOUT_FIREWALL.contains(code));
        // A user who may not read the table is told what the agent's report implies.
        if self.input.kernel.firewall_guard.unwrap_or(missing.is_none()) {
            let text = format!("{found}: the nftables guard drops the packet");
            return (dropped("guard", Cause::RoutePastTunnel.code(), text), Outcome::Dropped);
        }
        let text = format!("{found}, and the nftables guard is missing: it leaves in clear");
        let (code, text) = match missing {
            Some((code, why)) => (code, format!("{text}: {why}")),
            None => (Cause::RoutePastTunnel.code(), text),
        };
        let step = Step { cause: Some(code.to_owned()), ..step("guard", Fate::Pass, text) };
        (step, Outcome::InClear)
    }

    /// Returns where the endpoint of the Kubernetes API leads, if it is the destination.
    fn api_endpoint(&self) -> Option<String> {
        let endpoint = self.input.answers.status.api_endpoint.as_ref()?;
        let target = SocketAddr::new(self.address(), self.input.target.port?);
        if endpoint.address.parse::<SocketAddr>() != Ok(target) {
            return None;
        }
        Some(match endpoint.server.as_str() {
            "" => "the endpoint of the Kubernetes API: no API server is known".to_owned(),
            server => format!("the endpoint of the Kubernetes API: it leads to {server}"),
        })
    }

    /// Returns the source address that the kernel chooses.
    fn source_address(&self) -> Option<IpAddr> {
        self.input.kernel.route.as_ref().and_then(|route| route.source)
    }

    /// Returns the step that checks the source of a packet that enters the tunnel.
    fn source(&self) -> Step {
        let Some(source) = self.source_address() else {
            return step("source", Fate::Unknown, "the kernel does not tell the source");
        };
        let own = self.input.own;
        let is_own = self.own_addresses().any(|net| net.contains(&source));
        let is_static = self.holder.is_some_and(|peer| peer.path_kind == "static");
        if is_own || is_static {
            return step("source", Fate::Pass, format!("{source} is an address of this node"));
        }
        if own.is_masquerading {
            let text = format!("{source} is translated to an address of this node");
            return step("source", Fate::Pass, text);
        }
        if own.is_incomplete {
            let text = format!("{source}: the agent knows whether it is a node IP of this node");
            return step("source", Fate::Unknown, text);
        }
        let text = format!("{source} is not an address of this node in the mesh");
        dropped("source", "own-source-foreign", text)
    }

    fn own_addresses(&self) -> impl Iterator<Item = IpNet> {
        let overlay = self.input.answers.status.overlay_addresses.iter();
        let overlay = overlay.filter_map(|own| own.parse::<IpAddr>().ok()).map(IpNet::from);
        overlay.chain(self.input.own.networks.iter().copied())
    }

    /// Returns what filter chains of other programs do with a connection.
    fn firewalls(&self, direction: Direction) -> Step {
        let kernel = self.input.kernel;
        let what = match direction {
            Direction::Out => "a connection to",
            Direction::In => "a connection from there to",
        };
        let what = format!("{what} TCP port {}", kernel.tried_port);
        let chains = match &kernel.chains {
            Ok(chains) => chains,
            Err(reason) => return step("firewalls", Fate::Unknown, reason.as_str()),
        };
        let dropping =
            chains.iter().find(|chain| chain.is_incoming == (direction == Direction::In));
        match dropping {
            Some(chain) => {
                let text = format!("{} drops {what}: run {}", chain.place, chain.command);
                dropped("firewalls", chain.code, text)
            }
            None => step("firewalls", Fate::Pass, format!("no chain of others drops {what}")),
        }
    }

    /// Returns the steps after the tunnel: the peer's path and its MTU.
    fn path(&self) -> Vec<Step> {
        let Some(peer) = self.holder else {
            let text = "no peer holds the address: the agent drops the packet";
            return vec![dropped("path", Cause::AddressOutsideMesh.code(), text)];
        };
        let status = &self.input.answers.status;
        let blocked = status.problem_details.iter().find(|problem| {
            matches!(problem.code.as_str(), "firewall-drops-tunnels" | "conntrack-full")
        });
        if let Some(problem) = blocked {
            return vec![dropped("path", &problem.code, problem.message.as_str())];
        }
        if peer.state == "down" {
            let text = format!("{} is down: {}", peer.name, peer.reason);
            return vec![dropped("path", &peer.reason_code, text)];
        }
        if peer.state != "up" {
            let text = format!("{} is {}: {}", peer.name, peer.state, peer.reason);
            return vec![step("path", Fate::Unknown, text)];
        }
        let relay = match peer.relay.as_str() {
            "" => String::new(),
            relay => format!(" through the relay {relay}"),
        };
        let text = format!("{} {} {}{relay}", peer.name, peer.path_kind, peer.path);
        let mtu = peer.mtu.map_or(status.mtu, |mtu| mtu.min(status.mtu));
        let mtu = match peer.mtu {
            Some(_) => format!("packets of up to {mtu} bytes"),
            None => {
                format!("packets of up to {mtu} bytes, as the link says: the path is not measured")
            }
        };
        vec![step("path", Fate::Pass, text), step("mtu", Fate::Pass, mtu)]
    }

    /// Returns the step that checks both addresses of the answer after decryption.
    fn sender(&self) -> Step {
        let address = self.address();
        let destination = self.source_address();
        let to = destination.map(|own| format!(" to {own}")).unwrap_or_default();
        match self.holder {
            Some(peer) => {
                let text = format!("{address}{to}: the source belongs to {}", peer.name);
                step("source", Fate::Pass, text)
            }
            None => {
                let text = format!("no peer may send with the source {address}");
                dropped("source", Cause::AddressOutsideMesh.code(), text)
            }
        }
    }

    /// Returns what the reverse path filter of the link does.
    fn reverse_path(&self) -> Step {
        let check = self.input.checks.iter().find(|check| check.subject == Subject::ReversePath);
        match check {
            Some(check) if check.state == CheckState::Failed => {
                let remedy = check.remedy.as_ref().map(|remedy| format!(": {remedy}"));
                let text = format!("{}{}", check.finding, remedy.unwrap_or_default());
                dropped("rp-filter", "rp-filter-strict", text)
            }
            Some(check) => step("rp-filter", Fate::Pass, check.finding.as_str()),
            None => step("rp-filter", Fate::Unknown, "it was not checked"),
        }
    }
}
