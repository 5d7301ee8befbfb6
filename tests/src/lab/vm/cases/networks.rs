//! The host's own network: who configures it, which links it has, and which firewall guards it.

use crate::lab::report::Promises;
use crate::lab::vm::machine::{CHANGE_LIMIT, Machine};
use crate::lab::vm::network::{GATEWAY_V4, GATEWAY_V6};
use crate::lab::vm::pair::{Pair, Testbed, UNOWNED_V4, overlay_addresses};

use super::{MESH_UP, comes_back, holds, nothing_in_clear, resume_working};

/// networkd's file that gives `eth0` its addresses, as the lab wrote it.
const ETH0: &str = "/etc/systemd/network/10-eth0.network";

/// Boots the worker with another configuration of its network, and checks that the mesh works.
fn boot_reconfigured(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    command: &str,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    pair.resume(bed)?;
    reboot_reconfigured(pair, command, promises)
}

/// Does the same as [`boot_reconfigured`] with machines that are on.
fn reboot_reconfigured(
    pair: &mut Pair,
    command: &str,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    configure(&mut pair.worker, command)?;
    pair.worker.shut_down()?;
    pair.network.reset();
    pair.worker.boot("")?;
    comes_back(pair, "with the other network", promises)
}

fn configure(machine: &mut Machine, command: &str) -> anyhow::Result<()> {
    machine.run_ok(&format!("set -e; {command}\nsync"))?;
    Ok(())
}

/// Runs a command that changes the worker's network while the mesh works.
fn survives(pair: &mut Pair, command: &str, promises: &mut Promises) -> anyhow::Result<()> {
    pair.worker.run_ok_for(command, CHANGE_LIMIT)?;
    comes_back(pair, &format!("after `{command}`"), promises)
}

/// Gives the worker another lease while the mesh works: the control plane is the DHCP server.
pub(super) fn dhcp_lease_changes(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    let server = |first: u32| {
        format!(
            "sed -i '/^DHCPServer/d; /^\\[DHCPServer/,$d' {ETH0}; sed -i '/^IPv6AcceptRA/a \
             DHCPServer=yes' {ETH0}; printf '\\n[DHCPServer]\\nPoolOffset={first}\\nPoolSize=9\\n\
             EmitDNS=no\\nEmitNTP=no\\nEmitRouter=yes\\nRouter={GATEWAY_V4}\\n' >>{ETH0}"
        )
    };
    pair.resume(bed)?;
    configure(&mut pair.cp, &server(100))?;
    holds(&mut pair.cp, "networkctl reload", "networkd accepts commands")?;
    let client = format!(
        "printf '[Match]\\nName=eth0\\n\\n[Network]\\nDHCP=ipv4\\nAddress=2001:db8::14/64\\n\
         Gateway={GATEWAY_V6}\\nIPv6AcceptRA=no\\n' >{ETH0}"
    );
    reboot_reconfigured(pair, &client, promises)?;
    let leased =
        |range: &str| format!("ip -4 -o address show eth0 | grep -q ' 203.0.113.{range}/'");
    holds(&mut pair.worker, &leased("10[0-9]"), "the worker has a lease")?;
    configure(&mut pair.cp, &format!("{}; networkctl reload", server(150)))?;
    pair.worker.run_ok("networkctl reconfigure eth0")?;
    holds(&mut pair.worker, &leased("15[0-9]"), "the worker has another lease")?;
    comes_back(pair, "after a change of the lease", promises)?;
    let candidates = "towline status -o json | grep -q 203.0.113.15";
    holds(&mut pair.worker, candidates, "the worker announces its new address")
}

/// Lets NetworkManager configure the worker's network.
pub(super) fn network_manager(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    let profile = "/etc/NetworkManager/system-connections/eth0.nmconnection";
    boot_reconfigured(
        bed,
        pair,
        &format!(
            "rm {ETH0}; systemctl disable systemd-networkd.service systemd-networkd.socket; \
             systemctl enable NetworkManager; umask 77; printf '[connection]\\nid=eth0\\n\
             type=ethernet\\ninterface-name=eth0\\n\\n[ipv4]\\nmethod=manual\\n\
             address1=203.0.113.20/24,{GATEWAY_V4}\\n\\n[ipv6]\\nmethod=manual\\n\
             address1=2001:db8::14/64,{GATEWAY_V6}\\n' >{profile}"
        ),
        promises,
    )?;
    survives(pair, "nmcli connection up eth0", promises)?;
    survives(pair, "systemctl restart NetworkManager", promises)
}

/// Lets netplan write networkd's configuration.
pub(super) fn netplan(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    boot_reconfigured(
        bed,
        pair,
        &format!(
            "rm {ETH0}; umask 77; printf 'network:\\n  version: 2\\n  ethernets:\\n    eth0:\\n      \
             addresses: [203.0.113.20/24, \"2001:db8::14/64\"]\\n      accept-ra: false\\n      \
             routes:\\n      - {{to: 0.0.0.0/0, via: {GATEWAY_V4}}}\\n      \
             - {{to: \"::/0\", via: \"{GATEWAY_V6}\"}}\\n' >/etc/netplan/10-lab.yaml"
        ),
        promises,
    )?;
    survives(pair, "netplan apply", promises)
}

