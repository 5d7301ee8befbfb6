//! What `towline status` reports: problems that the operator should repair, notes that need no
//! repair, and the reason why the mesh must not be used yet. Each has a stable code.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::time::Duration;

use ipnet::IpNet;
use towline_core::conflict::Conflict;
use towline_core::local_limits::Covered;
use towline_host::{ApplyError, Obstacle, Overlap, PastNetfilter};
use towline_proto::code::Coded;
use towline_proto::codes;
use towline_proto::id::{NodeId, NodeName};

use super::wireguard_socket::NotServed;
use crate::api_endpoint::EndpointProblem;
use crate::config::ClearSetting;
use crate::confirm::Confirmation;
use crate::conntrack::Conntrack;
use crate::kubernetes::NodeProblem;
use crate::map_cache::IdentityAlert;
use crate::prefixes::NotAnnounced;
use crate::state::{NotStored, StateError};

/// Problem that the operator should repair.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Problem {
    /// The controller removed this node.
    #[error("this node was removed from the mesh: run `towline leave`, then join with a new token")]
    Removed,
    /// No controller confirmed the map for longer than the operator allows.
    #[error(
        "no controller confirmed the map for {hours} h, so the tunnels to all nodes are closed ([trust] \
         max_map_age_hours): let this machine reach a controller"
    )]
    MapExpired {
        /// Longest age at which the map is used, in hours.
        hours: u64,
    },
    /// The join still has to be confirmed.
    #[error("the join is not confirmed: undone in {seconds} s: run `towline confirm`")]
    Unconfirmed {
        /// Time until the join is undone, in seconds.
        seconds: u64,
    },
    /// The join was not confirmed in time.
    #[error("the join was not confirmed in time: it is being undone")]
    Undoing,
    /// A join that was not confirmed could not be undone yet.
    #[error("cannot undo the join: {reason}: it is tried again, or run `towline leave`")]
    NotUndone {
        /// Error of the attempt.
        reason: String,
    },
    /// The machine is down, and state that Towline created may still be on the host.
    #[error("{reason}")]
    NotOpened {
        /// Error of the attempt to remove it.
        reason: String,
    },
    /// The stored membership cannot be used.
    #[error("{reason}")]
    Membership {
        /// Error of reading it.
        reason: String,
    },
    /// The controller refused the record, so no change of this node reaches the mesh.
    #[error("the controller refused this node's record: {reason}")]
    RecordRefused {
        /// Answer of the controller.
        reason: String,
    },
    /// The controller withholds a prefix of this node from the mesh.
    #[error("{reason}")]
    PrefixWithheld {
        /// Answer of the controller, which names the holder.
        reason: String,
    },
    /// A controller sent other keys for a known node.
    #[error(
        "the controller sent another identity key for node `{name}` ({node}), which was refused: a node \
         gets other keys only by a new join: check the controller"
    )]
    IdentityChanged {
        /// Name of the node.
        name: NodeName,
        /// Id of the node.
        node: NodeId,
    },
    /// A name is that of another node now.
    #[error(
        "the name `{name}` moved from node {from} to node {to} within the last day: check that an operator \
         replaced the machine"
    )]
    NameMoved {
        /// The name.
        name: NodeName,
        /// Id of the node that had it.
        from: NodeId,
        /// Id of the node that has it.
        to: NodeId,
    },
    /// A restart would lose files.
    #[error(transparent)]
    NotStored(#[from] NotStored),
    /// The plan was not applied.
    #[error(transparent)]
    NotApplied(#[from] NotApplied),
    /// A part of the plan was not applied, or another program interferes.
    #[error(transparent)]
    Host(#[from] towline_host::Problem),
    /// A network of this machine is cut off.
    #[error("{0}")]
    NetworkCovered(Overlap),
    /// A gateway of this machine is cut off.
    #[error(
        "{whose} network {network} covers this machine's gateway {gateway}: change one of the two networks"
    )]
    GatewayCovered {
        /// Whose network it is, such as `peer worker-b's`.
        whose: String,
        /// Network of the mesh.
        network: IpNet,
        /// Address of the gateway.
        gateway: IpAddr,
    },
    /// A protected range of the mesh is not guarded on this machine.
    #[error(
        "the mesh's protected range {range} is not guarded on this machine: it covers {covered}: change \
         the range (`towline-controller mesh set --protected`)"
    )]
    RangeRefused {
        /// Range of the mesh's configuration.
        range: IpNet,
        /// What it covers.
        covered: Covered,
    },
    /// A firewall of another program drops traffic of the mesh.
    #[error("{0}")]
    Firewall(Obstacle),
    /// Another program keeps removing state that Towline created.
    #[error(
        "another program keeps changing Towline's link, rules, routes or nftables table: they are restored \
         each time, and packets are dropped until then: stop that program (systemd-networkd: \
         ManageForeignRoutes=no and ManageForeignRoutingPolicyRules=no)"
    )]
    StateRemoved,
    /// The kernel has no room for new connections.
    #[error(
        "the conntrack table is full ({count} of {max}): the kernel drops new connections: raise \
         net.netfilter.nf_conntrack_max"
    )]
    ConntrackFull {
        /// Number of connections.
        count: u64,
        /// Greatest number of connections.
        max: u64,
    },
    /// A controller's STUN server does not answer, so peers do not learn this node's public address.
    #[error(
        "the controller's STUN server {reflector} never answered: a firewall on the way drops its UDP \
         port: let UDP port {} reach the controller (in Kubernetes: the port `stun` of its Service)",
        reflector.port()
    )]
    ReflectorSilent {
        /// Address of the server.
        reflector: SocketAddr,
    },
    /// Packets of this machine enter the tunnel with a source that it does not have in the mesh.
    #[error(
        "packets of this machine to {destination} are dropped: their source {source_address} is not one \
         of this node's addresses in the mesh: a program is bound to {source_address}, or kube-proxy does \
         not masquerade: bind the program to another address, set clusterCIDR of kube-proxy, or set \
         [node] masquerade_local"
    )]
    OwnSource {
        /// Source of the last such packet.
        source_address: IpAddr,
        /// Destination of that packet.
        destination: IpAddr,
    },
    /// Packets of others enter the tunnel with a source that this node does not announce.
    #[error(
        "packets to {destination} are dropped: their source {source_address} is in no network that this \
         node announces: announce it ([node] prefixes), or let the container network translate it"
    )]
    ForeignSource {
        /// Source of the last such packet.
        source_address: IpAddr,
        /// Destination of that packet.
        destination: IpAddr,
    },
    /// A network of this node is not announced.
    #[error(transparent)]
    NotAnnounced(#[from] NotAnnounced),
    /// A claim of a peer was refused.
    #[error("peer {peer}: {conflict}")]
    Peer {
        /// Name of the peer.
        peer: NodeName,
        /// Claim that was refused.
        conflict: Conflict,
    },
    /// A claim of a static peer was refused.
    #[error("static peer {peer}: {conflict}")]
    StaticPeer {
        /// Name of the peer in the configuration.
        peer: String,
        /// Claim that was refused.
        conflict: Conflict,
    },
    /// The configuration makes this node a relay, but its grant denies it.
    #[error(
        "this node does not relay: its grant does not let it: run `towline-controller node set {node} \
         --relay` on the controller's machine, or unset [relay] enabled"
    )]
    RelayDenied {
        /// Name of this node.
        node: NodeName,
    },
    /// This machine's Kubernetes Node cannot be used as it is.
    #[error(transparent)]
    Node(#[from] NodeProblem),
    /// Kubernetes uses an address of this node that the mesh does not reach.
    #[error(
        "Kubernetes uses {address} for this node, which the mesh does not reach: start the kubelet \
         with `--node-ip=$(towline node-ip)`"
    )]
    NodeIpUnreached {
        /// Address of the Node.
        address: IpAddr,
    },
    /// Clients on this machine do not get an API server.
    #[error(transparent)]
    ApiEndpoint(#[from] EndpointProblem),
    /// No other node uses this machine's API server.
    #[error(
        "no other node uses the API server on port {port}: this node's join token was not for the control \
         plane: join again with one of `towline-controller token create --control-plane --replace NAME`"
    )]
    ApiPortWithoutRole {
        /// Port of the configuration.
        port: NonZeroU16,
    },
}

