//! The Towline agent: what the binary `towline` does, with all its I/O.
//!
//! `towline-core` makes the decisions. This crate has the parts that apply them, and the command
//! line. The binary only calls `cli::run`.

mod api_endpoint;
pub mod bundle;
pub mod cli;
pub mod config;
pub mod confirm;
pub mod conntrack;
pub mod control;
pub mod daemon;
pub mod dial;
pub mod discovery;
pub mod doctor;
pub mod down;
pub mod events;
pub mod guard;
mod host_addresses;
pub mod install;
#[doc(hidden)]
pub mod internals;
pub mod join;
pub mod keys;
mod kubelet_files;
pub mod kubernetes;
pub mod lockout;
pub mod map_cache;
mod map_journal;
pub mod metrics;
pub mod netcheck;
pub mod node_ip;
pub mod not_connected;
pub mod prefixes;
mod removals;
pub mod reserved_port;
pub mod state;
pub mod static_peers;
pub mod telemetry;
mod timing;
pub mod tls;
pub mod top;
pub mod trace;
pub mod tun_owner;
pub mod uapi;

/// Returns every code of a reason, state, problem, conflict or note that the agent reports.
pub fn codes() -> Vec<&'static str> {
    use towline_proto::code::Coded as _;
    [
        api_endpoint::codes(),
        daemon::codes(),
        events::Event::codes(),
        towline_core::peer_history::PathChange::codes(),
        towline_core::reason::PeerReason::codes(),
        towline_core::reason::StaticPeerReason::codes(),
        towline_core::status::PeerState::codes(),
        towline_dataplane::OffReason::codes(),
        control::NoPong::codes(),
        control::PathKind::codes(),
        doctor::Cause::codes(),
        down::MachineState::codes(),
        kubernetes::CniUnknown::codes(),
        kubernetes::Unavailable::codes(),
        not_connected::NotConnected::codes(),
    ]
    .concat()
}