/// Puts the worker's card into a bond.
pub(super) fn bond(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    boot_reconfigured(
        bed,
        pair,
        &format!(
            "cd /etc/systemd/network; sed 's/^Name=eth0/Name=bond0/' {ETH0} >20-bond0.network; \
             printf '[Match]\\nName=eth0\\n\\n[Network]\\nBond=bond0\\n' >{ETH0}; \
             printf '[NetDev]\\nName=bond0\\nKind=bond\\n\\n[Bond]\\nMode=active-backup\\n\
             MIIMonitorSec=100ms\\n' >10-bond0.netdev"
        ),
        promises,
    )?;
    survives(pair, "ip link set bond0 down; ip link set bond0 up; networkctl reload", promises)
}

/// Tags the frames of both machines with a VLAN.
pub(super) fn vlan(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    pair.resume(bed)?;
    // The addresses of the card move to the VLAN.
    let tagged = format!(
        "cd /etc/systemd/network; sed 's/^Name=eth0/Name=eth0.5/' {ETH0} >20-vlan.network; \
         printf '[Match]\\nName=eth0\\n\\n[Network]\\nVLAN=eth0.5\\nLinkLocalAddressing=no\\n' >{ETH0}; \
         printf '[NetDev]\\nName=eth0.5\\nKind=vlan\\n\\n[VLAN]\\nId=5\\n' >10-vlan.netdev"
    );
    for machine in [&mut pair.worker, &mut pair.cp] {
        configure(machine, &tagged)?;
    }
    pair.shut_down()?;
    pair.network.reset();
    pair.boot()?;
    comes_back(pair, "over a VLAN", promises)
}

/// Gives the worker links that are no uplinks: a dummy with an address, and an ipvlan link.
pub(super) fn dummy_and_ipvlan(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    resume_working(bed, pair)?;
    survives(
        pair,
        "ip link add dummy0 type dummy && ip address add 192.0.2.77/32 dev dummy0 && \
         ip link set dummy0 up && ip link add ipvl0 link eth0 type ipvlan mode l2 && \
         ip address add 203.0.113.77/24 dev ipvl0 && ip link set ipvl0 up",
        promises,
    )?;
    survives(pair, "ip link delete ipvl0 && ip link delete dummy0", promises)
}

/// Adds a VRF with a default route by the uplink, and sends to the mesh out of it: the VRF's table
/// is looked up before the rules that lead into the tunnel.
pub(super) fn vrf(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    resume_working(bed, pair)?;
    survives(
        pair,
        &format!(
            "ip link add red type vrf table 77 && ip link set red up && \
             ip link add dummy0 type dummy && ip link set dummy0 master red && \
             ip address add 192.0.2.77/32 dev dummy0 && ip link set dummy0 up && \
             ip route add default via {GATEWAY_V4} dev eth0 table 77"
        ),
        promises,
    )?;
    let leads_out = format!("ip route get {UNOWNED_V4} vrf red | grep -q 'dev eth0'");
    holds(&mut pair.worker, &leads_out, "the VRF's table leads to the uplink")?;
    // Nobody owns the address, so this fails. What counts is what leaves.
    pair.worker.run(&format!("ping -n -c 3 -i 0.3 -W 2 -I red {UNOWNED_V4}"))?;
    nothing_in_clear(pair, "out of a VRF", promises);
    Ok(())
}

/// Denies everything inward with ufw, except the agent's port.
pub(super) fn ufw(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    resume_working(bed, pair)?;
    survives(
        pair,
        "ufw default deny incoming && ufw allow 51830/udp && ufw --force enable && \
         systemctl enable ufw",
        promises,
    )?;
    survives(pair, "ufw reload", promises)?;
    pair.worker.shut_down()?;
    pair.worker.boot("")?;
    comes_back(pair, "after a boot with ufw", promises)?;
    holds(&mut pair.worker, "ufw status | grep -q 'Status: active'", "ufw is active after the boot")
}

/// Starts firewalld, whose default zone refuses most of what comes in, and reloads it.
pub(super) fn firewalld(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    resume_working(bed, pair)?;
    survives(pair, "systemctl start firewalld && firewall-cmd --state", promises)?;
    survives(pair, "firewall-cmd --reload", promises)
}

/// Sets Docker's rules: forwarding is denied by a policy, but for what a container sends, which gets
/// the address of the link that it leaves by.
pub(super) fn docker_rules(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    resume_working(bed, pair)?;
    survives(
        pair,
        "for t in iptables ip6tables; do $t -P FORWARD DROP && $t -N DOCKER-USER && \
         $t -A FORWARD -j DOCKER-USER && \
         $t -A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT && \
         $t -A FORWARD -i docker0 ! -o docker0 -j ACCEPT || exit 1; done; \
         iptables -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
        promises,
    )?;
    pair.worker.run_ok(
        "ip netns add container && ip link add docker0 type veth peer name eth0 netns container && \
         ip address add 172.17.0.1/16 dev docker0 && ip link set docker0 up && \
         ip -n container address add 172.17.0.2/16 dev eth0 && ip -n container link set eth0 up && \
         ip -n container route add default via 172.17.0.1 && sysctl -qw net.ipv4.ip_forward=1",
    )?;
    let from_container =
        |to: &str| format!("ip netns exec container ping -n -c 3 -i 0.3 -W 2 {to}");
    holds(&mut pair.worker, &from_container("203.0.113.10"), "a container reaches other machines")?;
    // Whether the mesh answers a container is not the question. What counts is what leaves.
    let cp = overlay_addresses(&mut pair.cp)?.v4.to_string();
    for address in [&cp, UNOWNED_V4] {
        pair.worker.run(&from_container(address))?;
    }
    nothing_in_clear(pair, "out of a container", promises);
    holds(&mut pair.worker, MESH_UP, "the mesh is up with Docker's rules")
}
