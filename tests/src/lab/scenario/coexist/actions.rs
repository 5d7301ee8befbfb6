//! Actions of other programs on a host: over netlink, and with the real programs.

use std::path::Path;
use std::time::Duration;

use towline_netlink::{Route, RouteKind, Rtnetlink};
use towline_nftables::{Chain, ChainKind, Hook, Nft, Policy, Table, TableFamily};

use crate::lab::namespace::Namespace;
use crate::lab::process::Program;
use crate::lab::tamper::{LINK, Tampering};

/// An action on the network of a host.
#[derive(Debug, Clone, Copy)]
pub(super) enum Action {
    /// One netlink operation on state that Towline created.
    Tampering(Tampering),
    /// Name and function of another action over netlink.
    Netlink(&'static str, fn() -> anyhow::Result<()>),
    /// Name of the action, programs that it needs, and a script for `sh`.
    Script(&'static str, &'static [&'static str], &'static str),
    /// Name of an action that cannot run in a lab, and the reason.
    Impossible(&'static str, &'static str),
}

/// Limit for a script. One that runs longer hangs.
const LIMIT: Duration = Duration::from_secs(40);

impl Action {
    /// Returns all actions, those over netlink first.
    pub(super) fn all() -> Vec<Self> {
        let tamperings = Tampering::ALL.into_iter().map(Self::Tampering);
        tamperings.chain(NETLINK).chain(PROGRAMS).collect()
    }

    /// Returns the name of the action, for example the command that has the same effect.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Tampering(tampering) => tampering.name(),
            Self::Netlink(name, _) | Self::Script(name, ..) | Self::Impossible(name, _) => name,
        }
    }

    /// Returns whether the action needs no program.
    pub(super) fn is_netlink(&self) -> bool {
        matches!(self, Self::Tampering(_) | Self::Netlink(..))
    }

    /// Returns whether forwarded packets are dropped after the action, except for those that a rule
    /// in `DOCKER-USER` accepts.
    pub(super) fn drops_forwarded(&self) -> bool {
        self.name().contains("FORWARD dropped")
    }

    /// Returns why the action cannot run here, or `None` if it can.
    pub(super) fn obstacle(&self) -> Option<String> {
        match self {
            Self::Impossible(_, why) => Some((*why).to_owned()),
            Self::Script(_, needs, _) => {
                let missing = needs.iter().find(|program| !is_installed(program))?;
                Some(format!("{missing} is not installed"))
            }
            _ => None,
        }
    }

    /// Runs the action in a network namespace.
    pub(super) fn run(&self, namespace: &Namespace) -> anyhow::Result<()> {
        match self {
            Self::Tampering(tampering) => namespace.run(|| tampering.apply()),
            Self::Netlink(_, function) => namespace.run(function),
            Self::Script(_, _, script) => {
                // On Debian, these programs are not in the `PATH` of an ordinary user.
                let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
                Program::new("sh")
                    .args(["-ec", script])
                    .env("PATH", path)
                    .run_ok(namespace, LIMIT)
                    .map(drop)
            }
            Self::Impossible(..) => Ok(()),
        }
    }
}

/// Returns whether a program is installed.
fn is_installed(program: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    path.split(':').any(|directory| Path::new(directory).join(program).exists())
}

/// Actions over netlink, in addition to [`Tampering::ALL`].
const NETLINK: [Action; 5] = [
    // The effect of ManageForeignRoutes and ManageForeignRoutingPolicyRules, both on by default.
    Action::Netlink("systemd-networkd starts: foreign routes and rules go", || {
        Tampering::FlushRoutes.apply()?;
        Tampering::FlushRules.apply()
    }),
    Action::Netlink("everything at once", || {
        Tampering::ALL.into_iter().try_for_each(Tampering::apply)
    }),
    Action::Netlink("ip link set towline0 mtu 1300", || {
        let mut netlink = Rtnetlink::open()?;
        let link = netlink.link_index(LINK)?;
        Ok(netlink.set_mtu(link, 1_300)?)
    }),
    Action::Netlink("docker starts: its tables, FORWARD dropped", || {
        let forward = Chain::base(ChainKind::Filter, Hook::Forward, 0)
            .policy(Policy::Drop)
            .rule(towline_nftables::Rule::new().counter().jump("DOCKER-USER"));
        let table = Table::new(TableFamily::Ip, "filter")
            .chain(
                "DOCKER-USER",
                Chain::regular().rule(towline_nftables::Rule::new().counter().return_()),
            )
            .chain("FORWARD", forward);
        Nft::open()?.load(&table)?;
        Ok(())
    }),
    Action::Netlink("somebody's route to a mesh network in the main table", || {
        let mut netlink = Rtnetlink::open()?;
        for network in ["198.19.0.0/24", "fd00::/8"] {
            netlink.replace_route(&Route::new(network.parse()?).kind(RouteKind::Blackhole))?;
        }
        Ok(())
    }),
];

