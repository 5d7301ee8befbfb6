//! A relay of the simulated network: registrations and channels, without limits.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use towline_core::path::{CHANNEL_LIFETIME, ChannelId};
use towline_proto::frame::Probe;
use towline_proto::id::WireguardKey;

use super::payload::Payload;

/// Lifetime of a registration.
const LIFETIME: Duration = Duration::from_secs(60);

/// The state of a relay. It is lost when its agent stops.
#[derive(Debug, Default)]
pub struct RelayService {
    registered: BTreeMap<WireguardKey, (SocketAddr, Instant)>,
    channels: BTreeMap<ChannelId, Channel>,
}

#[derive(Debug)]
struct Channel {
    ends: [(WireguardKey, SocketAddr); 2],
    used: Instant,
}

impl RelayService {
    /// Handles a request that a node sent from `from`, and returns the datagrams to send.
    pub fn answer(
        &mut self,
        now: Instant,
        me: WireguardKey,
        node: WireguardKey,
        from: SocketAddr,
        request: &Probe,
    ) -> Vec<(SocketAddr, Payload)> {
        let say = |to, message| Payload::Probe { from: me, to, message, size: None };
        match *request {
            Probe::Register { transaction } => {
                let before = self.registered.insert(node, (from, now + LIFETIME));
                let ends = self.channels.values_mut().flat_map(|channel| &mut channel.ends);
                for (_, address) in ends.filter(|(key, address)| {
                    *key == node && before.is_some_and(|(before, _)| before == *address)
                }) {
                    *address = from;
                }
                let answer = Probe::Registered { transaction, lifetime: LIFETIME };
                vec![(from, say(node, answer))]
            }
            Probe::Open { peer, transaction } => {
                let there = self.registered.get(&peer).filter(|(_, until)| now < *until);
                let Some((there, _)) = there.copied() else {
                    return vec![(from, say(node, Probe::Refused { transaction }))];
                };
                let id = channel_of(me, node, peer);
                let channel = self
                    .channels
                    .entry(id)
                    .or_insert(Channel { ends: [(node, from), (peer, there)], used: now });
                channel.used = now;
                for (key, address) in &mut channel.ends {
                    *address = if *key == node { from } else { *address };
                }
                let opened = Probe::Opened { transaction, channel: id.0 };
                let incoming = Probe::Incoming { peer: node, channel: id.0 };
                vec![(from, say(node, opened)), (there, say(peer, incoming))]
            }
            _ => Vec::new(),
        }
    }

    /// Returns the endpoint to which a datagram from `from` on a channel is forwarded.
    pub fn forward(&mut self, now: Instant, from: SocketAddr, id: ChannelId) -> Option<SocketAddr> {
        self.channels.retain(|_, channel| now < channel.used + CHANNEL_LIFETIME);
        let channel = self.channels.get_mut(&id)?;
        let [(_, a), (_, b)] = channel.ends;
        let to = if from == a {
            b
        } else if from == b {
            a
        } else {
            return None;
        };
        channel.used = now;
        Some(to)
    }
}

/// Derives a channel id. A real relay draws a random number; here only the seed may decide.
fn channel_of(relay: WireguardKey, a: WireguardKey, b: WireguardKey) -> ChannelId {
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    let bytes = [low.0[..3].as_ref(), &high.0[..3], &relay.0[..2]].concat();
    ChannelId(bytes.iter().fold(0, |id, byte| id << 8 | u64::from(*byte)))
}