codes! {
    Problem {
        Removed => "node-removed",
        MapExpired => "map-expired",
        Unconfirmed => "join-unconfirmed",
        Undoing => "join-being-undone",
        NotUndone => "join-not-undone",
        NotOpened => "host-not-opened",
        Membership => "membership-unusable",
        RecordRefused => "record-refused",
        PrefixWithheld => "prefix-withheld",
        IdentityChanged => "identity-changed",
        NameMoved => "name-moved",
        NotStored(NotStored),
        NotApplied(NotApplied),
        Host(towline_host::Problem),
        NetworkCovered(Overlap),
        GatewayCovered => "gateway-covered",
        RangeRefused { covered: Covered },
        Firewall(Obstacle),
        StateRemoved => "state-removed",
        ConntrackFull => "conntrack-full",
        ReflectorSilent => "reflector-silent",
        OwnSource => "own-source-foreign",
        ForeignSource => "source-not-announced",
        NotAnnounced(NotAnnounced),
        Peer { conflict: Conflict },
        StaticPeer { conflict: Conflict },
        RelayDenied => "relay-denied",
        Node(NodeProblem),
        NodeIpUnreached => "node-ip-unreached",
        ApiEndpoint(EndpointProblem),
        ApiPortWithoutRole => "api-port-without-role",
    }
}

