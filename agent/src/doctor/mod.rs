//! What `towline doctor` finds: a list of checks of this node, each with a remedy.
//!
//! | file | owns |
//! |---|---|
//! | `mod.rs` | the values: facts, checks, codes of causes |
//! | `host_facts.rs` | reading of the host: `/proc`, netlink, the state directory |
//! | `host_checks.rs` | checks of what was read from the host |
//! | `mesh_checks.rs` | checks of what the agent reports |
//! | `role_checks.rs` | checks of what a node does for others: trust, probes, relay, endpoint of the Kubernetes API |
//! | `classes.rs` | subject and severity of each problem and note of the agent |
//! | `findings.rs` | collects findings, and makes one check of those of a kind |
//! | `reference.rs` | cause and command of a code, from `docs/troubleshooting.md` |
//! | `explain.rs` | why one peer is down, relayed or slow |
//!
//! Only `host_facts.rs` does I/O. [`examine`] is a pure function of [`Facts`], and works without an agent.

mod classes;
pub mod explain;
mod findings;
mod host_checks;
pub mod host_facts;
mod mesh_checks;
pub mod reference;
mod role_checks;
#[cfg(test)]
mod tests;

use std::fmt;

use ipnet::IpNet;
use serde::Serialize;
use towline_proto::codes;
use towline_proto::pb;

use findings::Findings;
use host_facts::HostFacts;

/// Everything that the checks look at.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Name of Towline's link, from the configuration.
    pub link: String,
    /// Networks behind this node that the configuration announces or forwards to.
    pub networks_behind: Vec<IpNet>,
    /// Address of a controller, as `host:port`, for remedies; `None` if this command does not know one.
    pub controller: Option<String>,
    /// Facts about the host.
    pub host: HostFacts,
    /// Answers of the agent.
    pub agent: Agent,
}

/// Answers of the agent of this machine.
#[derive(Debug, Clone)]
pub enum Agent {
    /// The agent answered.
    Answered(Box<Answers>),
    /// No agent answered.
    Silent {
        /// Code of the reason.
        code: &'static str,
        /// Reason, for the operator.
        reason: String,
    },
}

/// What the agent reported.
#[derive(Debug, Clone, Default)]
pub struct Answers {
    /// Answer to `towline status`.
    pub status: pb::StatusResponse,
    /// Answer to `towline peers`.
    pub peers: Vec<pb::PeerStatus>,
}

/// Subject of a check. The order is that of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// The agent runs, and its membership can be used.
    Agent,
    /// Link, routes, rules and nftables table of Towline.
    Guards,
    /// Clock of the machine.
    Clock,
    /// Certificate of this node.
    Certificates,
    /// Session with a controller.
    Controller,
    /// STUN servers of the controllers.
    Reflectors,
    /// Paths to the peers.
    Peers,
    /// Networks of this machine, the mesh and the peers that overlap.
    Overlaps,
    /// Networks that this node announces.
    Announcements,
    /// Sources of packets that enter the tunnel.
    Sources,
    /// Identities of other nodes, and what the configuration lets the mesh do on this machine.
    Trust,
    /// Probes that were refused.
    Probes,
    /// Relaying for other nodes.
    Relay,
    /// Forwarding of packets by the kernel.
    Forwarding,
    /// Reverse path filter of the link.
    ReversePath,
    /// Firewalls of other programs.
    Firewalls,
    /// Marks, rules, tables and redirects of other programs.
    OtherPrograms,
    /// Table of connections.
    Conntrack,
    /// MTU of the uplinks, the paths and the container network.
    Mtu,
    /// Offloads of the data plane.
    Offloads,
    /// IPv6 of the host.
    Ipv6,
    /// Kubernetes and the container network.
    Cni,
    /// Endpoint of the Kubernetes API on this machine.
    ApiEndpoint,
    /// State directory.
    Disk,
}

impl Subject {
    /// All subjects, in the order of the output.
    pub const ALL: [Self; 24] = [
        Self::Agent,
        Self::Guards,
        Self::Clock,
        Self::Certificates,
        Self::Controller,
        Self::Reflectors,
        Self::Peers,
        Self::Overlaps,
        Self::Announcements,
        Self::Sources,
        Self::Trust,
        Self::Probes,
        Self::Relay,
        Self::Forwarding,
        Self::ReversePath,
        Self::Firewalls,
        Self::OtherPrograms,
        Self::Conntrack,
        Self::Mtu,
        Self::Offloads,
        Self::Ipv6,
        Self::Cni,
        Self::ApiEndpoint,
        Self::Disk,
    ];

