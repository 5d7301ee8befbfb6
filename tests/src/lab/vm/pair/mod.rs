//! A control plane with a controller, and a worker: two machines that form a mesh.

mod snapshot;

use std::fs;
use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use ipnet::IpNet;
use serde::Deserialize;

use crate::lab::output::ProgressOutput;
use crate::lab::vm::accelerator::Accelerator;
use crate::lab::vm::cache::Cache;
use crate::lab::vm::disk::{Layers, link};
use crate::lab::vm::image::Image;
use crate::lab::vm::kernel::Kernel;
use crate::lab::vm::machine::{CHANGE_LIMIT, Machine, Parts};
use crate::lab::vm::network::{GATEWAY_V4, GATEWAY_V6, Network};
use crate::lab::vm::software::Software;
use crate::lab::vm::witness::{MESH_LABEL, PLAIN_LABEL, Sent};

pub use snapshot::Unusable;

/// Two machines on one network.
#[derive(Debug)]
pub struct Pair {
    /// The machine with the controller, which is also a node.
    pub cp: Machine,
    /// The machine under test.
    pub worker: Machine,
    /// The network between them. It is dropped after the machines.
    pub network: Network,
    /// Why machines were booted that should have been restored.
    restore_error: Option<String>,
}

/// Addresses of a node in the mesh.
#[derive(Debug, Clone, Copy)]
pub struct OverlayAddresses {
    /// IPv4 address in the mesh.
    pub v4: IpAddr,
    /// IPv6 address in the mesh.
    pub v6: IpAddr,
}

/// The parts from which a case's machines are made.
#[derive(Debug)]
pub struct Testbed<'a> {
    /// Cache of what is built once.
    pub cache: &'a Cache,
    /// Disk image without Towline.
    pub image: &'a Image,
    /// Package under test.
    pub software: &'a Software,
    /// Kernel that the machines boot.
    pub kernel: Kernel,
    /// Accelerator that QEMU uses.
    pub accelerator: Accelerator,
    /// Snapshots of running pairs that this run cannot use.
    pub unusable: &'a Unusable,
    /// Progress output.
    pub output: &'a ProgressOutput,
    /// Directory of this case's machines.
    pub directory: &'a Path,
}

/// The disks of two machines that form a mesh.
#[derive(Debug)]
struct JoinedDisks {
    /// Disk of the control plane.
    cp: Layers,
    /// Disk of the worker.
    worker: Layers,
    /// Text that is another one for each join.
    id: String,
}

/// Lifetime of the cached disks with joined nodes: long enough for a run of tests, and shorter than
/// a node's certificate is valid.
const PAIR_LIFETIME: Duration = Duration::from_secs(6 * 3600);
/// Version of the join steps, as a part of the cache's key. Increase it when they produce other
/// disks.
const RECIPE: &str = "3";
const CONTROLLER_ADDRESS: &str = "203.0.113.10:7443";
const OVERLAY_V4: &str = "198.19.0.0/16";
const OVERLAY_V6: &str = "fd12:3456:789a:1::/64";
/// IPv4 address of the mesh that no node owns.
pub const UNOWNED_V4: &str = "198.19.255.250";
/// IPv6 address of the mesh that no node owns.
const UNOWNED_V6: &str = "fd12:3456:789a:1:ffff::250";
/// Command that exits with 0 once the machine is ready and a peer is up.
pub const MESH_UP: &str = "towline wait --timeout 40 && towline peers -o json | grep -q '\"up\"'";
const JOIN_LIMIT: Duration = Duration::from_secs(400);

/// Returns the networks of the mesh, to which nothing may leave a machine in clear.
pub fn mesh_ranges() -> Vec<IpNet> {
    [OVERLAY_V4, OVERLAY_V6].iter().filter_map(|range| range.parse().ok()).collect()
}

