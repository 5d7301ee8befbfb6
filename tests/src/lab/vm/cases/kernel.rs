//! Features that depend on the kernel: offloads, other tunnels inside the mesh, and the kernel's
//! WireGuard.

use anyhow::Context as _;

use crate::lab::report::Promises;
use crate::lab::vm::pair::{Pair, Testbed, overlay_addresses};

use super::{MESH_UP, holds, nothing_in_clear, resume_mesh};

/// Offloads that are active on each kernel; `docs/kernels.md` has the same table.
pub(super) const FEATURES: [(&str, [&str; 5]); 4] = [
    ("5.10", ["tun_tcp", "udp_segment", "", "", ""]),
    ("6.1", ["tun_tcp", "udp_segment", "udp_gro", "", ""]),
    ("6.12", ["tun_tcp", "udp_segment", "udp_gro", "tun_udp", ""]),
    ("newest", ["tun_tcp", "udp_segment", "udp_gro", "tun_udp", "tun_tunnel"]),
];

/// Checks that the active offloads are those of the table.
pub(super) fn features(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    pair.resume(bed)?;
    holds(&mut pair.worker, "towline status", "the agent answers")?;
    let status = pair.worker.run_ok("towline status -o json")?;
    let status: serde_json::Value = serde_json::from_str(&status)?;
    let mut active: Vec<&str> = status["features"]
        .as_array()
        .context("the status has no features")?
        .iter()
        .filter(|feature| feature["active"] == true || refused_by_the_card(feature))
        .filter_map(|feature| feature["name"].as_str())
        .collect();
    active.sort_unstable();
    let name = bed.kernel.release.name;
    let (_, expected) = FEATURES
        .iter()
        .find(|(kernel, _)| *kernel == name)
        .context("the table of features does not contain this kernel")?;
    let mut expected: Vec<&str> =
        expected.iter().copied().filter(|name| !name.is_empty()).collect();
    expected.sort_unstable();
    let known = FEATURES[3].1;
    active.retain(|name| known.contains(name));
    promises.hold(active == expected, || {
        format!("the active offloads are {}: {}", expected.join(" "), active.join(" "))
    });
    Ok(())
}

/// Returns whether the kernel has the offload and only the emulated network card, which computes no
/// checksums, keeps it from being used.
fn refused_by_the_card(feature: &serde_json::Value) -> bool {
    feature["reason_code"] == "offload-needs-checksums"
}

/// Creates VXLAN and Geneve tunnels between the nodes' mesh addresses, as CNIs do.
pub(super) fn tunnels(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    pair.resume(bed)?;
    for machine in [&mut pair.cp, &mut pair.worker] {
        holds(machine, MESH_UP, "the mesh comes up")?;
    }
    let cp = overlay_addresses(&mut pair.cp)?;
    let worker = overlay_addresses(&mut pair.worker)?;
    let ends = [(&mut pair.cp, cp, worker, 1), (&mut pair.worker, worker, cp, 2)];
    for (machine, own, other, host) in ends {
        machine.run_ok(&format!(
            "ip link add vx0 type vxlan id 1 dstport 4789 local {own} remote {remote} && \
             ip address add 10.244.1.{host}/24 dev vx0 && ip link set vx0 mtu 1370 up && \
             ip link add gn0 type geneve id 2 remote {remote} && \
             ip address add 10.244.2.{host}/24 dev gn0 && ip link set gn0 mtu 1360 up",
            own = own.v4,
            remote = other.v4,
        ))?;
    }
    for (address, what) in [("10.244.1.1", "VXLAN"), ("10.244.2.1", "Geneve")] {
        let small = format!("ping -n -c 2 -i 0.3 -W 5 {address}");
        holds(&mut pair.worker, &small, &format!("{what} reaches the control plane"))?;
        let large = format!("ping -n -c 2 -i 0.3 -W 5 -M do -s 1300 {address}");
        holds(&mut pair.worker, &large, &format!("large packets pass {what}"))?;
    }
    nothing_in_clear(pair, "with VXLAN and Geneve", promises);
    Ok(())
}

