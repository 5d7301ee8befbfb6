//! Receives netlink notifications about changes by other programs: of the host's links and addresses,
//! of Towline's state, of the chains that hold Towline's rules, and of their own nftables.
//!
//! This module only reports changes; `HostNetwork` repairs them.

use std::io;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use towline_netlink::codec::{Received, attributes, u32_at};
use towline_netlink::{Group, Monitor, NetlinkError, Notified, Protocol, Rtnetlink};

use super::{Names, OURS, hook};

/// Change of the host's network. Several changes within a short time are one event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostEvent {
    /// The host's links, addresses or default routes changed: gather candidates again.
    AddressesChanged,
    /// Another program changed Towline's state: call `invalidate` and `apply`.
    OursChanged,
    /// Another program changed a chain that may hold Towline's rules: call `apply_hooks`.
    HooksChanged,
    /// Another program changed its nftables: what it drops may be something else now. Programs such as
    /// kube-proxy do that often.
    FirewallsChanged,
}

/// Stream of events.
#[derive(Debug)]
pub struct Watch {
    route: AsyncFd<Monitor>,
    /// Monitor of nftables; `None` if it cannot be opened, as on a kernel without nftables.
    netfilter: Option<AsyncFd<Monitor>>,
    filter: Filter,
    pending: Pending,
}

/// Time to wait after a notification, so that a burst becomes one event. The kernel deletes the
/// addresses and routes of a link together with it, for example.
const SETTLE: Duration = Duration::from_millis(5);

/// Selects the notifications that matter.
#[derive(Debug)]
struct Filter {
    names: Names,
    /// Index of Towline's link. Set while the link exists.
    link: Option<u32>,
    /// Port ids of Towline's own sockets. Notifications about their changes are ignored.
    ports: Ports,
}

/// Netlink port ids of Towline's sockets, one per protocol. Each protocol assigns its own ids, so an id
/// identifies a socket only within its protocol.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ports {
    pub(super) route: u32,
    pub(super) netfilter: Option<u32>,
}

/// Events that were received but not yet returned.
#[derive(Debug, Clone, Copy, Default)]
struct Pending {
    addresses: bool,
    ours: bool,
    hooks: bool,
    firewalls: bool,
}

// Message types (`NFT_MSG_*`) that may concern Towline's rules in a chain of another program.
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const DELETE_RULE: u16 = 8;
/// Message type (`NFT_MSG_NEWGEN`) that ends each transaction and names no object.
const NEW_GENERATION: u16 = 15;

/// Multicast groups of rtnetlink that the watch subscribes to.
const ROUTE_GROUPS: [Group; 7] = [
    Group::Links,
    Group::AddressesV4,
    Group::AddressesV6,
    Group::RoutesV4,
    Group::RoutesV6,
    Group::RulesV4,
    Group::RulesV6,
];

impl Watch {
    /// Subscribes to the notifications, and reads the index of Towline's link.
    pub(super) fn open(
        rtnetlink: &mut Rtnetlink,
        names: &Names,
        ports: Ports,
    ) -> Result<Self, NetlinkError> {
        let route = register(Monitor::open(Protocol::Route, &ROUTE_GROUPS)?)?;
        let netfilter = match Monitor::open(Protocol::Netfilter, &[Group::Nftables]) {
            Ok(monitor) => Some(register(monitor)?),
            Err(_) => None,
        };
        // After the subscription, so that no change is missed.
        let link = rtnetlink.link(&names.link)?.map(|link| link.index);
        let filter = Filter { names: names.clone(), link, ports };
        Ok(Self { route, netfilter, filter, pending: Pending::default() })
    }

    /// Waits for the next event. Cancel safe: dropping the future loses no event.
    pub async fn next(&mut self) -> Result<HostEvent, NetlinkError> {
        loop {
            if std::mem::take(&mut self.pending.ours) {
                return Ok(HostEvent::OursChanged);
            }
            if std::mem::take(&mut self.pending.hooks) {
                return Ok(HostEvent::HooksChanged);
            }
            if std::mem::take(&mut self.pending.addresses) {
                return Ok(HostEvent::AddressesChanged);
            }
            if std::mem::take(&mut self.pending.firewalls) {
                return Ok(HostEvent::FirewallsChanged);
            }
            self.readable().await?;
            tokio::time::sleep(SETTLE).await;
            self.read()?;
        }
    }

