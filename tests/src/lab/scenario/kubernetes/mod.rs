//! `cargo lab kubernetes`: runs a real API server on the control plane. Two workers behind NAT have
//! agents that use real kubelet certificates.

mod kubelet;
mod plane;
pub(super) mod programs;

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;
use serde_json::{Value, json};
use towline_netlink::{AddressOptions, Rtnetlink};

use super::Setting;
use super::hybrid::{Hybrid, NODES};
use crate::checkout;
use crate::lab::interrupt::wait_up_to;
use crate::lab::mesh::{Controller, Node, START_LIMIT, require_tunnel};
use crate::lab::namespace::join;
use crate::lab::ping::first_reply;
use crate::lab::privilege::Rank;
use crate::lab::report::{Figures, Promises, Skipped, round};
use crate::lab::topology::Lab;
use plane::{Plane, ask};
use programs::Programs;

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct Kubernetes {
    /// True if the lab ran in a user namespace, without root rights on this machine.
    pub rootless: bool,
    /// Checks in the order in which they ran.
    pub arrows: Vec<Arrow>,
    /// Time in milliseconds from a change of a Node's pod network until the cloud node knows the
    /// new one.
    pub cidr_change_ms: Option<f64>,
    /// Checks that could not run.
    pub skipped: Vec<Skipped>,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// Result of one check.
#[derive(Debug, Serialize)]
pub struct Arrow {
    /// Name of the check.
    pub name: String,
    /// True if the check succeeded.
    pub ok: bool,
}

/// Network that contains the pods of all nodes.
const PODS: &str = "10.244.0.0/16";
/// Limit for a change to become visible.
const LIMIT: Duration = Duration::from_secs(20);
/// Limit for [`Kubernetes::cidr_change_ms`].
const CIDR_CHANGE_MS: f64 = 1000.0;

/// Runs the scenario and returns its results.
pub fn run(setting: &Setting) -> anyhow::Result<Kubernetes> {
    let programs = Programs::find(&setting.output)?;
    let hybrid = Hybrid::build(setting)?;
    let mut figures =
        Kubernetes { rootless: setting.rank == Rank::Rootless, ..Kubernetes::default() };
    figures.failed =
        Promises::broken_by(|promises| figures.play(setting, &hybrid, programs, promises));
    Ok(figures)
}

/// Worker node with the files of its kubelet credentials.
struct Worker {
    node: Node,
    address: IpAddr,
    kubeconfig: PathBuf,
    certificate: PathBuf,
}

impl Kubernetes {
    /// Starts the mesh and the control plane, and runs the checks.
    fn play(
        &mut self,
        setting: &Setting,
        hybrid: &Hybrid,
        programs: Programs,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        setting.output.step("starting the mesh");
        let controller = Controller::start(&hybrid.lab, &hybrid.cp, &setting.binaries)?;
        let mut nodes = Vec::new();
        let mut addresses = Vec::new();
        for (name, site, configuration) in NODES {
            let cni = hybrid.lab.directory().join(format!("{name}-cni"));
            std::fs::create_dir(&cni)?;
            std::fs::write(cni.join("10-bridge.conf"), r#"{"type": "bridge"}"#)?;
            let kubeconfig = hybrid.lab.directory().join(format!("{name}.conf"));
            let more = format!(
                "{configuration}\n[kubernetes]\nkubeconfig = {kubeconfig:?}\ncni_dir = {cni:?}\n"
            );
            let host = hybrid.host(name)?;
            let mut node = Node::new(&hybrid.lab, host, name, &setting.binaries, &more)?;
            let flags = ["--site", site, "--prefix", PODS];
            node.join(&controller.operator().token_with(&flags)?)?;
            let status = node.restart()?;
            addresses.push(status.overlay_v4().context("a node has no IPv4 mesh address")?);
            nodes.push(node);
        }
        let cp = nodes.remove(0);
        for worker in &nodes {
            require_tunnel(worker, &cp, START_LIMIT)?;
        }
        setting.output.step("starting etcd and the API server");
        let directory = hybrid.lab.directory();
        let mut plane = Plane::start(&hybrid.cp, addresses[0], directory, programs)?;
        self.arrow(promises, "the API server serves with authorizer Node,RBAC", true);
        let workers: Vec<Worker> = nodes
            .into_iter()
            .zip(&addresses[1..])
            .map(|(node, address)| {
                let name = node.name().to_owned();
                Worker {
                    node,
                    address: *address,
                    kubeconfig: directory.join(format!("{name}.conf")),
                    certificate: directory.join(format!("{name}.pem")),
                }
            })
            .collect();

        setting.output.step("checking that each worker sees its own Node");
        for (index, worker) in workers.iter().enumerate() {
            let name = worker.node.name();
            plane.node(name, worker.address, &format!("10.244.{}.0/24", index + 1))?;
            let pem = plane.ca.issue_node(name)?.both();
            plane.credentials(directory, name, &pem)?;
        }
        for (index, worker) in workers.iter().enumerate() {
            let (name, pods) = (worker.node.name(), format!("10.244.{}.0/24", index + 1));
            let seen = worker.sees(&pods)?;
            self.arrow(promises, &format!("{name} sees its own Node"), seen);
            let known = announced(&cp, name, &pods)?;
            self.arrow(promises, &format!("cp knows the pod network of {name}"), known);
            let other = workers[1 - index].node.name();
            let (own_code, _) = worker.ask(&format!("/api/v1/nodes/{name}"))?;
            let (other_code, _) = worker.ask(&format!("/api/v1/nodes/{other}"))?;
            let (all_code, _) = worker.ask("/api/v1/nodes")?;
            let refused = (own_code, other_code, all_code) == (200, 403, 403);
            self.arrow(promises, &format!("{name} is refused {other} and the list"), refused);
        }

        setting.output.step("publishing the mesh into the cluster");
        self.published(&controller, &plane, &hybrid.lab, promises)?;

        setting.output.step("changing the pod network of a Node");
        let worker = &workers[0];
        let name = worker.node.name();
        worker.pod("10.244.1.7")?;
        self.arrow(promises, "cp reaches a pod", reaches(&cp, "10.244.1.7")?);
        worker.pod("10.244.9.7")?;
        let begun = Instant::now();
        plane.node(name, worker.address, "10.244.9.0/24")?;
        let followed = announced(&cp, name, "10.244.9.0/24")?;
        let took = begun.elapsed().as_secs_f64() * 1e3;
        self.cidr_change_ms = followed.then_some(round(took));
        let soon = followed && took < CIDR_CHANGE_MS;
        self.arrow(promises, "a change of pod network is followed within a second", soon);
        self.arrow(promises, "cp reaches a pod of the new network", reaches(&cp, "10.244.9.7")?);

        setting.output.step("rotating the credentials of a kubelet");
        let before = worker.credentials_read()?;
        crate::cluster::replace(&worker.certificate, &plane.ca.issue_node(name)?.both())?;
        let rotated =
            wait_up_to(LIMIT, || Ok((worker.credentials_read()? > before).then_some(())))?;
        let rotated = rotated.is_some() && worker.sees("10.244.9.0/24")?;
        self.arrow(promises, "rotated credentials are read again", rotated);

        setting.output.step("stopping the API server and starting it again");
        plane.stop()?;
        let noticed =
            wait_up_to(LIMIT, || Ok((worker.view()?["connected"] == false).then_some(())))?;
        let kept = noticed.is_some()
            && announced(&cp, name, "10.244.9.0/24")?
            && reaches(&cp, "10.244.9.7")?;
        self.arrow(promises, "without the API server the last good state holds", kept);
        plane.launch()?;
        plane.await_ready()?;
        let back =
            wait_up_to(2 * LIMIT, || Ok((worker.view()?["connected"] == true).then_some(())))?;
        self.arrow(promises, "the API server is found again", back.is_some());

        setting.output.step("reading logs from a kubelet through the API server");
        self.kubelet(&plane, worker, promises)
    }

    /// Checks that the objects of the mesh appear in the cluster, written by a user that may do nothing else.
    fn published(
        &mut self,
        controller: &Controller,
        plane: &Plane,
        lab: &Lab,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        plane.create_all(&checkout::root().join("deploy/kubernetes/crds.yaml"))?;
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "towline-publisher"},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": "towline-publisher",
            },
            "subjects": [{
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "User",
                "name": "publisher",
            }],
        });
        let bindings = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings";
        let (code, answer) = plane.admin("POST", bindings, Some(binding))?;
        anyhow::ensure!(code == 201, "cannot bind the publisher's role: {answer}");
        let pem = plane.ca.issue("publisher", "", &[])?.both();
        let kubeconfig = plane.credentials(lab.directory(), "publisher", &pem)?;
        let kubeconfig = kubeconfig.to_string_lossy().into_owned();
        let arguments = ["publish", "--every", "5s", "--kubeconfig", &kubeconfig];
        let log = lab.directory().join("publish.log");
        // The kinds are served a moment after they were created.
        let served = wait_up_to(LIMIT, || {
            let (code, _) = plane.admin("GET", "/apis/towline.io/v1alpha1/towlinepaths", None)?;
            Ok((code == 200).then_some(()))
        })?;
        anyhow::ensure!(served.is_some(), "the API server does not serve the kinds");
        let _publisher = controller.operator().start(&arguments, &log)?;
        let connected = wait_up_to(LIMIT, || {
            let (_, text) = plane.admin("GET", "/apis/towline.io/v1alpha1/towlinenodes", None)?;
            let list: Value = serde_json::from_str(&text).unwrap_or_default();
            let nodes = list["items"].as_array().map(Vec::as_slice).unwrap_or_default();
            let connected = nodes.iter().filter(|node| {
                let condition = &node["status"]["conditions"][0];
                condition["type"] == "Connected" && condition["status"] == "True"
            });
            Ok((connected.count() == NODES.len()).then_some(()))
        })?;
        self.arrow(promises, "every node is an object of the cluster", connected.is_some());
        Ok(())
    }

    /// Checks that the API server reads the logs of a pod from the worker's kubelet, through the
    /// tunnel.
    fn kubelet(
        &mut self,
        plane: &Plane,
        worker: &Worker,
        promises: &mut Promises,
    ) -> anyhow::Result<()> {
        let name = worker.node.name();
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "game", "namespace": "default"},
            "spec": {"nodeName": name, "containers": [{"name": "game", "image": "game"}]},
        });
        let (code, answer) = plane.admin("POST", "/api/v1/namespaces/default/pods", Some(pod))?;
        anyhow::ensure!(code == 201, "cannot create the pod: {answer}");
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let namespace = worker.node.host().namespace();
            let serve = || kubelet::serve(&plane.ca, name, worker.address, &stop);
            let server = namespace.thread(scope, "kubelet", serve)?;
            let wanted = format!("hello from {name}\n");
            let logs = wait_up_to(LIMIT, || {
                let path = "/api/v1/namespaces/default/pods/game/log";
                let answer = plane.admin("GET", path, None).ok();
                Ok(answer.filter(|(code, text)| *code == 200 && *text == wanted))
            });
            let kubectl = plane.kubectl(&["logs", "game"]);
            stop.store(true, Ordering::Relaxed);
            join(server)?;
            self.arrow(
                promises,
                "the API server reads logs from a worker behind NAT",
                logs?.is_some(),
            );
            match kubectl {
                Some(answer) => {
                    let held = answer.is_ok_and(|text| text == wanted);
                    self.arrow(promises, "kubectl logs from the cloud", held);
                }
                None => self.skipped.push(Skipped {
                    name: "kubectl logs from the cloud".to_owned(),
                    why: "kubectl is not installed".to_owned(),
                }),
            }
            Ok(())
        })
    }

    /// Records the result of a check.
    fn arrow(&mut self, promises: &mut Promises, name: &str, ok: bool) {
        promises.hold(ok, || name.to_owned());
        self.arrows.push(Arrow { name: name.to_owned(), ok });
    }
}

