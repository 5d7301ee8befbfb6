//! Host layout of most scenarios: a control plane in the cloud, and two datacenters, each with a
//! worker behind its own NAT router. [`crate::lab`] has a diagram.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use ipnet::IpNet;
use nix::errno::Errno;
use towline_netlink::NetlinkError;

use super::Setting;
use crate::lab::capture::Capture;
use crate::lab::mesh::{Controller, Node};
use crate::lab::namespace::Namespace;
use crate::lab::nat::Nat;
use crate::lab::report::Forbidden;
use crate::lab::topology::{Host, Lab, Router};
use crate::lab::traffic::Pattern;

/// Hosts of the layout. No program runs on them until [`Self::bring_up`].
#[derive(Debug)]
pub struct Hybrid {
    /// Host in the cloud, for the controller and a node.
    pub cp: Arc<Host>,
    /// Hosts in the datacenters.
    pub workers: [Arc<Host>; 2],
    /// NAT router of each worker.
    pub routers: [Router; 2],
    /// Lab that owns the namespaces and files of all hosts.
    pub lab: Lab,
}

/// Controller and the nodes `cp`, `worker-a` and `worker-b`.
#[derive(Debug)]
pub struct Mesh {
    /// Controller, on the host `cp`.
    pub controller: Controller,
    /// Nodes in the order of [`NODES`].
    pub nodes: Vec<Node>,
}

/// Default ranges of mesh addresses: the controller's IPv4 range, and all unique local IPv6
/// addresses (RFC 4193). Nothing else in the lab uses them.
const OVERLAY: [IpNet; 2] = [
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(198, 19, 0, 0)), 16),
    IpNet::new_assert(IpAddr::V6(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0)), 7),
];

/// Name, site and additional configuration of each node.
pub const NODES: [(&str, &str, &str); 3] = [
    ("cp", "cloud", "[node]\nadvertise = [\"203.0.113.10:51830\"]\n"),
    ("worker-a", "dc-a", ""),
    ("worker-b", "dc-b", ""),
];

impl Hybrid {
    /// Builds the hosts.
    ///
    /// # Errors
    /// Returns [`Forbidden`] if the kernel has no bridge, no veth or no nftables.
    pub fn build(setting: &Setting) -> anyhow::Result<Self> {
        setting.output.step("building the simulated internet, two datacenters and a cloud");
        Self::try_build(setting).map_err(|error| {
            let errno =
                error.chain().find_map(|cause| cause.downcast_ref::<NetlinkError>()?.errno());
            match errno {
                Some(Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT | Errno::EPERM | Errno::ENOENT) => {
                    anyhow!(Forbidden {
                        what: format!("this kernel cannot build the lab's network: {error:#}"),
                        remedy:
                            "load the modules with `modprobe -a veth bridge nf_tables nft_masq \
                                 nft_ct`"
                                .to_owned(),
                    })
                }
                _ => error.context("cannot build the hosts"),
            }
        })
    }

    fn try_build(setting: &Setting) -> anyhow::Result<Self> {
        let mut lab = Lab::new(setting.rank)?;
        let cp = lab.host("cp").public("203.0.113.10", "2001:db8::10")?.build()?;
        let mut site = |letter: &str, number: u8| -> anyhow::Result<(Router, Arc<Host>)> {
            let router = lab
                .router(&format!("router-{letter}"))
                .public_number(10 + number)?
                .lan_number(number)?
                .nat(Nat::Masquerade)
                .build()?;
            let worker = lab.host(&format!("worker-{letter}")).behind(&router).build()?;
            Ok((router, worker))
        };
        let (router_a, worker_a) = site("a", 1)?;
        let (router_b, worker_b) = site("b", 2)?;
        Ok(Self { cp, workers: [worker_a, worker_b], routers: [router_a, router_b], lab })
    }

    /// Returns the host of a node of [`NODES`].
    pub fn host(&self, name: &str) -> anyhow::Result<&Arc<Host>> {
        std::iter::once(&self.cp)
            .chain(&self.workers)
            .find(|host| host.name() == name)
            .ok_or_else(|| anyhow!("there is no host {name}"))
    }

    /// Captures on the internet. Tests the detector first: one datagram with the pattern goes from
    /// a datacenter to the cloud in clear, and the capture must find it.
    pub fn capture(&self, pattern: Pattern) -> anyhow::Result<Capture> {
        let cloud = *self.cp.addresses().first().ok_or_else(|| anyhow!("cp has no address"))?;
        proven(self.lab.internet(), &self.workers[0], cloud, pattern)
    }

    /// Captures on every uplink: those of the cloud host and of the routers on the internet, and
    /// those of the workers behind their routers. Tests each detector as [`Self::capture`] does.
    pub fn capture_uplinks(&self, pattern: Pattern) -> anyhow::Result<[Capture; 3]> {
        let [a, b] = &self.routers;
        let [worker_a, worker_b] = &self.workers;
        Ok([
            self.capture(pattern)?,
            proven(a.host().namespace(), worker_a, a.gateway(), pattern)?,
            proven(b.host().namespace(), worker_b, b.gateway(), pattern)?,
        ])
    }

    /// Starts the controller, joins and starts all nodes, and waits until their agents answer and
    /// are connected.
    pub fn bring_up(&self, setting: &Setting) -> anyhow::Result<Mesh> {
        self.bring_up_with(setting, |_, configuration| (configuration.to_owned(), Vec::new()))
    }

    /// Does the same as [`Self::bring_up`]. `more` maps the name and the additional configuration
    /// of a node to the configuration it gets and the prefixes that its token grants.
    pub fn bring_up_with(
        &self,
        setting: &Setting,
        more: impl Fn(&str, &str) -> (String, Vec<IpNet>),
    ) -> anyhow::Result<Mesh> {
        setting.output.step("starting the controller");
        let controller = Controller::start(&self.lab, &self.cp, &setting.binaries)?;
        let mut nodes = Vec::new();
        for (name, site, configuration) in NODES {
            setting.output.step(&format!("joining {name}"));
            let host = self.host(name)?;
            let (configuration, granted) = more(name, configuration);
            let mut node = Node::new(&self.lab, host, name, &setting.binaries, &configuration)?;
            let granted: Vec<String> = granted.iter().map(ToString::to_string).collect();
            let granted = granted.iter().flat_map(|prefix| ["--prefix", prefix.as_str()]);
            let flags: Vec<&str> = ["--site", site].into_iter().chain(granted).collect();
            node.join(&controller.operator().token_with(&flags)?)?;
            node.restart()?;
            nodes.push(node);
        }
        Ok(Mesh { controller, nodes })
    }
}

/// Starts a capture in `place`, and checks that it finds a datagram that `sender` sends to `target`
/// in clear.
fn proven(
    place: &Namespace,
    sender: &Host,
    target: IpAddr,
    pattern: Pattern,
) -> anyhow::Result<Capture> {
    /// UDP port of the discard service (RFC 863).
    const DISCARD: u16 = 9;
    let capture = Capture::start(place, pattern)?;
    capture.watch(OVERLAY);
    sender.namespace().run(|| {
        let socket = UdpSocket::bind((IpAddr::from([0, 0, 0, 0]), 0))?;
        let bytes = [pattern.cell(0), pattern.cell(1)].concat();
        socket.send_to(&bytes, SocketAddr::new(target, DISCARD))?;
        Ok(())
    })?;
    capture
        .expect_mark(Duration::from_secs(60))
        .context("the capture did not find the test datagram")?;
    Ok(capture)
}