    async fn readable(&mut self) -> Result<(), NetlinkError> {
        let wait = async {
            match &mut self.netfilter {
                None => self.route.readable_mut().await.map(drop),
                Some(netfilter) => tokio::select! {
                    ready = self.route.readable_mut() => ready.map(drop),
                    ready = netfilter.readable_mut() => ready.map(drop),
                },
            }
        };
        wait.await.map_err(wait_failed)
    }

    /// Reads all queued notifications into `pending`. If the kernel dropped notifications, everything
    /// may have changed.
    fn read(&mut self) -> Result<(), NetlinkError> {
        let Self { route, netfilter, filter, pending } = self;
        let all = Pending { addresses: true, ours: true, hooks: true, firewalls: true };
        let overrun = drain(route, |received| filter.route(&received, pending))?;
        if overrun {
            *pending = all;
        }
        if let Some(netfilter) = netfilter
            && drain(netfilter, |received| filter.netfilter(&received, pending))?
        {
            pending.ours = true;
            pending.hooks = true;
            pending.firewalls = true;
        }
        Ok(())
    }
}

/// Reads all queued notifications. Returns true if the kernel dropped some.
fn drain(
    monitor: &mut AsyncFd<Monitor>,
    mut take: impl FnMut(Received<'_>),
) -> Result<bool, NetlinkError> {
    let result = monitor.try_io_mut(Interest::READABLE, |monitor| {
        let notified = monitor.drain(&mut take);
        match notified {
            Ok(Notified::Overrun) => Ok(Ok(true)),
            Err(error) => Ok(Err(error)),
            // The queue is empty: wait until the socket is readable again.
            Ok(Notified::Complete) => Err(io::ErrorKind::WouldBlock.into()),
        }
    });
    match result {
        Ok(outcome) => outcome,
        Err(_would_block) => Ok(false),
    }
}

/// Registers a monitor with the Tokio runtime, to wait until it is readable.
///
/// # Errors
///
/// If the runtime accepts no further file descriptor.
pub fn register(monitor: Monitor) -> Result<AsyncFd<Monitor>, NetlinkError> {
    // SAFETY: a monitor owns its socket, always returns the same descriptor, and closes it on drop.
    let registered = unsafe { AsyncFd::register_with_interest(monitor, Interest::READABLE) };
    registered.map_err(|error| wait_failed(error.into()))
}

fn wait_failed(source: io::Error) -> NetlinkError {
    NetlinkError::Socket { action: "wait", source }
}

impl Filter {
    fn route(&mut self, received: &Received<'_>, pending: &mut Pending) {
        let by_us = self.ports.route == received.port;
        match received.kind {
            libc::RTM_NEWLINK | libc::RTM_DELLINK => {
                if self.is_our_link(received) {
                    pending.ours |= !by_us;
                } else {
                    pending.addresses = true;
                }
            }
            libc::RTM_NEWADDR | libc::RTM_DELADDR => {
                if self.link.is_some() && u32_at(received.payload, 4) == self.link {
                    pending.ours |= !by_us;
                } else {
                    pending.addresses = true;
                }
            }
            libc::RTM_NEWROUTE | libc::RTM_DELROUTE => {
                pending.ours |= !by_us && self.is_our_route(received);
                pending.addresses |= !by_us && is_default_route(received);
            }
            libc::RTM_NEWRULE | libc::RTM_DELRULE => {
                pending.ours |= !by_us && self.is_our_rule(received);
            }
            _ => {}
        }
    }

    fn netfilter(&self, received: &Received<'_>, pending: &mut Pending) {
        const HEADER: usize = 4;
        // Every message about a table or an object in it has the table's name in attribute 1.
        const TABLE: u16 = 1;
        let kind = received.kind & 0xff;
        if self.ports.netfilter == Some(received.port) || kind == NEW_GENERATION {
            return;
        }
        let named = |kind: u16, name: &str| {
            attributes(received.payload, HEADER).any(|a| a.kind == kind && a.string() == name)
        };
        if named(TABLE, &self.names.firewall) {
            pending.ours = true;
        } else {
            pending.firewalls = true;
        }
        pending.hooks |= named(TABLE, hook::FIREWALLD);
        // The chain's name is in attribute 2 of a rule and attribute 3 of a chain.
        let (table, chain) = hook::PLACE;
        let place = match kind {
            NEW_CHAIN => 3,
            NEW_RULE | DELETE_RULE => 2,
            _ => return,
        };
        pending.hooks |=
            named(TABLE, table) && (named(place, chain) || named(place, hook::FORWARD));
    }

    /// Returns true if a notification concerns Towline's link, and updates the link's index.
    fn is_our_link(&mut self, received: &Received<'_>) -> bool {
        const HEADER: usize = 16;
        const NAME: u16 = 3;
        let index = u32_at(received.payload, 4);
        let named = attributes(received.payload, HEADER)
            .any(|a| a.kind == NAME && a.string() == self.names.link);
        let was = self.link.is_some() && self.link == index;
        if named {
            self.link = index.filter(|_| received.kind == libc::RTM_NEWLINK);
        }
        named || was
    }

    fn is_our_route(&self, received: &Received<'_>) -> bool {
        const HEADER: usize = 12;
        const TABLE: u16 = 15;
        attributes(received.payload, HEADER)
            .filter(|a| a.kind == TABLE)
            .filter_map(|a| a.u32())
            .any(|table| self.names.tables().contains(&table))
    }

    fn is_our_rule(&self, received: &Received<'_>) -> bool {
        const HEADER: usize = 12;
        const PRIORITY: u16 = 6;
        const PROTOCOL: u16 = 21;
        attributes(received.payload, HEADER).any(|a| match a.kind {
            PRIORITY => a.u32().is_some_and(|priority| self.names.has_priority(priority)),
            PROTOCOL => a.u8() == Some(OURS),
            _ => false,
        })
    }
}

/// Returns true if a notification concerns a default route of the main table.
fn is_default_route(received: &Received<'_>) -> bool {
    // The header begins with the family, the lengths of destination and source, the type of service,
    // and the number of the table.
    let header = received.payload.first_chunk::<5>();
    header.is_some_and(|header| header[1] == 0 && header[4] == libc::RT_TABLE_MAIN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HostNetwork;
    use towline_netlink::{Family, Rule, RuleAction};
    use towline_netns::{add_link, namespace_test};
    use towline_nftables::{Nft, Table, TableFamily};

    fn names() -> Names {
        Names {
            link: "towline0".to_owned(),
            table: 21_580,
            priority: 21_580,
            firewall: "towline".to_owned(),
        }
    }

    fn run<T>(body: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(body)
    }

    /// Returns the next event that is not about addresses: the kernel tells those of a new link by and by.
    async fn next(watch: &mut Watch) -> HostEvent {
        loop {
            let event = watch.next().await.unwrap();
            if event != HostEvent::AddressesChanged {
                return event;
            }
        }
    }

    namespace_test! {
        fn what_others_change_is_told_apart() {
            let mut host = HostNetwork::open().unwrap();
            run(async {
                let mut watch = host.watch(&names()).unwrap();
                add_link("eth0");
                assert_eq!(watch.next().await.unwrap(), HostEvent::AddressesChanged);

                let mut rtnetlink = Rtnetlink::open().unwrap();
                let rule = Rule::new(Family::V4, 21_580, RuleAction::Table(21_580));
                rtnetlink.add_rule(&rule).unwrap();
                assert_eq!(next(&mut watch).await, HostEvent::OursChanged);

                let mut nft = Nft::open().unwrap();
                nft.load(&Table::new(TableFamily::Inet, "another")).unwrap();
                nft.load(&Table::new(TableFamily::Inet, "towline")).unwrap();
                assert_eq!(next(&mut watch).await, HostEvent::OursChanged);

                assert_eq!(next(&mut watch).await, HostEvent::FirewallsChanged);
                // Changes of our own are no news.
                host.nft.as_mut().unwrap().load(&Table::new(TableFamily::Inet, "ours")).unwrap();

                let foreign = Rule { priority: 100, ..rule };
                rtnetlink.add_rule(&foreign).unwrap();
                let quiet = tokio::time::timeout(Duration::from_millis(50), next(&mut watch)).await;
                assert!(quiet.is_err(), "{quiet:?}");
            });
        }
    }

    namespace_test! {
        fn the_number_of_our_socket_in_one_protocol_hides_nobody_in_another() {
            // The kernel assigns the same port id to the first socket of a process in each protocol.
            let mut theirs = Nft::open().unwrap();
            let mut host = HostNetwork::open().unwrap();
            assert_eq!(theirs.port(), host.rtnetlink.port());
            run(async {
                let mut watch = host.watch(&names()).unwrap();
                theirs.load(&Table::new(TableFamily::Inet, "towline")).unwrap();
                let event = tokio::time::timeout(Duration::from_secs(10), watch.next()).await;
                assert_eq!(event.expect("a notification").unwrap(), HostEvent::OursChanged);
            });
        }
    }
}