/// Error that ended an apply, with its code. It can be compared, unlike an [`ApplyError`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(super) struct NotApplied {
    code: &'static str,
    message: String,
}

impl From<&ApplyError> for NotApplied {
    fn from(error: &ApplyError) -> Self {
        Self { code: error.code(), message: error.to_string() }
    }
}

impl Coded for NotApplied {
    fn code(&self) -> &'static str {
        self.code
    }

    fn codes() -> Vec<&'static str> {
        ApplyError::codes()
    }
}

/// Peculiarity of this machine that needs no repair.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Note {
    /// The host lacks something that the plan does not need.
    #[error(transparent)]
    Host(#[from] towline_host::Problem),
    /// A program may redirect packets around nftables.
    #[error("{0}")]
    PastNetfilter(PastNetfilter),
    /// A firewall of another program drops traffic that the mesh can do without.
    #[error("{0}")]
    Firewall(Obstacle),
    /// No peer answered on the configured port.
    #[error(
        "no peer answers on UDP port {configured}: the mapping of a NAT on the way may be stuck: the \
         second UDP port {second} is used"
    )]
    SecondPort {
        /// Port of the configuration.
        configured: u16,
        /// Port that the kernel chose.
        second: u16,
    },
    /// The mesh lets traffic leave in clear, and this machine does not allow it.
    #[error(
        "the mesh's {setting} is not applied on this machine: add it to [trust] allow_in_clear if its \
         traffic may leave in clear"
    )]
    InClearNotAllowed {
        /// The setting.
        setting: ClearSetting,
    },
    /// A relay is used that no operator granted its role. It joined with an earlier version.
    #[error(
        "relay {relay} is not granted, and the next version will not use it: run `towline-controller \
         node set {relay} --relay` on the controller's machine"
    )]
    RelayNotGranted {
        /// Name of the relay, which may be this node.
        relay: NodeName,
    },
    /// The mesh has no API server for the endpoint on this machine.
    #[error(
        "the API endpoint {address} leads nowhere: no control-plane node is known: join those with a token of \
         `token create --control-plane` and with `join --control-plane`"
    )]
    NoApiServers {
        /// Address of the endpoint.
        address: SocketAddr,
    },
    /// `wg show` shows nothing of this agent.
    #[error(transparent)]
    NotServed(#[from] NotServed),
}

codes! {
    Note {
        Host(towline_host::Problem),
        PastNetfilter(PastNetfilter),
        Firewall(Obstacle),
        SecondPort => "second-port-used",
        InClearNotAllowed => "in-clear-not-allowed",
        RelayNotGranted => "relay-not-granted",
        NoApiServers => "api-servers-unknown",
        NotServed(NotServed),
    }
}