impl Worker {
    /// Returns the section about Kubernetes of `towline status`.
    fn view(&self) -> anyhow::Result<Value> {
        let status = self.node.command_ok(&["status", "-o", "json"])?;
        let status: Value =
            serde_json::from_str(&status).context("the output of status is not JSON")?;
        Ok(status["kubernetes"].clone())
    }

    /// Returns whether status shows the worker's own Node with this pod network, within the limit.
    fn sees(&self, pods: &str) -> anyhow::Result<bool> {
        let seen = wait_up_to(LIMIT, || {
            let view = self.view()?;
            let seen = view["connected"] == true
                && view["node"] == self.node.name()
                && view["pod_networks"] == json!([pods]);
            Ok(seen.then_some(()))
        })?;
        Ok(seen.is_some())
    }

    /// Sends a request from the worker with its own credentials. Returns the status code and the
    /// body.
    fn ask(&self, path: &str) -> anyhow::Result<(u16, String)> {
        ask(self.node.host(), &self.kubeconfig, "GET", path, None)
    }

    /// Adds the address of a pod to the loopback link of the machine.
    fn pod(&self, address: &str) -> anyhow::Result<()> {
        let net = format!("{address}/32").parse()?;
        self.node.host().namespace().run(|| {
            let mut netlink = Rtnetlink::open()?;
            let link = netlink.link_index("lo")?;
            Ok(netlink.add_address(link, net, AddressOptions::default())?)
        })
    }

