//! Destination of a trace: a name or an address, with or without a port.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ipnet::IpNet;

use crate::doctor::Answers;

/// Destination as the operator writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    /// Name or address.
    pub host: Host,
    /// TCP port.
    pub port: Option<u16>,
    /// Text that was parsed.
    text: String,
}

/// Host of a destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// Name of a node or of a static peer.
    Name(String),
    /// IP address.
    Address(IpAddr),
}

/// Destination with its address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Text that was asked for.
    pub text: String,
    /// Address of the destination.
    pub address: IpAddr,
    /// TCP port.
    pub port: Option<u16>,
}

/// Error of a destination.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DestinationError {
    /// The text cannot be parsed.
    #[error("invalid destination {0}: write NAME, IP, NAME:PORT, IP:PORT or [IP]:PORT")]
    Invalid(String),
    /// No peer has this name.
    #[error("no peer has the name {0}: run `towline peers` for a list")]
    NoPeer(String),
    /// The peer has no address.
    #[error("peer {0} has no address in the mesh: name the address")]
    NoAddress(String),
}

impl FromStr for Destination {
    type Err = DestinationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || DestinationError::Invalid(text.to_owned());
        let (host, port) = if let Ok(address) = text.parse() {
            (Host::Address(address), None)
        } else if let Ok(socket) = text.parse::<SocketAddr>() {
            (Host::Address(socket.ip()), Some(socket.port()))
        } else {
            let (name, port) = match text.split_once(':') {
                Some((name, port)) => (name, Some(port.parse::<u16>().map_err(|_| invalid())?)),
                None => (text, None),
            };
            (Host::Name(name.to_owned()), port)
        };
        if port == Some(0) || matches!(&host, Host::Name(name) if name.is_empty()) {
            return Err(invalid());
        }
        Ok(Self { host, port, text: text.to_owned() })
    }
}

impl Destination {
    /// Returns the destination with its address. For a peer's name this is its last overlay address, which
    /// `towline peers` shows, or the first host that it announces.
    pub fn resolve(&self, answers: &Answers) -> Result<Target, DestinationError> {
        let address = match &self.host {
            Host::Address(address) => *address,
            Host::Name(name) => Self::address_of(name, answers)?,
        };
        Ok(Target { text: self.text.clone(), address, port: self.port })
    }

    fn address_of(name: &str, answers: &Answers) -> Result<IpAddr, DestinationError> {
        let overlay = if answers.status.name == name {
            (&answers.status.overlay_addresses, None)
        } else {
            let mut peers = answers.peers.iter();
            let peer = peers.find(|peer| peer.name == name);
            let peer = peer.ok_or_else(|| DestinationError::NoPeer(name.to_owned()))?;
            (&peer.overlay_addresses, Some(&peer.prefixes))
        };
        let (addresses, prefixes) = overlay;
        let hosts = prefixes.into_iter().flatten().filter_map(|prefix| {
            let net: IpNet = prefix.parse().ok()?;
            (net.prefix_len() == net.max_prefix_len()).then_some(net.addr())
        });
        let mut found = addresses.iter().rev().filter_map(|text| text.parse().ok()).chain(hosts);
        found.next().ok_or_else(|| DestinationError::NoAddress(name.to_owned()))
    }
}