/// Reason why this machine must not use the mesh yet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Blocked {
    /// The core has made no plan.
    #[error("the agent has not computed routes and guards yet: wait a few seconds")]
    NoPlan,
    /// Link, routes and guards were removed.
    #[error("link, routes and guards are removed: run `towline up`")]
    Open,
    /// The plan was not applied.
    #[error(transparent)]
    NotApplied(#[from] NotApplied),
    /// A part of the plan that the mesh needs was not applied.
    #[error(transparent)]
    Host(#[from] towline_host::Problem),
}

codes! {
    Blocked {
        NoPlan => "no-plan",
        Open => "host-open",
        NotApplied(NotApplied),
        Host(towline_host::Problem),
    }
}

impl Problem {
    /// Returns a problem if the join still has to be confirmed.
    pub(super) fn of_confirmation(confirmation: Confirmation) -> Option<Self> {
        match confirmation {
            Confirmation::Settled => None,
            Confirmation::Due(left) => Some(Self::Unconfirmed { seconds: whole_seconds(left) }),
            Confirmation::Missed => Some(Self::Undoing),
        }
    }

    /// Returns a problem if the conntrack table is almost full.
    pub(super) fn of_conntrack(table: Conntrack) -> Option<Self> {
        let Conntrack { count, max } = table;
        table.is_full().then_some(Self::ConntrackFull { count, max })
    }
}

impl From<IdentityAlert> for Problem {
    fn from(alert: IdentityAlert) -> Self {
        match alert {
            IdentityAlert::KeyChanged { node, name } => Self::IdentityChanged { name, node },
            IdentityAlert::NameMoved { name, from, to } => Self::NameMoved { name, from, to },
        }
    }
}

impl From<&StateError> for Problem {
    fn from(error: &StateError) -> Self {
        Self::Membership { reason: error.to_string() }
    }
}

/// Returns a duration in seconds, rounded up.
fn whole_seconds(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::reference::{self, Message};

    #[test]
    fn no_remedy_repeats_a_command_of_its_message() {
        let link = || "mesh0".to_owned();
        let problems = [
            Problem::Removed,
            Problem::Unconfirmed { seconds: 60 },
            Problem::RelayDenied { node: "node-a".parse().unwrap() },
            Problem::NodeIpUnreached { address: "192.0.2.1".parse().unwrap() },
            Problem::ApiPortWithoutRole { port: NonZeroU16::MIN },
            Problem::Host(towline_host::Problem::NoFirewall("no such file".to_owned())),
            Problem::Host(towline_host::Problem::NoZone(link())),
            Problem::Host(towline_host::Problem::Setting {
                link: link(),
                reason: "read-only".to_owned(),
            }),
        ];
        for problem in problems {
            let text = problem.to_string();
            let Message { finding, remedy } = Message::of(problem.code(), &text);
            let remedy = remedy.unwrap_or_else(|| panic!("{text}"));
            for command in reference::commands(remedy) {
                assert!(!finding.contains(command), "{text}");
            }
        }
    }

    #[test]
    fn a_setting_that_is_not_applied_is_named_as_in_the_configuration() {
        for (setting, word) in [
            (ClearSetting::TrustedSites, "trusted_sites"),
            (ClearSetting::BypassWhenDown, "bypass_when_down"),
        ] {
            let note = Note::InClearNotAllowed { setting }.to_string();
            assert!(note.starts_with(&format!("the mesh's {word} is not applied")), "{note}");
        }
    }

    #[test]
    fn a_full_conntrack_table_is_said_with_what_helps() {
        assert_eq!(Problem::of_conntrack(Conntrack { count: 900, max: 1_000 }), None);
        let problem = Problem::of_conntrack(Conntrack { count: 960, max: 1_000 }).unwrap();
        let line = problem.to_string();
        assert!(line.contains("960 of 1000") && line.contains("nf_conntrack_max"), "{line}");
    }
}