    /// Returns the name of the check for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Guards => "link, routes and guards",
            Self::Clock => "clock",
            Self::Certificates => "certificate",
            Self::Controller => "controller",
            Self::Reflectors => "STUN servers",
            Self::Peers => "peers",
            Self::Overlaps => "overlapping networks",
            Self::Announcements => "announced networks",
            Self::Sources => "sources of packets",
            Self::Trust => "identities and trust",
            Self::Probes => "refused probes",
            Self::Relay => "relaying for others",
            Self::Forwarding => "forwarding",
            Self::ReversePath => "rp_filter",
            Self::Firewalls => "other firewalls",
            Self::OtherPrograms => "marks and rules of others",
            Self::Conntrack => "conntrack table",
            Self::Mtu => "MTU",
            Self::Offloads => "offloads",
            Self::Ipv6 => "IPv6",
            Self::Cni => "Kubernetes and CNI",
            Self::ApiEndpoint => "Kubernetes API endpoint",
            Self::Disk => "state directory",
        }
    }
}

/// Result of a check. A greater value is worse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckState {
    /// The check does not apply to this node, or what it needs is not known.
    Skipped,
    /// Nothing has to be repaired. Peculiarities may be noted.
    Ok,
    /// Something should be repaired, while most of the mesh works.
    Warning,
    /// Something has to be repaired.
    Failed,
}

impl fmt::Display for CheckState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Skipped => "skipped",
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "failed",
        })
    }
}

/// One check, as it is printed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Stable code of the check.
    #[serde(rename = "code")]
    pub subject: Subject,
    /// Name of the check for people.
    pub name: &'static str,
    /// Result of the check.
    pub state: CheckState,
    /// What was found, for people.
    pub finding: String,
    /// What to do, for people; `None` if nothing has to be repaired.
    pub remedy: Option<String>,
    /// Codes of what was found, the worst first. Those of a check that is ok are only notes.
    pub causes: Vec<String>,
}

/// Cause that a command finds by itself, while the agent reports no code for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// No agent listens at the socket.
    AgentNotRunning,
    /// The agent's socket cannot be used by this user.
    AgentNotAllowed,
    /// The clock contradicts the node's certificate.
    ClockWrong,
    /// Files of the state directory were written later than now.
    ClockSetBack,
    /// The kernel does not know that its clock is synchronized.
    ClockNotSynchronized,
    /// The node's certificate is no longer valid.
    CertificateExpired,
    /// The node's certificate should have been renewed long ago.
    CertificateExpiresSoon,
    /// No peer that is needed is up.
    NoPeerUp,
    /// The kernel does not forward, but this node announces networks behind it.
    ForwardingOff,
    /// A packet of the tunnel does not fit into the uplink.
    UplinkMtuSmall,
    /// A path carries smaller packets than the link.
    PathMtuSmall,
    /// Probes of a peer take long.
    PathRttHigh,
    /// Many probes of a peer are lost.
    PathLossHigh,
    /// Datagrams of a peer arrive, while it answers nothing.
    UdpOneWay,
    /// The file system of the state directory has no space.
    DiskFull,
    /// The file system of the state directory cannot be written.
    DiskReadOnly,
    /// This node knows no such peer.
    PeerUnknown,
    /// The address belongs to no peer.
    AddressOutsideMesh,
    /// The kernel has no route to the address, and no guard refuses it.
    RouteMissing,
    /// A guard refuses the packet.
    GuardRefuses,
    /// The packet would leave by another link, although its destination is guarded.
    RoutePastTunnel,
}

codes! {
    Cause {
        AgentNotRunning => "agent-not-running",
        AgentNotAllowed => "agent-not-allowed",
        ClockWrong => "clock-wrong",
        ClockSetBack => "clock-set-back",
        ClockNotSynchronized => "clock-not-synchronized",
        CertificateExpired => "certificate-expired",
        CertificateExpiresSoon => "certificate-expires-soon",
        NoPeerUp => "no-peer-up",
        ForwardingOff => "forwarding-off",
        UplinkMtuSmall => "uplink-mtu-small",
        PathMtuSmall => "path-mtu-small",
        PathRttHigh => "path-rtt-high",
        PathLossHigh => "path-loss-high",
        UdpOneWay => "udp-one-way",
        DiskFull => "disk-full",
        DiskReadOnly => "disk-read-only",
        PeerUnknown => "peer-unknown",
        AddressOutsideMesh => "address-outside-mesh",
        RouteMissing => "route-missing",
        GuardRefuses => "guard-refuses",
        RoutePastTunnel => "route-past-tunnel",
    }
}

/// Returns one check of each subject.
pub fn examine(facts: &Facts) -> Vec<Check> {
    let mut findings = Findings::default();
    mesh_checks::examine(facts, &mut findings);
    host_checks::examine(facts, &mut findings);
    let mut checks = findings.finish();
    if let Some(controller) = &facts.controller {
        for remedy in checks.iter_mut().filter_map(|check| check.remedy.as_mut()) {
            *remedy = reference::with_controller(remedy, controller);
        }
    }
    checks
}

impl Facts {
    /// Returns what the agent reported, if it answered.
    fn answers(&self) -> Option<&Answers> {
        match &self.agent {
            Agent::Answered(answers) => Some(answers),
            Agent::Silent { .. } => None,
        }
    }
}
