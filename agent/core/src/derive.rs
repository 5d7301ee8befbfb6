//! The peer table, built whole from what the core knows.

use crate::claims::Claims;
use crate::own_networks::OwnNetworks;
use crate::peer::{Peer, clamped};
use crate::peer_table::{PeerEntry, PeerTable};

/// The data plane's peers: all that hold their key.
pub(crate) fn peer_table<'a>(
    link: u16,
    claims: &Claims,
    peers: impl Iterator<Item = &'a Peer>,
    own: OwnNetworks,
) -> PeerTable {
    let entries = peers.filter_map(|peer| {
        let claim = claims.of(peer.id()).filter(|claim| claim.key_holder.is_none())?;
        let (mtu, fragment) = clamped(peer.mtu(), link);
        let entry = PeerEntry {
            endpoint: peer.endpoint(),
            prefixes: claim.prefixes.clone(),
            // The core's own pings keep mappings open.
            keepalive: None,
            mtu,
            fragment,
            preshared_key: None,
            boot_epoch: peer.node().record().boot_epoch,
            is_static: false,
        };
        Some((peer.key(), entry))
    });
    PeerTable { peers: entries.collect(), own }
}