    /// Returns how often the agent has read its credentials, according to its log.
    fn credentials_read(&self) -> anyhow::Result<usize> {
        let log = std::fs::read_to_string(self.node.log())?;
        Ok(log.matches("kubernetes credentials read").count())
    }
}

/// Returns whether `cp` learns within the limit that `name` announces this network.
fn announced(cp: &Node, name: &str, pods: &str) -> anyhow::Result<bool> {
    let found = wait_up_to(LIMIT, || {
        let peers = cp.command_ok(&["peers", "-o", "json"])?;
        let peers: Value =
            serde_json::from_str(&peers).context("the output of peers is not JSON")?;
        let peer =
            peers.as_array().and_then(|peers| peers.iter().find(|peer| peer["name"] == name));
        let has = peer.and_then(|peer| peer["prefixes"].as_array());
        Ok(has.is_some_and(|has| has.iter().any(|net| net == pods)).then_some(()))
    })?;
    Ok(found.is_some())
}

/// Returns whether `cp` gets an echo reply from this address through the tunnel, within the limit.
fn reaches(cp: &Node, address: &str) -> anyhow::Result<bool> {
    let deadline = Instant::now() + LIMIT;
    let reply = first_reply(cp.host().namespace(), address.parse()?, "towline0", deadline)?;
    Ok(reply.is_some())
}

impl Figures for Kubernetes {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = String::new();
        for arrow in &self.arrows {
            let _ =
                writeln!(text, "{}  {}", if arrow.ok { "ok    " } else { "FAILED" }, arrow.name);
        }
        for skipped in &self.skipped {
            let _ = writeln!(text, "{skipped}");
        }
        let took = self.cidr_change_ms.map_or("-".to_owned(), |took| took.to_string());
        let _ = write!(text, "a change of pod network took {took} ms");
        text
    }
}