impl Testbed<'_> {
    /// Creates two machines without Towline, switched off.
    pub fn blank(&self) -> anyhow::Result<Pair> {
        let image = Layers::raw(&self.image.disk);
        self.pair(&image, &image)
    }

    /// Creates two machines, switched off, with the disks of a control plane and of a worker that
    /// joined its mesh.
    pub fn joined(&self) -> anyhow::Result<Pair> {
        let disks = self.joined_disks()?;
        self.pair(&disks.cp, &disks.worker)
    }

    /// Returns the disks of a control plane and of a worker that joined its mesh, and were shut
    /// down.
    fn joined_disks(&self) -> anyhow::Result<JoinedDisks> {
        let image = self.image.disk.display().to_string();
        let made_from = [RECIPE.as_bytes(), image.as_bytes(), self.software.bytes()];
        let place = self.cache.entry("pair", &made_from, Some(PAIR_LIFETIME), |place| {
            self.output
                .step("installing and joining a control plane and a worker, once for all cases");
            let mut pair = self.blank()?;
            pair.join(self).inspect_err(|_| pair.keep_evidence(self, "pair"))?;
            pair.shut_down()?;
            link(pair.cp.disk(), &place.join("cp"))?;
            link(pair.worker.disk(), &place.join("worker"))?;
            let made = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
            Ok(fs::write(place.join("made"), made.as_nanos().to_string())?)
        })?;
        let image = Layers::raw(&self.image.disk);
        Ok(JoinedDisks {
            cp: image.with(place.join("cp")),
            worker: image.with(place.join("worker")),
            id: format!("{} {}", place.display(), fs::read_to_string(place.join("made"))?),
        })
    }

    /// Creates two machines, switched off, with these disks.
    fn pair(&self, cp: &Layers, worker: &Layers) -> anyhow::Result<Pair> {
        let directory = tempfile::Builder::new().prefix("pair-").tempdir_in(self.directory)?.keep();
        let network = Network::new(&directory, 2, &mesh_ranges())?;
        let medium = self.software.medium(&directory)?;
        let machine = |name, layers, port| {
            let parts = Parts {
                name,
                directory: &directory,
                layers,
                medium: &medium,
                kernel: &self.kernel,
                accelerator: self.accelerator,
            };
            Machine::new(parts, network.port(port))
        };
        Ok(Pair {
            cp: machine("cp", cp, 0)?,
            worker: machine("worker", worker, 1)?,
            network,
            restore_error: None,
        })
    }
}

impl Pair {
    /// Switches both machines on and waits until they accept commands.
    pub fn boot(&mut self) -> anyhow::Result<()> {
        self.cp.start("")?;
        self.worker.start("")?;
        self.cp.await_runner()?;
        self.worker.await_runner()
    }

    /// Boots both machines, installs the package, and joins first the control plane to its own
    /// controller, then the worker. Both stay on.
    pub fn join(&mut self, bed: &Testbed<'_>) -> anyhow::Result<()> {
        self.boot()?;
        for (machine, host) in [(&mut self.cp, 10), (&mut self.worker, 20)] {
            provision(machine, host).context("cannot set up the network of the machine")?;
        }
        for machine in [&mut self.cp, &mut self.worker] {
            machine.run_ok_for(&bed.software.install_command(), CHANGE_LIMIT)?;
        }
        self.cp.write(
            "/etc/towline/controller.toml",
            &format!(
                "advertise = [\"{CONTROLLER_ADDRESS}\"]\noverlay_v4 = \"{OVERLAY_V4}\"\n\
                 overlay_v6 = \"{OVERLAY_V6}\"\n"
            ),
        )?;
        self.cp.run_ok_for("systemctl enable --now towline-controller", CHANGE_LIMIT)?;
        let of_cp = self.token()?;
        join(&mut self.cp, &of_cp, "--plain-port 7443")?;
        let of_worker = self.token()?;
        join(&mut self.worker, &of_worker, "")?;
        self.speak_to_mesh()
    }

    /// Pings between the nodes by their mesh addresses, in both directions and address families.
    pub fn ping(&mut self) -> anyhow::Result<()> {
        let cp = overlay_addresses(&mut self.cp)?;
        let worker = overlay_addresses(&mut self.worker)?;
        for (machine, to) in [(&mut self.worker, cp), (&mut self.cp, worker)] {
            for address in [to.v4, to.v6] {
                let command = format!("ping -n -c 3 -i 0.3 -W 10 {address}");
                let output = machine.run_until_ok(&command, CHANGE_LIMIT)?;
                if !output.is_success() {
                    bail!("{} cannot reach {address}: {output}", machine.name());
                }
            }
        }
        Ok(())
    }

    /// Returns what the worker sent since the last reset of the network's counts.
    pub fn sent(&self) -> Sent {
        self.network.sent(self.worker.port())
    }

    /// Shuts both machines down in order.
    pub fn shut_down(&mut self) -> anyhow::Result<()> {
        for machine in [&mut self.worker, &mut self.cp] {
            machine.shut_down()?;
        }
        Ok(())
    }