/// Actions with real programs, and those that cannot run in a lab.
const PROGRAMS: [Action; 16] = [
    Action::Script("nft: flush ruleset", &["nft"], "nft flush ruleset"),
    Action::Script(
        "nftables.service restarts with Debian's configuration",
        &["nft"],
        "printf 'flush ruleset\ntable inet filter {\n chain input { type filter hook input priority filter; }\n \
         chain forward { type filter hook forward priority filter; }\n chain output { type filter hook output \
         priority filter; }\n}\n' | nft -f -",
    ),
    Action::Script(
        "nft: kube-proxy in nftables mode makes and syncs its tables",
        &["nft"],
        "for i in 1 2 3; do printf 'add table ip kube-proxy\nadd chain ip kube-proxy nat-prerouting { type nat \
         hook prerouting priority dstnat ; }\nflush chain ip kube-proxy nat-prerouting\nadd rule ip kube-proxy \
         nat-prerouting ip daddr 10.96.0.10 tcp dport 53 dnat to 10.244.9.9:53\n' | nft -f -; done",
    ),
    Action::Script(
        "iptables: kube-proxy in iptables mode syncs its chains",
        &["iptables-restore", "ip6tables-restore"],
        "for i in 1 2 3; do for f in iptables-restore ip6tables-restore; do printf \
         '*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-POSTROUTING - [0:0]\n-A KUBE-POSTROUTING -m mark ! --mark \
         0x4000/0x4000 -j RETURN\nCOMMIT\n*filter\n:KUBE-FIREWALL - [0:0]\n:KUBE-FORWARD - [0:0]\n-A KUBE-FORWARD \
         -m mark --mark 0x4000/0x4000 -j ACCEPT\nCOMMIT\n' | $f --noflush; done; done",
    ),
    Action::Script(
        "iptables: docker's chains, FORWARD dropped",
        &["iptables"],
        "iptables -w -N DOCKER-USER 2>/dev/null || true; iptables -w -P FORWARD DROP; iptables -w -C FORWARD -j \
         DOCKER-USER 2>/dev/null || iptables -w -I FORWARD -j DOCKER-USER",
    ),
    Action::Script(
        "iptables: everything flushed",
        &["iptables", "ip6tables"],
        "for f in iptables ip6tables; do for t in filter nat mangle; do $f -w -t $t -F; $f -w -t $t -X; done; $f -w \
         -P FORWARD ACCEPT; done",
    ),
    Action::Script(
        "ip: rule flush, then the kernel's own rules again",
        &["ip"],
        "for f in -4 -6; do ip $f rule flush; ip $f rule add pref 32766 lookup main; done; ip rule add pref 32767 \
         lookup default",
    ),
    Action::Script(
        "ip: route flush",
        &["ip"],
        "for f in -4 -6; do ip $f route flush table 21580; done",
    ),
    Action::Script(
        "ip: route flush of every route that is not the kernel's, then the gateways again",
        &["ip"],
        "g4=$(ip -4 route show default | head -1); g6=$(ip -6 route show default | head -1); for f in -4 -6; do \
         for p in 84 static boot; do ip $f route flush table all proto $p; done; done; ip -4 route replace $g4; ip -6 \
         route replace $g6",
    ),
    Action::Script("ip: address flush", &["ip"], "ip address flush dev towline0"),
    Action::Script("ip: link down", &["ip"], "ip link set towline0 down"),
    Action::Script(
        "ip: link down and up",
        &["ip"],
        "ip link set towline0 down; ip link set towline0 up",
    ),
    Action::Script("ip: link delete", &["ip"], "ip link delete towline0"),
    Action::Script("firewalld starts, reloads and stops", &["firewalld", "dbus-daemon"], FIREWALLD),
    Action::Impossible(
        "systemd-networkd restarts",
        "it manages no link in a plain namespace: its effect is tested over netlink",
    ),
    Action::Impossible("NetworkManager restarts", "it manages no link in a plain namespace"),
];

/// Script that runs firewalld with its own message bus, so that firewalld of this machine is not
/// affected.
const FIREWALLD: &str = r#"
dir=$(mktemp -d)
# Without the bus it would go and leave its rules behind.
trap 'kill $fw 2>/dev/null; wait $fw; kill $bus 2>/dev/null; wait; rm -r $dir' EXIT
cat > $dir/conf <<X
<busconfig><type>system</type><listen>unix:path=$dir/bus</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/>
<allow own="*"/></policy></busconfig>
X
dbus-daemon --config-file=$dir/conf --nofork --nopidfile & bus=$!
export DBUS_SYSTEM_BUS_ADDRESS=unix:path=$dir/bus
while [ ! -S $dir/bus ]; do sleep 0.05; done
firewalld --nofork --nopid & fw=$!
until firewall-cmd --state; do sleep 0.2; kill -0 $fw; done
firewall-cmd --reload
firewall-cmd --complete-reload
"#;