/// Uses the kernel's WireGuard on the control plane's machine as a static peer of the worker, with
/// a preshared key, with each of the worker's engines; each time it moves to another port.
pub(super) fn wireguard_peer(
    bed: &Testbed<'_>,
    pair: &mut Pair,
    promises: &mut Promises,
) -> anyhow::Result<()> {
    resume_mesh(bed, pair)?;
    let ours = pair.worker.run_ok("towline pubkey")?.trim().to_owned();
    let psk = pair.cp.run_ok("wg genpsk")?.trim().to_owned();
    let theirs = pair.cp.run_ok("umask 77; wg genkey >/run/wg.key; wg pubkey </run/wg.key")?;
    pair.cp.run_ok(&format!(
        "umask 77; echo {psk} >/run/wg.psk; ip link add wg0 type wireguard && \
         wg set wg0 listen-port 51999 private-key /run/wg.key peer {ours} \
         preshared-key /run/wg.psk allowed-ips 10.9.0.2/32 endpoint 203.0.113.20:51830 && \
         ip address add 10.9.0.1/24 dev wg0 && ip link set wg0 up"
    ))?;
    pair.worker.run_ok(&format!(
        "umask 77; echo {psk} >/etc/towline/office.psk; \
         ! id towline 2>/dev/null || chown towline /etc/towline/office.psk; umask 22; \
         printf '%s\\n' '[node]' 'addresses = [\"10.9.0.2\"]' '[wireguard]' \
         'engine = \"auto\"' '[[peer]]' 'name = \"office\"' \
         'public_key = \"{}\"' 'preshared_key_file = \"/etc/towline/office.psk\"' \
         'endpoint = \"203.0.113.10:51999\"' 'allowed_ips = [\"10.9.0.1/32\"]' 'keepalive = 5' \
         >>/etc/towline/agent.toml",
        theirs.trim()
    ))?;
    let ping = "ping -n -c 3 -i 0.3 -W 5 10.9.0.1";
    let back = "ping -n -c 3 -i 0.3 -W 5 10.9.0.2";
    // The timestamps of boringtun's handshakes are ahead of those of the batch engine, so the kernel would
    // refuse the batch engine for a while if it came second.
    for engine in ["batch", "boringtun"] {
        let of = |what: &str| format!("{what} (engine {engine})");
        pair.cp.run_ok("wg set wg0 listen-port 51999")?;
        pair.worker.run_ok(&format!(
            "sed -i 's/^engine = .*/engine = \"{engine}\"/' /etc/towline/agent.toml && \
             towline config check && systemctl restart towline.service"
        ))?;
        let shown = format!("towline status | grep -q 'engine {engine}'");
        holds(&mut pair.worker, &shown, &of("the agent runs"))?;
        holds(&mut pair.worker, ping, &of("the worker reaches the kernel's WireGuard"))?;
        holds(&mut pair.cp, back, &of("the kernel's WireGuard reaches the worker"))?;
        pair.cp.run_ok("wg set wg0 listen-port 52000")?;
        // The next packet from the peer shows the worker its new port.
        let moved = of("the kernel's WireGuard reaches the worker after it moved");
        holds(&mut pair.cp, back, &moved)?;
        holds(&mut pair.worker, ping, &of("the worker reaches it after it moved"))?;
    }
    pair.ping()?;
    nothing_in_clear(pair, "while the kernel's WireGuard is a peer", promises);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::vm::kernel::RELEASES;

    #[test]
    fn the_document_has_the_same_table_of_features() {
        let document = include_str!("../../../../../docs/kernels.md");
        let mut rows = document.lines().filter(|line| line.starts_with("| "));
        let header: Vec<&str> = rows.next().unwrap().split('|').map(str::trim).collect();
        for release in RELEASES {
            let row = rows
                .clone()
                .find(|row| row.starts_with(&format!("| {} ", release.name)))
                .unwrap_or_else(|| panic!("no row for {}", release.name));
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            let (_, expected) = FEATURES.iter().find(|(name, _)| *name == release.name).unwrap();
            for (name, cell) in
                header.iter().zip(&cells).skip(2).filter(|(name, _)| !name.is_empty())
            {
                let is_on = cell.starts_with("on");
                assert_eq!(expected.contains(name), is_on, "{name} on {}", release.name);
            }
        }
    }
}