    /// Writes the logs and the state of both machines into a file of the cache, and reports its
    /// path.
    pub fn keep_evidence(&mut self, bed: &Testbed<'_>, name: &str) {
        let text = self.worker.evidence() + &self.cp.evidence();
        match bed.cache.store(&format!("failed-{name}-{}.log", bed.kernel.release.name), &text) {
            Ok(path) => bed.output.note(&format!("logs of the machines: {}", path.display())),
            Err(error) => bed.output.note(&format!("cannot store the machines' logs: {error:#}")),
        }
    }

    /// Creates a join token, once the controller serves.
    fn token(&mut self) -> anyhow::Result<String> {
        let output =
            self.cp.run_until_ok("towline-controller token create -o json", CHANGE_LIMIT)?;
        if !output.is_success() {
            bail!("the controller created no token: {output}");
        }
        #[derive(Deserialize)]
        struct Token {
            token: String,
        }
        let token: Token = serde_json::from_str(&output.stdout)
            .context("cannot parse the output of `token create`")?;
        Ok(token.token)
    }

    /// Sets the mesh addresses to which the worker's background traffic goes, immediately and for
    /// later boots.
    fn speak_to_mesh(&mut self) -> anyhow::Result<()> {
        let cp = overlay_addresses(&mut self.cp)?;
        let mut targets = String::new();
        let mesh = [cp.v4.to_string(), cp.v6.to_string()];
        for address in mesh.iter().map(String::as_str).chain([UNOWNED_V4, UNOWNED_V6]) {
            targets.push_str(&format!("{MESH_LABEL} {address}\n"));
        }
        for address in [IpAddr::V4(GATEWAY_V4), IpAddr::V6(GATEWAY_V6)] {
            targets.push_str(&format!("{PLAIN_LABEL} {address}\n"));
        }
        self.worker.write("/etc/lab/targets", &targets)?;
        self.worker.run_ok("systemctl restart background-traffic").map(drop)
    }
}

/// Returns a node's mesh addresses, as its agent reports them.
pub fn overlay_addresses(machine: &mut Machine) -> anyhow::Result<OverlayAddresses> {
    #[derive(Deserialize)]
    struct Status {
        overlay_addresses: Vec<IpAddr>,
    }
    // The agent may not have started yet.
    let answer = machine.run_until_ok("towline status -o json", CHANGE_LIMIT)?;
    let status: Status = serde_json::from_str(&answer.stdout).with_context(|| {
        format!("cannot parse the output of `towline status` on {}: {answer}", machine.name())
    })?;
    let find =
        |is_wanted: fn(&IpAddr) -> bool| status.overlay_addresses.iter().copied().find(is_wanted);
    let name = machine.name();
    Ok(OverlayAddresses {
        v4: find(IpAddr::is_ipv4).with_context(|| format!("{name} has no IPv4 mesh address"))?,
        v6: find(IpAddr::is_ipv6).with_context(|| format!("{name} has no IPv6 mesh address"))?,
    })
}

/// Sets a machine's name and its addresses on the network, where its host number is `host`.
fn provision(machine: &mut Machine, host: u8) -> anyhow::Result<()> {
    let name = machine.name().to_owned();
    let [a, b, c, _] = GATEWAY_V4.octets();
    let mut v6 = GATEWAY_V6.octets();
    v6[15] = host;
    let v6 = Ipv6Addr::from(v6);
    machine.write("/etc/hostname", &format!("{name}\n"))?;
    machine.write("/etc/hosts", &format!("127.0.0.1 localhost\n127.0.1.1 {name}\n"))?;
    machine.write(
        "/etc/systemd/network/10-eth0.network",
        &format!(
            "[Match]\nName=eth0\n\n[Network]\nAddress={a}.{b}.{c}.{host}/24\nAddress={v6}/64\n\
             Gateway={GATEWAY_V4}\nGateway={GATEWAY_V6}\nIPv6AcceptRA=no\n"
        ),
    )?;
    machine.run_ok(&format!("hostname {name} && sync"))?;
    // networkd may not have started yet.
    let reload = machine.run_until_ok(
        "networkctl reload && ip route show default | grep -q . && \
         ip -6 route show default | grep -q .",
        CHANGE_LIMIT,
    )?;
    if !reload.is_success() {
        bail!("{name} has no default routes: {reload}");
    }
    Ok(())
}

fn join(machine: &mut Machine, token: &str, flags: &str) -> anyhow::Result<()> {
    machine.write("/run/token", token)?;
    let command = format!("towline join --install --token-file /run/token {flags} --timeout 300");
    machine.run_ok_for(&command, JOIN_LIMIT).map(drop)
}
